"""Anomaly map of PRADOT."""

from collections.abc import Sequence

import torch
from anomalib.models.components import GaussianBlur2d
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class AnomalyMapGenerator(nn.Module):
    """Upsamples the score map of each layer to the image and adds them up (paper, section 3.2).

    Args:
        smoothing: Standard deviation of a Gaussian over the result, in pixels, as PatchCore has it; 0 for none, as in
            the paper.
        align_corners: Whether the corner cells lie on the corners of the image, as in the authors' code, rather than
            half a cell inside it, where a strided convolution puts them.
    """

    def __init__(self, smoothing: float = 0.0, align_corners: bool = False) -> None:
        super().__init__()
        if smoothing < 0:
            msg = f"smoothing must be at least 0, not {smoothing}"
            raise ValueError(msg)
        self.align_corners = align_corners
        self.blur = GaussianBlur2d(sigma=smoothing) if smoothing else nn.Identity()

    def forward(self, scores: Sequence[Tensor], image_size: tuple[int, int] | torch.Size) -> Tensor:
        """Compute the anomaly map.

        Args:
            scores: Score map (B, 1, H, W) of each layer, already multiplied by its weight.
            image_size: Height and width of the map, in pixels.

        Returns:
            (B, 1, *image_size).
        """
        maps = [
            F.interpolate(score, size=image_size, mode="bilinear", align_corners=self.align_corners) for score in scores
        ]
        return self.blur(torch.stack(maps).sum(0))
