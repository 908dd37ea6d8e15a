"""Couplings: the pairing of noise and data in flow matching.

A coupling is an object that is called with a batch of data and a batch of noise and returns the noise in the order of
its partners. Flow matching then regresses the velocity between partners, whichever coupling paired them.

For data x_1 … x_N and noise z_1 … z_N the *optimal* coupling is the permutation σ that minimises
``Σ_i |x_i − z_σ(i)|²`` (optimal-transport flow matching: Tong et al., 2024, arXiv 2302.00482; Pooladian et al., 2023,
arXiv 2304.14772), and the *worst* one maximises it (WT-Flow: Li et al., 2025, arXiv 2508.05461). Both depend only on
the inner products ⟨x_i, z_j⟩.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ._arguments import require_floats

CouplingName = Literal["independent", "optimal", "worst"]
Scope = Literal["positions", "maps"]
Solver = Literal["auto", "exact", "greedy"]

# Largest default block size, in points. Blocks of eight times as many points make partners a quarter more similar or
# dissimilar, and take ten times as long.
_BLOCK = 128
# Step limit for POT's network simplex, enough for any block.
_PIVOTS = 10**7
# Largest block, in points, for which the Hungarian method is faster than the greedy one on the CPU.
_EXACT = 1024


class Coupling(Protocol):
    """Pairs noise with data."""

    def __call__(self, data: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Order the noise by its partners.

        Args:
            data: (B, C, H, W).
            noise: (B, C, H, W).
            generator: Source of randomness, on the tensors' device; torch's default generator by default.

        Returns:
            (B, C, H, W), the noise paired with each of the data.
        """
        ...

    def check(self, shape: Sequence[int]) -> None:
        """Check that batches of shape (B, C, H, W) can be paired.

        Raises:
            ValueError: If they cannot.
        """
        ...


