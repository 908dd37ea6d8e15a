"""Deviation of whitened features from their mean at each cell, which complements prototypes on aligned images."""

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn

from anomalib_ot.features.extraction import full_precision
from anomalib_ot.features.moments import nearest_cells
from anomalib_ot.features.whitening import LocalWhitening


class Deviation(DynamicBufferMixin, nn.Module):
    """Distance of each whitened feature from the mean at its cell, the Mahalanobis distance of PaDiM.

    Prototypes are compared by cosine, which ignores how far a feature is from normal ones. On aligned images this
    distance separates more; elsewhere the mean of a cell says nothing, and prototypes separate more.

    Example:
        >>> whitening = LocalWhitening()
        >>> whitening.update(torch.randn(16, 4, 3, 3))
        >>> whitening.compute()
        >>> deviation = Deviation()
        >>> deviation.fit(whitening)
        >>> deviation(whitening(torch.randn(2, 4, 3, 3))).shape
        torch.Size([2, 1, 3, 3])
    """

    centre: Tensor
    share: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Whitened mean at each cell, (H, W, E); empty until fitted.
        self.register_buffer("centre", torch.empty(0, dtype=torch.float32))
        # Share of the deviation in the scores of its layer; the prototypes have the remainder.
        self.register_buffer("share", torch.zeros((), dtype=torch.float32))

    def fit(self, whitening: LocalWhitening) -> None:
        """Take the mean from a whitening that was just computed, and the share from how aligned its images are."""
        mean = whitening.mean.flatten(0, 2).mT[None]
        with full_precision(mean):
            self.centre = whitening.whiten(mean, *whitening.mean.shape[:2])[0].permute(1, 2, 0)
        self.share.fill_(whitening.aligned_share)

    def forward(self, white: Tensor) -> Tensor:
        """Compute the distances.

        Args:
            white: Whitened feature maps (B, E, H, W). In a map of another size than in training, each cell uses the
                mean of the nearest cell.

        Returns:
            (B, 1, H, W).
        """
        centre = nearest_cells(self.centre, *white.shape[-2:]).permute(2, 0, 1)
        return torch.linalg.vector_norm(white - centre, dim=1, keepdim=True)
