"""Read the pictures to explain from a data module or a folder."""

from argparse import ArgumentError
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from anomalib.data import AnomalibDataModule, PredictDataset

from anomalib_ot.data.full_range import FullRangePredictDataset
from anomalib_ot.data.wrapped import WrappedDataModule
from anomalib_ot.drawing.data import Data, Items, labels_of
from anomalib_ot.host.class_paths import create, rooted
from anomalib_ot.host.held_out import take_split
from anomalib_ot.host.splits import Split


def read_data(data: str | dict[str, Any], root: Path | None = None, split: Split | None = None) -> Data:
    """Find pictures.

    Args:
        data: Data module, by class as for anomalib, or a picture or a folder of them.
        root: Folder that the data module's relative root is meant from.
        split: The split that the model was trained with, which is used again.

    Returns:
        The pictures; of a folder nothing more is known.

    Raises:
        ValueError: If there is neither such a class nor such a path, or no pictures.
    """
    config = {"class_path": data} if isinstance(data, str) else data
    try:
        module = create(AnomalibDataModule, config if root is None else rooted(config, root))
    except ArgumentError as error:
        if isinstance(data, str) and Path(data).exists():
            return Data(
                data,
                cast("Items", PredictDataset(data)),
                why_none="which good pictures were held out is known of a data module alone",
            )
        msg = f"data is neither a data module nor a picture or a folder: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    module.prepare_data()
    module.setup()
    if split is not None:
        take_split(module, split)
    return data_of(module)


def data_of(module: AnomalibDataModule) -> Data:
    """The pictures of a data module that is set up: its test, training and validation sets."""
    validation = getattr(module, "val_data", None)
    normal = [index for index, label in enumerate(labels_of(validation or ())) if label is False]
    held_out = cast("Any", validation).subsample(normal) if normal else ()
    why_none = "the validation set has no normal pictures" if validation else "the data have no validation set"
    return Data(
        module.name,
        cast("Items", module.test_data),
        cast("Items", module.train_data),
        held_out,
        "" if normal else why_none,
        _reader(module),
    )


def _reader(module: AnomalibDataModule) -> Callable[[Path], Any]:
    """What reads other pictures as a data module reads its test pictures."""
    inner = module
    while isinstance(inner, WrappedDataModule) and not hasattr(inner, "value_range"):
        inner = inner.datamodule
    if hasattr(inner, "value_range"):
        return partial(FullRangePredictDataset, transform=module.test_augmentations, value_range=inner.value_range)
    return partial(PredictDataset, transform=module.test_augmentations)
