"""Cost of our models and of their peers: seconds to fit, latency, memory and file size, by number of good images.

Run on an otherwise idle machine, for example as::

    python -m benchmarks.cost --backbone "$(anomalib-ot weights)" --image_size 224
    python -m benchmarks.cost --backbone vit_small_patch14_dinov2.lvd142m --image_size 448

All models have the same backbone and image size, and are fitted to images of the embedded category. A backbone that is
not ``local-dir:PATH`` has random weights. They are written to a temporary folder, because anomalib's AnomalyDINO always
loads weights, so that nothing is downloaded. Only costs are measured, no accuracy.

AnomalyDINO and RAD are those of anomalib if the backbone is a vision transformer. They accept no other backbone.
AnomalyDINO's rule on the layers of PatchCore then replaces AnomalyDINO. RAD has no replacement, because it retrieves
images by their class token.

Each run is a process of its own. The backbone alone is timed in each of them, in turns with the model, because the
speed of a machine drifts; compare the ratios of the models rather than their times. The backbone alone returns the
layers of Pradot. Scoring includes pre- and post-processing. The peak memory covers the fit and the first score, in
torch, with the libraries of all runtimes loaded. The fit includes no validation. INT8 is PTQ of our models, in turns
with the same model in float32.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import openvino
import timm
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from timm.models import save_for_hf
from torch import nn

from anomalib_ot import Pradot
from anomalib_ot.comparison import Job, Plan
from anomalib_ot.comparison.measurement import QUIET
from anomalib_ot.export.checked import CheckedExport
from anomalib_ot.export.tolerance import ExportError
from anomalib_ot.features.backbone_defaults import default_layers
from anomalib_ot.features.backbones import create_extractor, layers_of_backbone, network_of
from anomalib_ot.features.extraction import FLOAT32, extract_by_parts
from anomalib_ot.features.map_extractor import is_plain_transformer

from .categories import EMBEDDED
from .latency import QUIETLY, backbone_file, compiled, in_int8, of_one, picture, times_in_turns
from .versions import versions
from .watch import peak_memory, timed

OURS = ("Pradot", "WtFlow", "Duo")
MODELS: dict[str, dict[str, Any]] = {
    "Pradot": {"class_path": "anomalib_ot.Pradot"},
    "WtFlow": {"class_path": "anomalib_ot.WtFlow"},
    "Duo": {"class_path": "anomalib_ot.Duo"},
    "PaDiM": {"class_path": "anomalib.models.Padim"},
    "PatchCore": {"class_path": "anomalib.models.Patchcore", "init_args": {"coreset_sampling_ratio": 0.1}},
}
# Layers as in configs/compare/dino.yaml.
ON_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "PaDiM": {"layers": ["blocks.2", "blocks.5", "blocks.8"], "n_features": 100},
    "PatchCore": {"layers": ["blocks.5", "blocks.8"]},
}
OF_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "AnomalyDINO": {"class_path": "anomalib.models.AnomalyDINO"},
    "RAD": {"class_path": "anomalib.models.Rad"},
}
OF_OTHERS: dict[str, dict[str, Any]] = {
    "AnomalyDINO's rule": {"class_path": "benchmarks.nearest_cell.NearestCellDetector"},
}
FIT, PEAK, NOTE = "fit, s", "peak memory, MB", "note"
TORCH, SINGLE, DEFAULT = "torch, ms", "OpenVINO f32, ms", "OpenVINO default, ms"
INT8, STATE, GRAPH = "OpenVINO INT8, ms", "torch file, MB", "OpenVINO file, MB"
COLUMNS = (FIT, TORCH, SINGLE, DEFAULT, INT8, PEAK, STATE, GRAPH, NOTE)
# Scores of the slowest models take seconds.
PICTURES, WARM_UP = 20, 2

# A cost and the cost that it is compared with, if any, or a text.
Cell = tuple[float, float | None] | str
Costs = dict[str, Cell]


def main(
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    image_size: int = 448,
    images: list[int] = [50, 100, 200, 400],  # noqa: B006 - jsonargparse shows the default, and nothing changes it
    names: list[str] | None = None,
    limit: float = 600,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Print a table for each number of images.

    Args:
        backbone: Backbone of all models, timm's name or ``local-dir:PATH``.
        image_size: Height and width in pixels.
        images: Numbers of good images.
        names: Models to measure; all by default.
        limit: Time limit of each fit in seconds.
        threads: Number of threads for each runtime.
        seed: Random seed.
    """
    packages, name = versions("anomalib-ot", "anomalib", "torch", "timm", "openvino"), Path(backbone).name
    print(f"{packages}, {name} at {image_size} pixels, {threads} threads, seed {seed}", flush=True)
    with TemporaryDirectory() as folder:
        jobs = jobs_of(with_weights(backbone, Path(folder)), image_size, images, names, Path(folder), threads, seed)
        jobs[0].create_data().prepare_data()
        for count, group in groupby(jobs, lambda job: job.key.shots):
            rows = {}
            for job in group:
                print(f"{job.key.model}, {count} images", file=sys.stderr, flush=True)
                rows[job.key.model] = measured(job, limit)
            print(f"\n{count} images\n\n{table(rows)}", flush=True)
    print(
        f"\nIn brackets: a fit is divided by the fastest fit of a model other than {' and '.join(OURS)}, INT8 by the "
        "same model in float32, and another cost by that of the backbone alone in the same process. The row of the "
        "backbone is the median of the processes."
    )


