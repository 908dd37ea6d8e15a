"""The categories of the benchmarks: the embedded one, the real ones of ``configs/compare/real.yaml``, or any others."""

from pathlib import Path
from typing import Any

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


def categories_in(root: Path | None) -> dict[str, dict[str, Any]]:
    """The embedded category and all categories in a folder, as ``class_path`` and ``init_args`` by name.

    Args:
        root: Folder with a folder for each category: in the layout of MVTec AD, the same without masks, or a folder
            with categories in the layout of MVTec LOCO AD, whose names are then those of the folder and the category.
            None for the embedded category only.
    """
    found: dict[str, dict[str, Any]] = {EMBEDDED: {"class_path": "anomalib_ot.Assembly"}}
    for folder in sorted(path for path in (root.iterdir() if root else ()) if path.is_dir()):
        if (folder / "ground_truth").is_dir():
            found[folder.name] = _config("anomalib.data.MVTecAD", folder.parent, category=folder.name)
        elif (folder / "test").is_dir():
            found[folder.name] = _folder(folder)
        for config in sorted(folder.glob("*/defects_config.json")):
            category = config.parent.name
            found[f"{folder.name}/{category}"] = _config("anomalib_ot.data.MVTecLOCOAD", folder, category=category)
    return found


def _folder(folder: Path) -> dict[str, Any]:
    """A category in the layout of MVTec AD without masks."""
    anomalous = sorted(f"test/{path.name}" for path in (folder / "test").iterdir() if path.name != "good")
    places = {"normal_dir": "train/good", "abnormal_dir": anomalous, "normal_test_dir": "test/good"}
    return _config("anomalib.data.Folder", folder, name=folder.name, **places)


def _config(class_path: str, root: Path, **settings: Any) -> dict[str, Any]:
    # With other modes, test images would be held out.
    shared = {"root": str(root), "num_workers": 0, "val_split_mode": "same_as_test"}
    return {"class_path": class_path, "init_args": {**shared, **settings}}
