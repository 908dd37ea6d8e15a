"""From the scores of cells to an anomaly map."""

from collections.abc import Sequence
from functools import reduce

import torch
from anomalib.models.components import GaussianBlur2d
from anomalib.models.components.filters.blur import compute_kernel_size
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.settings import require, require_smoothing

from .extraction import full_precision, is_exporting


class AnomalyMapGenerator(nn.Module):
    """Upsamples the score map of each layer to the image and adds them up (PRADOT, section 3.2).

    Bilinear upsampling and a Gaussian are linear and act on rows and columns one after the other. So a map is its
    scores between two matrices, one for the rows and one for the columns, with far less work than the convolution with
    a Gaussian of two dimensions.

    Args:
        smoothing: Standard deviation of a Gaussian over the result, in pixels, as PatchCore has it; 0 for none, as in
            PRADOT.
        align_corners: Whether the corner cells lie on the corners of the image, as in the authors' code, rather than
            half a cell inside it, where a strided convolution puts them.
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
        """Refuse pictures that are smaller than the Gaussian, which is mirrored at their edges.

        Args:
            image_size: Height and width, in pixels.

        Raises:
            ValueError: If they are.
        """
        height, width = image_size
        fits = compute_kernel_size(self.smoothing) // 2 < min(height, width)
        limit = (min(height, width) - 0.5) / 4
        require(fits, "smoothing", f"below {limit:g} pixels for pictures of {height} x {width}", self.smoothing)

    def forward(self, scores: Sequence[Tensor], image_size: tuple[int, int] | torch.Size) -> Tensor:
        """Compute the anomaly map.

        Args:
            scores: Score map (B, 1, H, W) of each layer, already multiplied by its weight.
            image_size: Height and width of the map, in pixels.

        Returns:
            ``(B, 1, *image_size)``.

        Raises:
            ValueError: As :meth:`check_size`.
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
        """What upsampling and smoothing make of each cell along one dimension, (pixels, cells)."""
        each = torch.eye(cells, dtype=like.dtype, device=like.device)[None, None]
        rows = F.interpolate(each, size=(pixels, cells), mode="bilinear", align_corners=self.align_corners)
        return self.blur(rows)[0, 0]
