"""Size and accuracy of exported models.

Run as ``python -m benchmarks.export`` for the embedded category, or with ``--root DATA --categories "[tray]"`` for a
real one, with DATA as for ``configs/compare/real.yaml``. Models are fitted and then exported to OpenVINO by anomalib's
engine with each compression. Accuracies and differences come from the report of each export. All files of a model share
one graph, which torch makes once.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin import ExportMixin
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything

from anomalib_ot import FewShot
from anomalib_ot.export.tolerance import ExportError
from anomalib_ot.offline import offline_backbone

from .categories import EMBEDDED, open_category
from .rows import appended
from .side_by_side import IMAGE_SIZE, models

COLUMNS = (
    "category",
    "model",
    "compression",
    "MB",
    "image AUROC",
    "pixel AUROC",
    "map difference",
    "at default",
    "refused",
)
NAMES = ("Pradot", "WtFlow", "Duo", "Foct")
SHOTS = 4


def main(
    root: Path | None = None,
    categories: tuple[str, ...] = (EMBEDDED,),
    names: tuple[str, ...] = NAMES,
    output: Path = Path("results/export.csv"),
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Print a line for each category, model and compression.

    Args:
        root: Folder of the real categories.
        categories: Categories to run.
        names: Models to run.
        output: CSV file to add the results to.
        threads: Number of threads for torch.
        seed: Random seed.
    """
    torch.set_num_threads(threads)
    with appended(output, COLUMNS) as add:
        for category in categories:
            data = open_category(category, root)
            for name in names:
                model = fit(name, data, seed)
                with TemporaryDirectory() as folder, one_graph():
                    for compression in (None, *CompressionType):
                        add({"category": category, "model": name, **line(model, data, compression, Path(folder))})
    print(markdown(pd.read_csv(output, dtype=str).fillna("")))


def fit(name: str, data: AnomalibDataModule, seed: int) -> AnomalibModule:
    """Fit a model to a category, Foct to a few of its images."""
    seed_everything(seed, workers=True, verbose=False)
    model = models(offline_backbone())[name]()
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
        engine.fit(model, datamodule=FewShot(data, SHOTS, seed) if name == "Foct" else data)
    return model.eval()


def line(
    model: AnomalibModule, data: AnomalibDataModule, compression: CompressionType | None, folder: Path
) -> dict[str, str]:
    """Export a model and read the report of the export."""
    name = getattr(compression, "value", "fp32")
    try:
        path = Engine(logger=False, default_root_dir=folder).export(
            model,
            ExportType.OPENVINO,
            export_root=folder,
            model_file_name=name,
            input_size=IMAGE_SIZE,
            compression_type=compression,
            datamodule=data,
        )
    except ExportError as error:
        return {"compression": name, "refused": str(error)}
    report: dict[str, Any] = json.loads(path.with_name(f"{name}.parity.json").read_text())
    measured = report["float32"]
    return {
        "compression": name,
        "MB": f"{sum(report['bytes'].values()) / 1e6:.1f}",
        "image AUROC": f"{100 * measured['image_AUROC']:.2f}",
        "pixel AUROC": f"{100 * measured['pixel_AUROC']:.2f}",
        "map difference": f"{measured['map_difference']:.1e}",
        "at default": (
            f"{report['default_precision']}: {report['default']['map_difference']:.1e}, "
            f"{100 * report['default']['image_AUROC']:.2f}"
        ),
    }


def markdown(rows: pd.DataFrame) -> str:
    """The lines as a Markdown table."""
    lines = [list(rows.columns), ["---"] * len(rows.columns), *rows.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@contextmanager
def one_graph() -> Iterator[None]:
    """Run anomalib's ONNX export once, and return copies of its files after that."""
    export = ExportMixin.to_onnx
    with TemporaryDirectory() as kept:

        def to_onnx(model: AnomalibModule, root: Path, _name: str, *size: Any, **arguments: Any) -> Path:
            made = Path(kept) / "weights" / "onnx" / "graph.onnx"
            if not made.exists():
                export(model, kept, "graph", *size, **arguments)
            return Path(shutil.copytree(made.parent, Path(root) / "weights" / "onnx", dirs_exist_ok=True)) / made.name

        ExportMixin.to_onnx = to_onnx
        try:
            yield
        finally:
            ExportMixin.to_onnx = export


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
