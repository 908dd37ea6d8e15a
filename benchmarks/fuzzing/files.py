"""Files with changed bytes or content."""

import io
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from anomalib.data import PredictDataset
from PIL import Image
from torch import Tensor

from anomalib_ot import FewShot, comparison
from anomalib_ot.comparison.record import read_records
from anomalib_ot.data import FullRange, LOCODataset, MVTecLOCOAD, image_defects, read_defects
from anomalib_ot.data.reading import read_picture
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.preprocessing import normalization
from anomalib_ot.host.image_check import clipped_images
from anomalib_ot.images.blank import blank_images

from .mutation import Changed, altered, changed_text, mutated
from .samples import MODELS, PICTURES, SIZE

# All pixel modes of Pillow, and formats with more than eight bits or with several modes.
MODES = Image.MODES
FORMATS = ("PNG", "TIFF", "PPM", "BMP", "WEBP", "JPEG", "GIF", "TGA", "JPEG2000", "PCX", "SGI", "IM", "ICO", "DDS")


def picture(generator: random.Random, samples: Changed) -> None:
    """An image of any kind, read for training, few-shot training, testing and prediction, and at its full depth."""
    good = samples.root / "tray" / "train" / "good" / "000.png"
    content = _picture(generator, samples.root)
    samples.write(good, mutated(generator, content) if generator.random() < 0.7 else content)  # noqa: PLR2004
    value_range = generator.choice((None, None, (0, 255), (0, 4095), (-1, 1), (0, 1e300), (1, 0), (0, float("nan"))))
    data = MVTecLOCOAD(samples.root, "tray", num_workers=0)
    how = generator.randrange(6)
    if how == 0:
        LOCODataset(samples.root / "tray", "train")[0]
    elif how == 1:
        FewShot(data, 8).setup()
    elif how == 2:  # noqa: PLR2004
        image_defects(good)
    elif how == 3:  # noqa: PLR2004
        # The error names the range instead.
        samples.blamed = () if value_range else samples.blamed
        _check_picture(read_picture(good, value_range), good)
    elif how == 4:  # noqa: PLR2004
        samples.blamed = ()
        full = FullRange(data, value_range)
        full.setup()
        with _read_by_host():
            item = full.train_data[0]
        _check_picture(item.image, good)
    else:
        samples.blamed = ()
        with _read_by_host():
            item = PredictDataset(good)[0]
        _check_picture(item.image, good)


@contextmanager
def _read_by_host() -> Iterator[None]:
    """Accept any error of anomalib's reader, whether it names the file or not."""
    try:
        yield
    except Exception as error:
        msg = f"by the host: {error!r}"
        raise ValueError(msg) from error


def _check_picture(image: Tensor, path: Path) -> None:
    """Check the shape and range of an image, and run the checks of training on it."""
    assert image.shape[0] == 3, image.shape  # noqa: S101, PLR2004
    assert bool(((image >= 0) & (image <= 1)).all()), "values beyond black and white"  # noqa: S101
    blank_images(image[None])
    clipped_images(image[None], [str(path)])


def _picture(generator: random.Random, folder: Path) -> bytes:
    """An image in one of the formats, with 8-bit or other pixels."""
    if generator.random() < 0.3:  # noqa: PLR2004
        return (folder / f"plain.{generator.choice(PICTURES).lower()}").read_bytes()
    size = generator.choice(((64, 64), (64, 64), (1, 64), (64, 1), (1, 1)))
    numbers = np.random.default_rng(generator.getrandbits(32))
    if generator.random() < 0.2:  # noqa: PLR2004
        channels = generator.choice((1, 3, 4))
        pixels = numbers.integers(0, 2**16, (*size, channels), dtype=np.uint16)
        return cv2.imencode(generator.choice((".png", ".tiff")), pixels)[1].tobytes()
    file = io.BytesIO()
    # Some formats do not support some modes.
    with suppress(KeyError, OSError, ValueError):
        _of_mode(numbers, generator.choice(MODES), size).save(file, generator.choice(FORMATS))
        return file.getvalue()
    return (folder / "plain.png").read_bytes()


def _of_mode(numbers: np.random.Generator, mode: str, size: tuple[int, int]) -> Image.Image:
    if mode == "F":
        low, high = numbers.choice([(0, 1), (-1, 1), (0, 255), (0, 1e30), (0, np.inf), (0, np.nan)])
        values = numbers.choice([low, 0.5, high], size).astype(np.float32)
        return Image.fromarray(values)
    if mode == "I":
        return Image.fromarray(numbers.integers(-(2 ** int(numbers.integers(31))), 2**31 - 1, size, dtype=np.int32))
    count = len(Image.new(mode, (8, 8)).tobytes()) // 64 or 1
    rows = numbers.integers(0, 256, size[0] * size[1] * count, dtype=np.uint8)
    return Image.frombytes(mode, (size[1], size[0]), rows.tobytes())