def with_weights(backbone: str, root: Path) -> str:
    """The backbone, or a folder of the backbone with random weights if it is not a folder."""
    if backbone.startswith("local-dir:"):
        return backbone
    # The models of anomalib infer the architecture from the name.
    folder = root / backbone
    save_for_hf(timm.create_model(backbone, pretrained=False), str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


def jobs_of(
    backbone: str,
    image_size: int,
    images: Sequence[int],
    names: Sequence[str] | None,
    root: Path,
    threads: int,
    seed: int,
) -> list[Job]:
    """The runs, ordered by number of images.

    Raises:
        ValueError: If a model is unknown on this backbone.
    """
    models = configurations(backbone)
    if unknown := {*(names or ())} - models.keys():
        msg = f"got {sorted(unknown)}, but the models on {backbone} are {[*models]}"
        raise ValueError(msg)
    settings = {"root": str(root / "images"), "n_train": max(images), "n_validation": 8, "n_test": 1}
    plan = Plan(
        {name: models[name] for name in names or models},
        {EMBEDDED: {"class_path": "anomalib_ot.Assembly", "init_args": settings}},
        backbone,
        image_size=(image_size, image_size),
        shots=tuple(images),
        seeds=(seed,),
    )
    return plan.jobs(threads=threads)


def configurations(backbone: str) -> dict[str, dict[str, Any]]:
    """``class_path`` and ``init_args`` of the models on a backbone."""
    if not is_plain_transformer(network_of(backbone)):
        return MODELS | OF_OTHERS
    own = {
        name: {**config, "init_args": config.get("init_args", {}) | ON_TRANSFORMERS.get(name, {})}
        for name, config in MODELS.items()
    }
    return own | OF_TRANSFORMERS


def measured(job: Job, limit: float) -> Costs:
    """Costs of a run in a new process. Costs that it does not return are absent."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    costs: Costs = {}
    with TemporaryDirectory() as folder:
        process = context.Process(target=_run, args=(sender, job, Path(folder)))
        process.start()
        # Only the process holds it now, so that its end ends the reading.
        sender.close()
        try:
            receiver.recv()
            if not receiver.poll(limit):
                return {FIT: f"> {limit:g}"}
            while True:
                costs |= receiver.recv()
        except EOFError:
            process.join()
        finally:
            process.kill()
            process.join()
    if process.exitcode:
        costs[NOTE] = f"ended with exit code {process.exitcode}"
    return costs


def _run(sender: Connection, job: Job, folder: Path) -> None:
    """Send an empty dictionary before the fit, and then the costs as soon as they are known."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(job.threads or 1)
    seed_everything(job.key.seed, workers=True, verbose=False)
    model, data = job.create_model(), job.create_data()
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, limit_val_batches=0, **QUIET)
    sender.send({})
    _, seconds = timed(lambda: engine.fit(model, datamodule=data))
    sender.send({FIT: (seconds, None)})
    for costs in costs_of(model.eval(), data, job, folder):
        sender.send(costs)


