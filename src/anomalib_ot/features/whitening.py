"""Local whitening of feature maps: at each cell, directions in which normal images vary get less weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn

from anomalib_ot.settings import require_finite, require_whole

from .extraction import full_precision


class LocalWhitening(DynamicBufferMixin, nn.Module):
    """Multiplies the feature of each cell by the inverse square root of the covariance at this cell.

    PaDiM (Defard et al., 2021, arXiv 2011.08785) measures deviations at a cell by the covariance at this cell.
    Whitening makes this covariance available to any model that compares features by cosine: the cosine between whitened
    features is that of the inner product zᵀ Σ⁻¹ z′. Features are not centred for this purpose, so that the cosine near
    the mean stays well defined. If they are centred, normal features have zero mean and about unit variance, and their
    squared norm is PaDiM's squared score.

    The covariance at a cell is estimated from one feature of each image, which are few samples. It is therefore mixed
    with the covariance pooled over all cells, which counts as ``prior`` · D additional images (the posterior mean under
    an inverse-Wishart prior). A share of the mean variance is added to each direction. Features with more than
    ``max_channels`` channels are first projected to ``max_channels`` random orthonormal directions, the same in each
    run; PaDiM similarly keeps a random subset of the channels.

    Args:
        max_channels: Largest number of channels to keep, at least 1.
        shrinkage: Share of the mean variance that is added to each direction, at least 0.
        prior: Number of images that the pooled covariance counts as, as a share of D, at least 0.
        centred: Whether to subtract the mean at each cell.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> maps = torch.randn(32, 4, 3, 3) * torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1, 1)
        >>> whitening = LocalWhitening()
        >>> whitening.update(maps)
        >>> whitening.compute()
        >>> bool((whitening(maps).std((0, 2, 3)) < 2).all())
        True
    """

    projection: Tensor
    matrices: Tensor
    mean: Tensor

    def __init__(
        self,
        max_channels: int = 128,
        shrinkage: float = 0.1,
        prior: float = 1.0,
        centred: bool = False,
    ) -> None:
        super().__init__()
        require_whole(1, "whitened_channels", max_channels)
        require_finite(shrinkage >= 0, "shrinkage", "at least 0", shrinkage)
        require_finite(prior >= 0, "prior", "at least 0", prior)
        self.max_channels = max_channels
        self.shrinkage = shrinkage
        self.prior = prior
        self.centred = centred
        # (E, D), (H, W, E, E) and, if centred, (H, W, 1, E); empty until fitted.
        self.register_buffer("projection", torch.empty(0, dtype=torch.float32))
        self.register_buffer("matrices", torch.empty(0, dtype=torch.float32))
        self.register_buffer("mean", torch.empty(0, dtype=torch.float32), persistent=centred)
        self._moments: _Moments | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether there are covariances, from training or from a checkpoint."""
        return self.matrices.numel() > 0

    @torch.no_grad()
    def update(self, maps: Tensor) -> None:
        """Add the feature maps (B, D, H, W) of a batch of training images; all batches have the same H and W."""
        if self._moments is None:
            self._choose_directions(maps)
        with full_precision(maps):
            cells = self._project(maps).permute(2, 0, 1).double()
        if self._moments is None:
            # Moments about the first batch's mean avoid the cancellation of moments about zero.
            self._moments = _Moments(maps.shape[-2:], cells.mean(1, keepdim=True))
        self._moments.add(cells)

    @torch.no_grad()
    def compute(self) -> None:
        """Estimate the covariances from all batches.

        Raises:
            RuntimeError: If there was no batch.
        """
        if self._moments is None:
            msg = "there are no features to estimate the whitening from: call update first"
            raise RuntimeError(msg)
        local = self._moments.covariance()
        count, prior = self._moments.count, self.prior * local.shape[-1]
        with _one_thread():
            values, vectors = torch.linalg.eigh((count * local + prior * local.mean(0)) / (count + prior))
        values = values.clamp(min=0)
        floor = self.shrinkage * values.mean(1, keepdim=True)
        # If all images are equal, all variances are 0 and the features stay as they are.
        scales = (values + torch.where(floor > 0, floor, 1.0)).rsqrt()
        self.matrices = ((vectors * scales[:, None]) @ vectors.mT).float().unflatten(0, self._moments.grid)
        if self.centred:
            self.mean = self._moments.mean().float().unflatten(0, self._moments.grid)
        self._moments = None

    def forward(self, maps: Tensor) -> Tensor:
        """Whiten feature maps.

        Args:
            maps: (B, D, H, W). In a map of another size than in training, each cell uses the mean and covariance of the
                nearest cell.

        Returns:
            (B, E, H, W) in float32.

        Raises:
            RuntimeError: If there are no covariances yet.
        """
        if not self.is_fitted:
            msg = "features cannot be whitened yet: fit the model, or load a checkpoint"
            raise RuntimeError(msg)
        height, width = maps.shape[-2:]
        with full_precision(maps):
            projected = self._project(maps)
            if self.centred:
                projected = projected - nearest_cells(self.mean, height, width).flatten(0, 2).mT
            matrices = nearest_cells(self.matrices, height, width).flatten(0, 1)
            # The matrices are symmetric. OpenVINO is faster with them on the left, where it does not pack them as
            # weights.
            return (matrices @ projected.permute(2, 1, 0)).permute(2, 1, 0).unflatten(2, (height, width))

    def _choose_directions(self, maps: Tensor) -> None:
        channels = maps.shape[1]
        directions = torch.eye(channels)
        if channels > self.max_channels:
            noise = torch.randn(channels, self.max_channels, generator=torch.Generator().manual_seed(0))
            directions = torch.linalg.qr(noise).Q.T.contiguous()
        self.projection = directions.to(maps.device)

    def _project(self, maps: Tensor) -> Tensor:
        """The maps in the kept directions, (B, E, H·W)."""
        cells = maps.float().flatten(2)
        return self.projection @ cells if len(self.projection) < self.projection.shape[1] else cells