def mask(generator: random.Random, samples: Changed) -> None:
    """A mask of a defect."""
    folder = samples.root / "tray" / "ground_truth" / "logical_anomalies" / "000"
    path = folder / "000.png"
    if generator.random() < 0.5:  # noqa: PLR2004
        samples.mutate(path, str(folder))
    else:
        file = io.BytesIO()
        pixels = generator.choices((0, 250, 255), (8, generator.random(), generator.random()), k=64 * 64)
        shape = generator.choice(((64, 64), (1, 4096), (64, 64)))
        Image.fromarray(np.array(pixels, np.uint8).reshape(shape)).save(file, generator.choice(("PNG", "BMP")))
        samples.write(path, file.getvalue(), str(folder))
    if generator.random() < 0.5:  # noqa: PLR2004
        read_defects(folder)
    else:
        data = LOCODataset(samples.root / "tray", "test")
        items = [data[index] for index in range(len(data))]
        assert all(item.gt_mask.shape == item.image.shape[-2:] for item in items)  # noqa: S101


def defects(generator: random.Random, samples: Changed) -> None:
    """The configuration of defects."""
    path = samples.root / "tray" / "defects_config.json"
    samples.write(path, changed_text(generator, json.loads(path.read_text()), json.dumps))
    # The cache uses the modification time, which two cases may share.
    os.utime(path, ns=(generator.getrandbits(60), generator.getrandbits(60)))
    for folder in (samples.root / "tray" / "ground_truth").glob("*/*"):
        found = read_defects(folder)
        assert bool((found.saturation > 0).all()), found.saturation  # noqa: S101


def checkpoint(generator: random.Random, samples: Changed) -> None:
    """A checkpoint with changed bytes or content."""
    name = generator.choice([*MODELS])
    path = samples.root / f"{name}.ckpt"
    if generator.random() < 0.4:  # noqa: PLR2004
        content = torch.load(path, weights_only=True)
        file = io.BytesIO()
        torch.save(_altered_checkpoint(generator, content), file)
        samples.write(path, file.getvalue())
        # The error may name a setting instead. Learned tensors of a wrong shape cannot always be recognised.
        samples.blamed = ()
        MODELS[name][0].load_from_checkpoint(path)
        return
    samples.mutate(path)
    model = MODELS[name][0].load_from_checkpoint(path).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, SIZE, SIZE)).anomaly_map.shape[0] == 2  # noqa: S101, PLR2004


def _altered_checkpoint(generator: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    part = generator.choice(("all", "state_dict", "state_dict", "hyper_parameters", "own"))
    if part == "all":
        return altered(generator, content)
    if part == "own":
        part = generator.choice([key for key in content if key not in {"state_dict", "hyper_parameters"}])
        return {**content, part: altered(generator, content[part])}
    if part == "hyper_parameters":
        return {**content, part: altered(generator, dict(content[part]))}
    tensors = dict(content[part])
    name = generator.choice([*tensors])
    tensors[name] = generator.choice((_cut, _double, torch.Tensor.bool, _none, _empty))(tensors[name])
    return {**content, part: tensors}


def _cut(tensor: Tensor) -> Tensor:
    return tensor[..., :-1] if tensor.dim() else tensor


def _double(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor])


def _none(_: Tensor) -> None:
    return None


def _empty(tensor: Tensor) -> Tensor:
    return tensor.new_empty(0)


def backbone(generator: random.Random, samples: Changed) -> None:
    """The folder of a backbone."""
    folder = samples.root / "backbone"
    path = generator.choice(sorted(folder.iterdir()))
    if path.suffix == ".json" and generator.random() < 0.6:  # noqa: PLR2004
        samples.write(path, changed_text(generator, json.loads(path.read_text()), json.dumps), str(folder))
    else:
        samples.mutate(path, str(folder))
    normalization(f"local-dir:{folder}")
    create_extractor(f"local-dir:{folder}", ["layer1"], pre_trained=generator.random() < 0.7)  # noqa: PLR2004


def kept_run(generator: random.Random, samples: Changed) -> None:
    """A saved run of a comparison."""
    runs = samples.root / "runs"
    path = generator.choice(sorted(path for path in runs.rglob("*") if path.is_file()))
    folder = str(path.parent)
    if path.suffix == ".json" and generator.random() < 0.7:  # noqa: PLR2004
        samples.write(path, changed_text(generator, json.loads(path.read_text()), json.dumps), folder)
    else:
        samples.mutate(path, folder)
    (record,) = read_records(runs)
    found = record.predictions
    assert found.maps is None or len(found.maps) == len(found.scores)  # noqa: S101
    comparison.write_report([record], samples.root / "report", "Report", None, [])
