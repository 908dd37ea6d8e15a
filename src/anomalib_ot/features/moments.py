"""Means and covariances of feature maps over images, and what they say about the images' alignment."""

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ROUNDING = 1e-6
"""Share of a variance that features in single precision cannot tell from zero."""


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


def principal_components(maps: Tensor, most: int) -> Tensor:
    """Principal components of centred maps.

    Args:
        maps: (N, P), with fewer maps than values.
        most: Largest number of components.

    Returns:
        Orthonormal components (P, K), those of the largest variances first.
    """
    values, vectors = torch.linalg.eigh((maps @ maps.mT).double())
    values, vectors = values.flip(0)[:most], vectors.flip(1)
    # Components without variance have no direction.
    values = values[values > ROUNDING * values[:1]]
    return maps.mT @ (vectors[:, : len(values)] / values.sqrt()).to(maps)


class Blocks(NamedTuple):
    """Square blocks of neighbouring cells of a grid; those at the end may be smaller.

    Attributes:
        grid: Height and width of the grid, in cells.
        side: Height and width of a block, in cells.
    """

    grid: tuple[int, int]
    side: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns of blocks."""
        return ceil(self.grid[0] / self.side), ceil(self.grid[1] / self.side)

    def gather(self, cells: Tensor) -> Tensor:
        """Collect what the cells of each block have.

        Args:
            cells: (H, W, N, E).

        Returns:
            (G, side² · N, E). Cells that a block at the end lacks are zero.
        """
        (rows, columns), side = self.shape, self.side
        if side > 1:
            missing = (0, columns * side - self.grid[1], 0, rows * side - self.grid[0])
            cells = F.pad(cells, (0, 0, 0, 0, *missing)).unflatten(0, (rows, side)).unflatten(2, (columns, side))
            cells = cells.transpose(1, 2).flatten(2, 4)
        return cells.flatten(0, 1)

    def scatter(self, values: Tensor) -> Tensor:
        """Reverse :meth:`gather`: from (G, side² · N, E) to (H, W, N, E)."""
        (rows, columns), side = self.shape, self.side
        values = values.unflatten(0, (rows, columns))
        if side > 1:
            values = values.unflatten(2, (side, side, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return values[: self.grid[0], : self.grid[1]]

    def sizes(self) -> Tensor:
        """Number of cells (G,) of each block."""
        rows, columns = (torch.arange(length).div(self.side, rounding_mode="floor").bincount() for length in self.grid)
        return (rows[:, None] * columns).flatten()


class Moments:
    """First and second moments of each cell's features over images.

    Neighbouring cells form blocks. The second moments are those of blocks, about the mean of each cell.

    Args:
        grid: Height and width of the maps, in cells.
        shift: Features (H·W, 1, E) that moments are taken about internally.
        longest_side: Largest number of blocks along a side.
    """

    def __init__(self, grid: torch.Size, shift: Tensor, longest_side: int) -> None:
        self.grid = grid
        self.shift = shift
        self.count = 0
        height, width = grid
        self.blocks = Blocks((height, width), ceil(max(grid) / longest_side))
        self._sizes = self.blocks.sizes().to(shift)
        self._total = torch.zeros_like(shift)
        channels = shift.shape[-1]
        self._outer = shift.new_zeros(len(self._sizes), channels, channels)

    def add(self, cells: Tensor) -> None:
        """Add the cells (H·W, B, E) of B images."""
        deviations = cells - self.shift
        self._total += deviations.sum(1, keepdim=True)
        block = self.blocks.gather(deviations.unflatten(0, self.grid))
        self._outer.baddbmm_(block.mT, block)
        self.count += cells.shape[1]

    def mean(self) -> Tensor:
        """Mean (H·W, 1, E) at each cell."""
        return self.shift + self._total / self.count

    def samples(self) -> Tensor:
        """Number of features (G,) of each block."""
        return self.count * self._sizes

    def covariance(self) -> Tensor:
        """Covariance (G, E, E) of each block."""
        mean = self.blocks.gather((self._total / self.count).unflatten(0, self.grid))
        return (self._outer / self.count - mean.mT @ mean) / self._sizes[:, None, None]


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