def costs_of(model: AnomalibModule, data: AnomalibDataModule, job: Job, folder: Path) -> Iterator[Costs]:
    """Costs of a fitted model, each with that of the backbone alone, and INT8 with that of float32."""
    image, size, threads = torch.from_numpy(picture(job.image_size)), job.image_size, job.threads or 1
    scored = torch.inference_mode()(lambda: model(image))
    scored()
    yield {PEAK: (peak_memory() * 1e3, None)}
    backbone = job.model["init_args"].get("backbone") or job.model["init_args"]["encoder_name"]
    layers = default_layers(layers_of_backbone(backbone), Pradot.checkpoint_rules.settings.strides)
    extractor = create_extractor(backbone, layers)
    yield {STATE: (megabytes(state_of(model.model, folder)), megabytes(state_of(extractor, folder)))}
    yield {TORCH: in_turns(torch.inference_mode()(lambda: extract_by_parts(extractor, image)), scored)}
    onnx_kwargs = QUIETLY if isinstance(model, CheckedExport) else QUIETLY | {"dynamic_axes": {}}
    try:
        exported = model.to_openvino(folder / "exported", input_size=size, onnx_kwargs=onnx_kwargs)
    except Exception as error:  # noqa: BLE001 - any error of an export is its result
        yield {NOTE: f"no export: {' '.join(str(error).split())[:100] or type(error).__name__}"}
        return
    alone = folder / "alone.xml"
    graph = openvino.Core().read_model(backbone_file(extractor, folder / "alone.onnx", size))
    openvino.save_model(graph, alone, compress_to_fp16=False)
    yield {GRAPH: (graph_megabytes(exported), graph_megabytes(alone))}
    for column, settings in ((SINGLE, FLOAT32), (DEFAULT, {})):
        yield {
            column: in_turns(*(compiled(of_one(path, size), threads, size, **settings) for path in (alone, exported)))
        }
    if isinstance(model, CheckedExport):
        try:
            in_eight_bits, in_single = in_int8(model, exported, data, threads, size)
        except ExportError as error:
            yield {INT8: f"refused: {' and '.join(error.broken)}"}
            return
        yield {INT8: in_turns(in_single, in_eight_bits)}


def in_turns(alone: Callable[[], object], whole: Callable[[], object]) -> tuple[float, float]:
    """Median latency of the whole model and of what it is compared with, in ms."""
    latency, _, floor = times_in_turns(alone, whole, PICTURES, WARM_UP)
    return latency, floor


def state_of(network: nn.Module, folder: Path) -> Path:
    """A file with the state of a network."""
    torch.save(network.state_dict(), folder / "state.pt")
    return folder / "state.pt"


def megabytes(*paths: Path) -> float:
    """Size of files together."""
    return sum(path.stat().st_size for path in paths) / 1e6


def graph_megabytes(path: Path) -> float:
    """Size of OpenVINO's two files of a model."""
    return megabytes(path, path.with_suffix(".bin"))


def table(rows: dict[str, Costs]) -> str:
    """The costs of models as a Markdown table, with a row of the backbone alone."""
    peers = [
        cost[0] for name, costs in rows.items() if name not in OURS and not isinstance(cost := costs.get(FIT, ""), str)
    ]
    compared = {name: {**costs, FIT: _compared(costs.get(FIT, "n/a"), peers)} for name, costs in rows.items()}
    lines = [["model", *COLUMNS], ["---"] * (len(COLUMNS) + 1), ["backbone alone", *_backbone(rows)]]
    lines += [
        [name, *(_text(costs.get(column, "" if column == NOTE else "n/a")) for column in COLUMNS)]
        for name, costs in compared.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _compared(cost: Cell, peers: Sequence[float]) -> Cell:
    return cost if isinstance(cost, str) else (cost[0], min(peers, default=None))


def _backbone(rows: dict[str, Costs]) -> Iterator[str]:
    for column in COLUMNS:
        cells = [costs[column] for costs in rows.values() if column in costs]
        floors = [cell[1] for cell in cells if not isinstance(cell, str) and cell[1] is not None]
        yield f"{median(floors):.1f}" if floors and column != INT8 else ""


def _text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell.replace("|", "/")
    value, other = cell
    return f"{value:.1f}" if other is None else f"{value:.1f} ({value / other:.2f})"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
