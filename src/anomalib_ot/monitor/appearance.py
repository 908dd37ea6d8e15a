"""What the light and the focus of an image are, without a model."""

from torch import Tensor

# Of the brightness, so that a black image has a sharpness.
_LEAST = 1 / 255


def appearance_of(image: Tensor) -> dict[str, float]:
    """Brightness and sharpness of an image.

    The brightness is the mean of its pixels. The sharpness is the mean absolute difference of neighbouring pixels, in
    units of the brightness, so that it hardly changes with the exposure.

    Args:
        image: The image (3, h, w) in [0, 1].

    Returns:
        The two numbers by name.
    """
    values = image.float()
    brightness = float(values.mean())
    differences = sum(float(values.diff(dim=side).abs().mean()) for side in (1, 2) if values.shape[side] > 1)
    return {"brightness": brightness, "sharpness": differences / (brightness + _LEAST)}
