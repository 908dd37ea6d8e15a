"""Pradot beside PaDiM and PatchCore on categories of real images.

Run as ``python -m benchmarks.categories --root DATA``, where DATA holds ``tray/breakfast_box`` in the layout of MVTec
LOCO AD, ``magnetic_tile`` in that of MVTec AD and ``screw`` with image labels alone. One configuration for all.
"""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule, Folder, MVTecAD
from jsonargparse import auto_cli

from anomalib_ot.comparison import measure
from anomalib_ot.data import MVTecLOCOAD
from anomalib_ot.offline import offline_backbone

from .rows import appended
from .side_by_side import models

CATEGORIES: dict[str, Callable[[Path], AnomalibDataModule]] = {
    "tray/breakfast_box": lambda root: MVTecLOCOAD(
        # Normalised scores are clipped at the range seen in validation; normal images alone would make ties of defects.
        root / "tray",
        "breakfast_box",
        num_workers=2,
        val_split_mode="same_as_test",
    ),
    "magnetic_tile": lambda root: MVTecAD(root, "magnetic_tile", num_workers=2),
    "screw": lambda root: Folder(
        "screw",
        root=root / "screw",
        normal_dir="train/good",
        abnormal_dir="test/defective",
        normal_test_dir="test/good",
        num_workers=2,
    ),
}
COLUMNS = ("category", "model", "seed", "image_AUROC", "pixel_AUROC", "pixel_AUPRO", "fit_s", "ms_per_image")


def main(
    root: Path,
    output: Path = Path("results/categories.csv"),
    categories: list[str] = list(CATEGORIES),  # noqa: B006 - jsonargparse shows the default, nothing changes it
    only: list[str] | None = None,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Measure the models and append a row for each to a CSV file.

    Args:
        root: Folder of the categories.
        output: CSV file.
        categories: Categories to run.
        only: Models to run, all by default.
        seed: Seed of everything random.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    packages = ", ".join(f"{name} {version(name)}" for name in ("anomalib-ot", "anomalib", "torch", "lightning", "POT"))
    print(f"{packages}, Python {platform.python_version()}, {threads} threads, seed {seed}")
    with appended(output, COLUMNS) as add:
        for category in categories:
            for name, build in models(offline_backbone()).items():
                if only and name not in only:
                    continue
                _, result = measure(build, CATEGORIES[category](root), seed)
                row = {"category": category, "model": name, "seed": seed}
                row.update({key: f"{value:.1f}" for key, value in result.items()})
                add(row)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
