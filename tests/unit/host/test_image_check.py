"""Grey images that anomalib's reader clipped."""

import numpy as np
import torch
from anomalib.data.utils import read_image
from PIL import Image
from torchvision.transforms.v2.functional import resize

from anomalib_ot.data import read_picture
from anomalib_ot.host.image_check import clipped_images
from anomalib_ot.images.blank import blank_images


def test_grey_images_that_were_clipped_at_255_are_found(tmp_path):
    # Half of the pixels are below 256, so that the clipped image has content.
    values = np.random.default_rng(0).integers(0, 512, (64, 64)).astype(np.uint16)
    files = {
        "deep": values,
        "bytes in words": values // 4,
        "byte": (values // 2).astype(np.uint8),
        "float": values.astype(np.float32),
    }
    paths = [str(tmp_path / f"{name}.tiff") for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        Image.fromarray(content).save(path)
    images = torch.stack([read_image(path, as_tensor=True) for path in paths])
    assert blank_images(images) == {}
    smaller = resize(images, [24, 24], antialias=True)
    assert clipped_images(images, paths) == clipped_images(smaller, paths) == [0, 3]
    right = torch.stack([read_picture(path, (0, 511)) for path in paths])
    assert clipped_images(right, paths) == []
    # Images without a file, and files that no longer exist, are no findings.
    assert clipped_images(images, [""] * 4) == []
