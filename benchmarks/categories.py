"""The categories of the benchmarks: the embedded one and the real ones of ``configs/compare/real.yaml``."""

from pathlib import Path

from anomalib.data import AnomalibDataModule

from anomalib_ot.comparison import read_plan

EMBEDDED = "Assembly"
CATEGORIES = (EMBEDDED, "screw", "tray", "magnetic_tile")


def open_category(name: str, root: Path | None = None) -> AnomalibDataModule:
    """Set up the data module of a category, with its whole test set.

    Args:
        name: One of ``CATEGORIES``.
        root: Folder of the real categories; see the plan.

    Raises:
        ValueError: If a real category has no root.
    """
    if name != EMBEDDED and root is None:
        msg = f"{name} needs the folder of the real categories; set --root"
        raise ValueError(msg)
    job = read_plan("real", data=[name], root=None if name == EMBEDDED else root).jobs()[0]
    data = job.create_data()
    data.val_split_mode = type(data.val_split_mode)("same_as_test")
    data.prepare_data()
    data.setup()
    return data
