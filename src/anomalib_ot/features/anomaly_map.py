"""Anomaly maps from the score maps of layers."""

from collections.abc import Sequence
from functools import reduce

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import GaussianBlur2d
from anomalib.models.components.filters.blur import compute_kernel_size
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.settings import require, require_smoothing

from .extraction import full_precision, is_exporting


class AnomalyMapGenerator(nn.Module):
    """Upsamples the score map of each layer to the size of the image and adds the maps (PRADOT, section 3.2).

    Bilinear upsampling and a Gaussian filter are linear and separable. The map of a layer is therefore a product of
    three matrices: one for the rows, the scores, and one for the columns. This takes far less work than a convolution
    with a two-dimensional Gaussian.

    Args:
        smoothing: Standard deviation of a Gaussian filter over the map, in pixels, as in PatchCore; 0 for none, as in
            PRADOT.
        align_corners: Whether the centres of the corner cells are at the corners of the image, as in the authors' code.
            Otherwise they are half a cell inside, where a strided convolution puts them.

    Raises:
        ValueError: If ``smoothing`` is out of range.
    """

    def __init__(self, smoothing: float = 0.0, align_corners: bool = False) -> None:
        super().__init__()
        require_smoothing(smoothing)
        self.smoothing = smoothing
        self.align_corners = align_corners
        # Along the first dimension only.
        size = (compute_kernel_size(smoothing), 1)
        self.blur = GaussianBlur2d(smoothing, kernel_size=size) if smoothing else nn.Identity()

    def check_size(self, image_size: tuple[int, int] | torch.Size) -> None:
        """Check that images are not smaller than the Gaussian kernel, because the filter pads by reflection.

        Args:
            image_size: Height and width, in pixels.

        Raises:
            ValueError: If they are smaller.
        """
        height, width = image_size
        fits = compute_kernel_size(self.smoothing) // 2 < min(height, width)
        limit = (min(height, width) - 0.5) / 4
        require(fits, "smoothing", f"below {limit:g} pixels for images of {height} x {width}", self.smoothing)

    def forward(self, scores: Sequence[Tensor], image_size: tuple[int, int] | torch.Size) -> Tensor:
        """Compute the anomaly map.

        Args:
            scores: Score map (B, 1, H, W) of each layer, multiplied by the layer's weight.
            image_size: Height and width of the map, in pixels.

        Returns:
            ``(B, 1, *image_size)``.

        Raises:
            ValueError: As in :meth:`check_size`.
        """
        if not is_exporting():
            self.check_size(image_size)
        height, width = image_size
        with full_precision(scores[0]):
            maps = (
                self._matrix(score.shape[-2], height, score) @ score @ self._matrix(score.shape[-1], width, score).mT
                for score in scores
            )
            return reduce(torch.add, maps)

    def _matrix(self, cells: int, pixels: int, like: Tensor) -> Tensor:
        """Upsampling and smoothing along one dimension, as a matrix (pixels, cells)."""
        each = torch.eye(cells, dtype=like.dtype, device=like.device)[None, None]
        rows = F.interpolate(each, size=(pixels, cells), mode="bilinear", align_corners=self.align_corners)
        return self.blur(rows)[0, 0]


def by_maximum(anomaly_map: Tensor) -> InferenceBatch:
    """Anomaly maps (B, 1, h, w) with the image scores (B,), their maxima."""
    return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)).flatten(), anomaly_map=anomaly_map)
