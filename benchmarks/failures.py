"""Failures of the models on the embedded category, as a figure for each model card.

Run as ``python -m benchmarks.failures``; it needs no network. A failure is an anomalous image with a lower score than a
normal one, or a normal image with a higher score than an anomalous one. The figures show the worst failures.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from jsonargparse import auto_cli
from PIL import Image

from anomalib_ot import Assembly, FewShot, Foct
from anomalib_ot.comparison import measure
from anomalib_ot.drawing.figures import new_figure, save, show_image, show_map
from anomalib_ot.drawing.pictures import Picture, pictures_of
from anomalib_ot.offline import offline_backbone

from .side_by_side import models, parts

NAMES = {"Pradot": "pradot", "Foct": "foct", "WtFlow": "wt_flow", "Duo": "duo"}
SHOTS = 4
# Number of missed anomalies and false alarms to show.
MISSED, FALSE = 3, 1
# Width in pixels of a figure in the model cards, which has 256 colours.
WIDTH = 900
FOCT_SIZE = (336, 336)


def main(
    names: list[str] = list(NAMES),  # noqa: B006 - jsonargparse shows the default, and nothing changes it
    output: Path = Path("docs"),
    root: Path = Path("results/failures"),
    seed: int = 0,
) -> None:
    """Train the models and draw their failures.

    Args:
        names: Models to run.
        output: Folder of the figures.
        root: Folder of the category.
        seed: Random seed.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    backbone = offline_backbone()
    # Foct has a different image size, that of its results.
    foct = {**parts(backbone), "pre_processor": Foct.configure_pre_processor(FOCT_SIZE, backbone)}
    build = {**models(backbone), "Foct": lambda: Foct(layers=("blocks.2", "blocks.4"), **foct)}
    for name in names:
        data: AnomalibDataModule = Assembly(root)
        if name == "Foct":
            data = FewShot(data, SHOTS, seed)
        print(f"{name}: {draw(build[name], data, seed, output / f'failures_{NAMES[name]}.png')}", flush=True)


def draw(build: Callable[[], AnomalibModule], data: AnomalibDataModule, seed: int, path: Path) -> str:
    """Train a model, draw its failures, and count them.

    Args:
        build: Creates the model.
        data: Images to fit and test on.
        seed: Random seed.
        path: PNG file to write.

    Returns:
        A text with the image AUROC and the number of anomalous images that score below a normal one.
    """
    model, result = measure(build, data, seed)
    pictures = list(pictures_of(model, data.test_data))
    scores, maps = score(model, pictures)
    anomalous = torch.tensor([bool(picture.label) for picture in pictures])
    missed, false = failures(scores, anomalous)
    shown = [*missed[:MISSED], *false[:FALSE]]
    # The colour scale ends at the highest score of a normal image.
    limits = (float(maps.min()), float(scores[~anomalous].max()))
    figure, rows = new_figure(2, len(shown), side=2.2)
    for column, index in enumerate(shown):
        picture, is_missed = pictures[index], bool(anomalous[index])
        others = scores[~anomalous] if is_missed else scores[anomalous]
        count = int((others > scores[index]).sum() if is_missed else (others < scores[index]).sum())
        title = f"scores below {count} normal ones" if is_missed else f"normal, above {count} anomalous"
        show_image(rows[0][column], picture.image, f"{picture.name}\n{title}", picture.mask)
        show_map(rows[1][column], maps[index], limits=limits)
    save(figure, path.with_suffix(""), ["png"])
    _shrink(path)
    return f"image AUROC {result['image_AUROC']:.1f}, {len(missed)} anomalous images score below a normal one"


@torch.inference_mode()
def score(model: AnomalibModule, pictures: list[Picture]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image scores (N,) and maps (N, h, w)."""
    outputs = [model.model.eval()(picture.prepared[None]) for picture in pictures]
    return torch.cat([each.pred_score for each in outputs]), torch.cat([each.anomaly_map[:, 0] for each in outputs])


def failures(scores: torch.Tensor, anomalous: torch.Tensor) -> tuple[list[int], list[int]]:
    """Find anomalous images that score below a normal one, and normal images that score above an anomalous one.

    Args:
        scores: Image scores, (N,).
        anomalous: Which images show an anomaly, Boolean (N,).

    Returns:
        Indices of the former, lowest score first, and of the latter, highest score first.
    """
    order = scores.argsort().tolist()
    missed = [index for index in order if anomalous[index] and scores[index] < scores[~anomalous].max()]
    false = [index for index in reversed(order) if not anomalous[index] and scores[index] > scores[anomalous].min()]
    return missed, false


def _shrink(path: Path) -> None:
    with Image.open(path) as image:
        height = round(image.height * WIDTH / image.width)
        small = image.convert("RGB").resize((WIDTH, height)).quantize(dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