class IndependentCoupling:
    """Leaves data and noise in the order in which they were drawn.

    Example:
        >>> data, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
        >>> IndependentCoupling()(data, noise) is noise
        True
    """

    def __call__(self, data: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the noise unchanged."""
        del data, generator
        return noise

    def check(self, shape: Sequence[int]) -> None:
        """Accept batches of any shape."""


class OptimalCoupling:
    """Pairs data and noise at minimum transport cost, within random blocks.

    Args:
        scope: Points to assign: ``positions`` are the cells of all maps of a batch, ``maps`` are whole maps.
        block_size: Number of points in a block, a divisor of the number of points in a batch. The time of an assignment
            grows with its square (``greedy``) or cube (``exact``). 0 uses the batch as one block, None the largest
            divisor up to 128.
        solver: ``exact`` is the Hungarian method, on the CPU. ``greedy`` joins pairs that are each other's best until
            none is left, on the tensors' device and without synchronising with it. ``auto`` is exact for blocks of up
            to 1024 points on the CPU, and greedy otherwise.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> data = torch.tensor([3.0, -1.0]).view(2, 1, 1, 1)
        >>> noise = torch.tensor([-2.0, 1.0]).view(2, 1, 1, 1)
        >>> OptimalCoupling("maps")(data, noise).flatten().tolist()
        [1.0, -2.0]
    """

    _sign = 1

    def __init__(
        self,
        scope: Scope = "positions",
        block_size: int | None = None,
        solver: Solver = "auto",
    ) -> None:
        _check(scope, block_size, solver)
        self.scope = scope
        self.block_size = block_size
        self.solver = solver

    @torch.no_grad()
    def __call__(self, data: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Order the noise by its partners.

        Args:
            data: (B, C, H, W).
            noise: (B, C, H, W).
            generator: Source of randomness, on the tensors' device; torch's default generator by default.

        Returns:
            (B, C, H, W), the noise paired with each of the data.

        Raises:
            TypeError: If data or noise is not a tensor.
            ValueError: If the shapes differ or do not have four dimensions, or if the block size does not divide the
                number of points.
        """
        points, partners = self._pair_of_points(data, noise)
        blocks = self._blocks(points, generator)
        chosen = self._assign(self._gains(points[blocks], partners[blocks]))
        paired = torch.empty_like(partners)
        paired[blocks] = partners[blocks.gather(1, chosen)]
        if self.scope == "maps":
            return paired.view_as(noise)
        batch, channels, height, width = noise.shape
        return paired.view(batch, height, width, channels).permute(0, 3, 1, 2)

    @torch.no_grad()
    def gap(self, data: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> float:
        """Relative gap between the solver and the exact assignment of POT's ``ot.emd2``, within the same blocks.

        Args:
            data: (B, C, H, W).
            noise: (B, C, H, W).
            generator: Source of randomness, as in a call.

        Returns:
            1 − the ratio of the sum of ⟨data, noise⟩ to that of the exact assignment; 0 if the solver is exact.
        """
        points, partners = self._pair_of_points(data, noise)
        blocks = self._blocks(points, generator)
        gains = self._gains(points[blocks], partners[blocks])
        ours, best = float(gains.gather(2, self._assign(gains)[..., None]).double().sum()), _highest_gain(gains)
        # If the exact assignment gains nothing, as for maps of zeros, there is no gap.
        return 1 - ours / best if best else 0.0

    def check(self, shape: Sequence[int]) -> None:
        """Check that the block size divides the number of points in a batch.

        Args:
            shape: (B, C, H, W).

        Raises:
            ValueError: If it does not.
        """
        self._size_of_blocks(shape[0] if self.scope == "maps" else shape[0] * shape[2] * shape[3])

    def _size_of_blocks(self, count: int) -> int:
        if self.block_size is None:
            return max(size for size in range(1, min(count, _BLOCK) + 1) if count % size == 0)
        size = self.block_size or count
        if count % size:
            msg = f"block_size {size} does not divide the {count} {self.scope} of a batch; choose a divisor or 0"
            raise ValueError(msg)
        return size

    def _pair_of_points(self, data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        require_floats(data=data, noise=noise)
        for name, maps in (("data", data), ("noise", noise)):
            if maps.ndim != 4:  # noqa: PLR2004 - the dimensions in the message
                msg = f"{name} must be of shape (B, C, H, W), not {tuple(maps.shape)}"
                raise ValueError(msg)
        points, partners = self._points(data), self._points(noise)
        if points.shape != partners.shape:
            msg = f"data of shape {tuple(data.shape)} cannot be paired with noise of shape {tuple(noise.shape)}"
            raise ValueError(msg)
        return points, partners

    def _points(self, maps: Tensor) -> Tensor:
        """The points to assign, (N, D)."""
        return maps.flatten(1) if self.scope == "maps" else maps.permute(0, 2, 3, 1).flatten(0, 2)

    def _blocks(self, points: Tensor, generator: torch.Generator | None) -> Tensor:
        """Indices of the points of each block, (K, n)."""
        count = len(points)
        size = self._size_of_blocks(count)
        if size == count:
            return torch.arange(count, device=points.device)[None]
        return torch.randperm(count, generator=generator, device=points.device).view(-1, size)

    def _gains(self, points: Tensor, partners: Tensor) -> Tensor:
        """Gain of each pair, (K, n, n), in single precision even under autocast."""
        with torch.autocast(points.device.type, enabled=False):
            return self._sign * points.float() @ partners.float().mT

    def _assign(self, gains: Tensor) -> Tensor:
        """Index of the partner of each point within its block, (K, n), for gains (K, n, n)."""
        is_exact = self.solver == "exact" or (
            self.solver == "auto" and gains.device.type == "cpu" and gains.shape[-1] <= _EXACT
        )
        return _exact_assignment(gains) if is_exact else _greedy_assignment(gains)


class WorstCoupling(OptimalCoupling):
    """Pairs data and noise at maximum transport cost, within random blocks (WT-Flow).

    In high dimensions all noise vectors have about the same norm, so the worst partner is the one that points most in
    the opposite direction. Arguments and errors are those of :class:`OptimalCoupling`.

    Example:
        >>> data = torch.tensor([3.0, -1.0]).view(2, 1, 1, 1)
        >>> noise = torch.tensor([-2.0, 1.0]).view(2, 1, 1, 1)
        >>> WorstCoupling("maps")(data, noise).flatten().tolist()
        [-2.0, 1.0]
    """

    _sign = -1


def create_coupling(
    name: CouplingName,
    scope: Scope = "positions",
    block_size: int | None = None,
    solver: Solver = "auto",
) -> Coupling:
    """Create a coupling by name.

    Args:
        name: ``independent``, ``optimal`` or ``worst``.
        scope: See :class:`OptimalCoupling`.
        block_size: See :class:`OptimalCoupling`.
        solver: See :class:`OptimalCoupling`.

    Returns:
        The coupling.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> type(create_coupling("worst")).__name__
        'WorstCoupling'
    """
    if name not in get_args(CouplingName):
        msg = f"coupling must be one of {', '.join(get_args(CouplingName))}, not {name!r}"
        raise ValueError(msg)
    if name == "independent":
        # Invalid arguments are errors with this name too, although it does not use them.
        _check(scope, block_size, solver)
        return IndependentCoupling()
    return {"optimal": OptimalCoupling, "worst": WorstCoupling}[name](scope, block_size, solver)


def _highest_gain(gains: Tensor) -> float:
    """Maximum sum of gains (K, n, n) over all assignments, by code independent of the solvers."""
    import ot  # noqa: PLC0415 - takes seconds, and only checks use it

    blocks = -gains.double().cpu().numpy()
    return -len(blocks[0]) * sum(float(ot.emd2([], [], block, numItermax=_PIVOTS)) for block in blocks)


def _exact_assignment(gains: Tensor) -> Tensor:
    """Column of each row at the maximum sum of gains, (K, n) for gains (K, n, n)."""
    # SciPy gives the same assignment as ot.emd, in half the time for blocks of 128 to 1024 and less for smaller ones.
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - takes time, and only exact couplings need it

    columns = [torch.from_numpy(linear_sum_assignment(block, maximize=True)[1]) for block in gains.cpu().numpy()]
    return torch.stack(columns).to(gains.device)


def _greedy_assignment(gains: Tensor) -> Tensor:
    """Column of each row by joining rows and columns that are each other's best, (K, n) for gains (K, n, n).

    The number of rounds is fixed and enough for nearly all; the remaining ones are joined in order. No decision depends
    on values, so the function never synchronises with the device.
    """
    _, size, _ = gains.shape
    free = gains.clone()
    columns = torch.zeros(gains.shape[:2], dtype=torch.long, device=gains.device)
    is_joined = torch.zeros_like(columns, dtype=torch.bool)
    is_taken = is_joined.clone()
    for _ in range(2 * math.ceil(math.log2(size)) + 4 if size > 1 else 1):
        column, row = free.argmax(2), free.argmax(1)
        # A row whose best column has it as its best row.
        join = (row.gather(1, column) == torch.arange(size, device=gains.device)) & ~is_joined
        columns = torch.where(join, column, columns)
        is_joined = is_joined | join
        # Integers, because CUDA does not scatter Boolean values.
        is_taken = is_taken | torch.zeros_like(columns).scatter_reduce(1, column, join.long(), "amax").bool()
        free.masked_fill_(is_joined[:, :, None] | is_taken[:, None, :], -torch.inf)
    rows_left, columns_left = (flags.int().argsort(dim=1, stable=True) for flags in (is_joined, is_taken))
    rest = torch.zeros_like(columns).scatter(1, rows_left, columns_left)
    return torch.where(is_joined, columns, rest)


def _check(scope: Scope, block_size: int | None, solver: Solver) -> None:
    for name, value, allowed in (("scope", scope, get_args(Scope)), ("solver", solver, get_args(Solver))):
        if value not in allowed:
            msg = f"{name} must be one of {', '.join(allowed)}, not {value!r}"
            raise ValueError(msg)
    if block_size is None:
        return
    for holds, limit in ((block_size >= 0, "at least 0"), (isinstance(block_size, Integral), "whole")):
        if not holds:
            msg = f"block_size must be {limit}, not {block_size}"
            raise ValueError(msg)
