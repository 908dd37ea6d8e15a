"""Read the images to explain from a data module or a folder."""

from argparse import ArgumentError
from functools import partial
from pathlib import Path
from typing import Any, cast

from anomalib.data import AnomalibDataModule

from anomalib_ot.data.full_range import images_read, reading_of, reading_of_images
from anomalib_ot.drawing.data import Data, Items, labels_of
from anomalib_ot.host.class_paths import create, rooted
from anomalib_ot.host.held_out import take_split
from anomalib_ot.host.splits import Split
from anomalib_ot.images.reading import EIGHT_BITS, Reading


def read_data(
    data: str | dict[str, Any], root: Path | None = None, split: Split | None = None, reading: Reading = EIGHT_BITS
) -> Data:
    """Find the images.

    Args:
        data: Data module, by class as for anomalib, or an image or a folder of images.
        root: Base folder of the data module's relative root.
        split: Split of the model's training, which is used again.
        reading: How the model's training read images; those of a bare folder are read alike, and a warning says if a
            data module reads otherwise.

    Returns:
        The images. For a folder, the training and held-out images are unknown.

    Raises:
        ValueError: If there is neither such a class nor such a path, or if there are no images.
    """
    config = {"class_path": data} if isinstance(data, str) else data
    try:
        module = create(AnomalibDataModule, config if root is None else rooted(config, root))
    except ArgumentError as error:
        if isinstance(data, str) and Path(data).exists():
            outside = partial(images_read, reading=reading)
            return Data(
                data,
                cast("Items", outside(data)),
                why_none="the held-out good images are known only for a data module",
                outside=outside,
            )
        msg = f"data must be a data module, an image or a folder: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    module.prepare_data()
    module.setup()
    if split is not None:
        take_split(module, split)
    now = reading_of_images(module.test_data)
    if now.is_deep:
        reading.warn_of(now, module.name)
    return data_of(module)


def data_of(module: AnomalibDataModule) -> Data:
    """The images of a data module after its set-up: its test, training and validation sets."""
    validation = getattr(module, "val_data", None)
    normal = [index for index, label in enumerate(labels_of(validation or ())) if label is False]
    held_out = cast("Any", validation).subsample(normal) if normal else ()
    why_none = "the validation set has no normal images" if validation else "the data has no validation set"
    return Data(
        module.name,
        cast("Items", module.test_data),
        cast("Items", module.train_data),
        held_out,
        "" if normal else why_none,
        partial(images_read, reading=reading_of(module.test_data), transform=module.test_augmentations),
    )