def nearest_cells(grid: Tensor, height: int, width: int) -> Tensor:
    """Resample a grid to another size, with the value of the nearest cell.

    Args:
        grid: (H, W, ...).
        height: Number of rows of the result.
        width: Number of columns of the result.

    Returns:
        (height, width, ...); ``grid`` itself if it has this size.
    """
    if grid.shape[:2] == (height, width):
        return grid
    row, column = (
        torch.linspace(0, ours - 1, theirs, device=grid.device).round().long()
        for ours, theirs in zip(grid.shape, (height, width), strict=False)
    )
    return grid[row[:, None], column]


_THREADS = Lock()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run LAPACK on one thread: on many small matrices, several threads mostly wait for each other."""
    # The number of threads is a setting of the process: two trainings at once would restore each other's value.
    with _THREADS:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class _Moments:
    """First and second moments of each cell's features over images, about a fixed shift (H·W, 1, E)."""

    def __init__(self, grid: torch.Size, shift: Tensor) -> None:
        self.grid = grid
        self.shift = shift
        self.count = 0
        self.total = torch.zeros_like(shift)
        self.outer = (shift.mT @ shift).zero_()

    def add(self, cells: Tensor) -> None:
        """Add the cells (H·W, B, E) of B images."""
        deviations = cells - self.shift
        self.total += deviations.sum(1, keepdim=True)
        self.outer.baddbmm_(deviations.mT, deviations)
        self.count += cells.shape[1]

    def mean(self) -> Tensor:
        """Mean (H·W, 1, E) at each cell."""
        return self.shift + self.total / self.count

    def covariance(self) -> Tensor:
        """Covariance (H·W, E, E) at each cell."""
        mean = self.total / self.count
        return self.outer / self.count - mean.mT @ mean
