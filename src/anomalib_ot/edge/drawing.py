"""Images with what a model says of them drawn on them."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .inferencer import Prediction

# Colours of a heat map from 0 to 1, and their opacity. The threshold of maps is at 0.5.
_STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COLOURS = ((0, 0, 160), (0, 160, 255), (60, 230, 120), (255, 200, 0), (230, 0, 0))
_OPACITY = (0.0, 0.1, 0.35, 0.5, 0.6)
_CONTOUR = (255, 0, 255)
# Width of a contour, in shares of the longer side of an image.
_WIDTH = 1 / 400


def overlay(pixels: NDArray[np.float32], prediction: Prediction) -> Image.Image:
    """Draw the heat map and the contour of the mask on an image.

    Args:
        pixels: RGB pixels (H, W, 3) in [0, 1].
        prediction: The prediction for the image.

    Returns:
        The drawing, of the image's size.
    """
    return drawn_on(pixels, prediction.anomaly_map, prediction.mask)


def drawn_on(
    pixels: NDArray[np.float32], anomaly_map: NDArray[np.float32] | None, mask: NDArray[np.bool_] | None = None
) -> Image.Image:
    """Draw a heat map and the contour of a mask on an image.

    Maps with values outside [0, 1], those of a model without normalisation, are stretched to this range.

    Args:
        pixels: RGB pixels (H, W, 3) in [0, 1].
        anomaly_map: Map (h, w), None to draw none.
        mask: Mask (h, w), None to draw none.

    Returns:
        The drawing, of the image's size.
    """
    drawn = np.array(pixels, np.float32)
    if anomaly_map is not None:
        heat = _enlarged(_in_unit_range(anomaly_map), drawn.shape[:2])
        opacity = np.interp(heat, _STOPS, _OPACITY).astype(np.float32)[..., None]
        colours = np.dstack([np.interp(heat, _STOPS, channel) for channel in zip(*_COLOURS, strict=True)])
        drawn += opacity * (colours.astype(np.float32) / 255 - drawn)
    picture = Image.fromarray((drawn * 255).round().clip(0, 255).astype(np.uint8))
    if mask is not None and mask.any():
        picture.paste(_CONTOUR, mask=_contour(mask, picture.size))
    return picture


def _in_unit_range(values: NDArray[np.float32]) -> NDArray[np.float32]:
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    # A pixel that is NaN counts as an infinite one.
    values = np.nan_to_num(values, nan=np.inf)
    if low >= 0 and high <= 1:
        return values.clip(0, 1)
    return (values.clip(low, high) - low) / ((high - low) or 1)


def _enlarged(values: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    height, width = size
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


def _contour(mask: NDArray[np.bool_], size: tuple[int, int]) -> Image.Image:
    """The inner border of a mask at the size of an image, width and height."""
    enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    thickness = max(1, round(max(size) * _WIDTH))
    # A margin of background, so that a region at the edge of the image has a border there.
    framed = Image.new("L", (size[0] + 2, size[1] + 2))
    framed.paste(enlarged, (1, 1))
    inside = framed.filter(ImageFilter.MinFilter(2 * thickness + 1)).crop((1, 1, size[0] + 1, size[1] + 1))
    enlarged.paste(0, mask=inside)
    return enlarged
