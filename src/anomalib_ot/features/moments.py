"""Means and covariances of feature maps over images, and what they say about the images' alignment."""

from math import ceil

import torch
from torch import Tensor

# Share of the largest variance that single precision cannot tell from zero.
_ROUNDING = 1e-6


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


def principal_components(maps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Principal components of centred maps.

    Args:
        maps: (N, P), with fewer maps than values.
        most: Largest number of components.

    Returns:
        Orthonormal components (P, K), those of the largest variances first, and their variances (K,) in float64.
    """
    values, vectors = torch.linalg.eigh((maps @ maps.mT).double())
    values, vectors = values.flip(0)[:most], vectors.flip(1)
    # Components without variance have no direction.
    values = values[values > _ROUNDING * values[:1]]
    return maps.mT @ (vectors[:, : len(values)] / values.sqrt()).to(maps.dtype), values / len(maps)


class Moments:
    """First and second moments of each cell's features over images, and some of the maps.

    Neighbouring cells form blocks. The second moments are those of blocks, about the mean of each cell.

    Args:
        grid: Height and width of the maps, in cells.
        shift: Features (H·W, 1, E) that moments are taken about internally.
        longest_side: Largest number of blocks along a side.
        most_maps: Largest number of maps to keep, evenly spaced among all.
    """

    def __init__(self, grid: torch.Size, shift: Tensor, longest_side: int, most_maps: int = 0) -> None:
        self.grid = grid
        self.shift = shift
        self.count = 0
        side = ceil(max(grid) / longest_side)
        self.block_grid = torch.Size(ceil(each / side) for each in grid)
        blocks = torch.arange(self.block_grid.numel(), device=shift.device).view(self.block_grid)
        self._blocks = nearest_cells(blocks, *grid).flatten()
        self._sizes = self._blocks.bincount().to(shift.dtype)
        self._most_maps = most_maps
        self._kept: list[Tensor] = []
        self._spacing = 1
        self._total = torch.zeros_like(shift)
        channels = shift.shape[-1]
        self._outer = shift.new_zeros(self.block_grid.numel(), channels, channels)

    def add(self, cells: Tensor) -> None:
        """Add the cells (H·W, B, E) of B images."""
        deviations = cells - self.shift
        self._total += deviations.sum(1, keepdim=True)
        self._outer.index_add_(0, self._blocks, deviations.mT @ deviations)
        for each in cells.unbind(1):
            self._keep(each)
            self.count += 1

    def _keep(self, cells: Tensor) -> None:
        if self._most_maps and self.count % self._spacing == 0:
            self._kept.append(cells.flatten().float())
        if len(self._kept) > self._most_maps:
            self._kept = self._kept[::2]
            self._spacing *= 2

    def maps(self) -> Tensor:
        """The kept maps (N, H·W·E), cell by cell."""
        return torch.stack(self._kept)

    def mean(self) -> Tensor:
        """Mean (H·W, 1, E) at each cell."""
        return self.shift + self._total / self.count

    def samples(self) -> Tensor:
        """Number of features (G,) of each block."""
        return self.count * self._sizes

    def by_block(self, values: Tensor) -> Tensor:
        """Means (G, ...) over the cells of each block, of values (H·W, ...)."""
        sums = values.new_zeros(len(self._sizes), *values.shape[1:]).index_add_(0, self._blocks, values)
        return sums / self._sizes.view(-1, *[1] * (values.ndim - 1))

    def covariance(self) -> Tensor:
        """Covariance (G, E, E) of each block."""
        mean = self._total / self.count
        return self._outer / self.samples()[:, None, None] - self.by_block(mean.mT @ mean)


def share_of_alignment(moments: Moments) -> float:
    """How much of what images have in common is at fixed positions.

    Let a be the share of the features' variance that their position explains (the coefficient of determination; the
    variance within a position is estimated without bias). Parts in a fixed pose give 0.7 and more, textures and parts
    in any pose 0.1 to 0.3. The odds a : (1 − a) are squared, so that what explains less than half counts little.

    Args:
        moments: Moments of at least one image.

    Returns:
        a² / (a² + (1 − a)²), from 0 to 1; 0 for one image, or images without any variance.
    """
    if moments.count < 2:  # noqa: PLR2004 - one image has no variance between images
        return 0.0
    variances = moments.covariance().diagonal(dim1=1, dim2=2).sum(1)
    within = float((moments.samples() * variances).sum()) / moments.count
    mean = moments.mean()
    between = float((mean - mean.mean(0)).square().sum())
    if between + within <= 0:
        return 0.0
    explained = max(0.0, 1 - within * moments.count / (moments.count - 1) / (between + within))
    return explained**2 / (explained**2 + (1 - explained) ** 2)
