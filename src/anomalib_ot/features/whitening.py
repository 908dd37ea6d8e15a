"""Local whitening of feature maps: at each cell, directions in which normal images vary get less weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from threading import Lock

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn

from anomalib_ot.settings import require_finite, require_whole

from .extraction import full_precision
from .moments import ROUNDING, Blocks, Moments, nearest_cells, principal_components, share_of_alignment

# Largest number of blocks along a side, so that maps of 14 x 14 cells, where blocks cost accuracy, have none.
_LONGEST_SIDE = 16
# With fewer images for each mode, modes fit chance.
_IMAGES_PER_MODE = 8
MOST_MODES = 32
"""Largest number of modes."""
# Maps in which the modes are found, and the bytes that they may take. 256 maps take 32 MB with 28 x 28 cells of 40
# channels, and 134 MB with 32 x 32 cells of 128 channels.
_MAPS_FOR_MODES = MOST_MODES * _IMAGES_PER_MODE
_MEMORY_FOR_MODES = 2**29


class LocalWhitening(DynamicBufferMixin, nn.Module):
    """Multiplies the feature of each cell by the inverse square root of the covariance at this cell.

    PaDiM (Defard et al., 2021, arXiv 2011.08785) measures deviations at a cell by the covariance at this cell.
    Whitening makes this covariance available to any model that compares features by cosine: the cosine between whitened
    features is that of the inner product zᵀ Σ⁻¹ z′. Features are not centred for this purpose, so that the cosine near
    the mean stays well defined. If they are centred, normal features have zero mean and about unit variance, and their
    squared norm is PaDiM's squared score.

    The covariance at a cell is estimated from one feature of each image, which are few samples. It is therefore mixed
    with the covariance pooled over all cells, which counts as ``prior`` · D additional samples (the posterior mean
    under an inverse-Wishart prior). A share of the mean variance is added to each direction. Maps of more than 16 × 16
    cells have one covariance for each block of neighbouring cells, about their own means: blocks of 2 × 2 take a
    quarter of the memory and give four times the samples. Features with more than ``max_channels`` channels are first
    projected to ``max_channels`` random orthonormal directions, the same in each run; PaDiM similarly keeps a random
    subset of the channels.

    Where images are aligned, they also differ as wholes, for example in pose, brightness or fill level. Such a
    difference moves the features of many cells at once, while a defect moves those of few. The principal components of
    whole maps, the modes, are therefore removed before the whitening, and the covariance is that of the residual.
    Together they are a factor analysis: common factors of all cells, and a covariance of its own at each cell. Images
    that are not aligned have no such modes: their number is a share of the allowed one, the ``aligned_share``.

    Args:
        max_channels: Largest number of channels to keep, at least 1.
        shrinkage: Share of the mean variance that is added to each direction, at least 0.
        prior: Number of samples that the pooled covariance counts as, as a share of D, at least 0.
        centred: Whether to subtract the mean at each cell.
        max_modes: Largest number of modes to remove, from 0 to 32. There is at most one for eight images, as few images
            cannot tell a mode from chance. Modes are found in the first 256 images, or in as many as fit into half a
            GiB.

    Attributes:
        mean: Mean (H, W, 1, E) of the projected features at each cell. Without ``centred``, only known after a fit.
        aligned_share: How much of what the images have in common is at fixed positions, from 0 to 1, see
            :func:`share_of_alignment`. Only known after a fit.

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
    modes: Tensor
    mode_offsets: Tensor

    def __init__(
        self,
        max_channels: int = 128,
        shrinkage: float = 0.1,
        prior: float = 1.0,
        centred: bool = False,
        max_modes: int = 0,
    ) -> None:
        super().__init__()
        require_whole(1, "whitened_channels", max_channels)
        require_finite(shrinkage >= 0, "shrinkage", "at least 0", shrinkage)
        require_finite(prior >= 0, "prior", "at least 0", prior)
        require_whole(0, "global_modes", max_modes, MOST_MODES)
        self.max_channels = max_channels
        self.shrinkage = shrinkage
        self.prior = prior
        self.centred = centred
        self.max_modes = max_modes
        self.aligned_share = 0.0
        # (E, D), a matrix (E, E) for each block of cells, and (H, W, 1, E); empty until fitted.
        self.register_buffer("projection", torch.empty(0, dtype=torch.float32))
        self.register_buffer("matrices", torch.empty(0, dtype=torch.float32))
        self.register_buffer("mean", torch.empty(0, dtype=torch.float32), persistent=centred)
        # Orthonormal modes (H, W, E, K), and the coefficients (K,) of the mean. K may be 0.
        self.register_buffer("modes", torch.empty(0, dtype=torch.float32), persistent=max_modes > 0)
        self.register_buffer("mode_offsets", torch.empty(0, dtype=torch.float32), persistent=max_modes > 0)
        self._moments: Moments | None
        # The first maps, until the modes are found in them; from then on the moments of what the modes leave, if any.
        self._first: list[Tensor] | None
        self._residual: Moments | None
        self.reset()

    @property
    def is_fitted(self) -> bool:
        """Whether there are covariances, from training or from a checkpoint."""
        return self.matrices.numel() > 0

    def reset(self) -> None:
        """Forget the batches since the last fit, such as those of an interrupted one."""
        self._moments, self._first, self._residual = None, [], None

    @torch.no_grad()
    def update(self, maps: Tensor) -> None:
        """Add the feature maps (B, D, H, W) of a batch of training images; all batches have the same H and W."""
        if self._moments is None:
            self._choose_directions(maps)
        with full_precision(maps):
            cells = self._project(maps).permute(2, 0, 1).double()
        if self._moments is None:
            # Moments about the first batch's mean avoid the cancellation of moments about zero.
            self._moments = Moments(maps.shape[-2:], cells.mean(1, keepdim=True), _LONGEST_SIDE)
        self._moments.add(cells)
        if self._residual is not None:
            self._residual.add(cells - self._along_modes(cells))
        elif self.max_modes and self._first is not None:
            self._first.append(cells.float())
            taken = sum(each.nbytes for each in self._first)
            if self._moments.count >= _MAPS_FOR_MODES or taken >= _MEMORY_FOR_MODES:
                self._find_modes(self._moments, self._first)

    @torch.no_grad()
    def compute(self) -> None:
        """Estimate the covariances from all batches.

        Raises:
            RuntimeError: If there was no batch.
        """
        if self._moments is None:
            msg = "there are no features to estimate the whitening from: call update first"
            raise RuntimeError(msg)
        moments = self._moments
        if self._first:
            self._find_modes(moments, self._first)
        mean = moments.mean()
        self.mean = mean.float().unflatten(0, moments.grid)
        self.aligned_share = share_of_alignment(moments)
        if self.max_modes:
            with full_precision(self.mean):
                self.mode_offsets = self.mean.flatten() @ self.modes.flatten(0, 2)
        whole, samples = moments.covariance(), moments.samples()[:, None, None]
        local = self._residual.covariance() if self._residual else whole
        pooled, prior = (samples * local).sum(0) / samples.sum(), self.prior * local.shape[-1]
        with _one_thread():
            values, vectors = torch.linalg.eigh((samples * local + prior * pooled) / (samples + prior))
        values = values.clamp(min=0)
        floor = self.shrinkage * values.mean(1, keepdim=True)
        if self._residual:
            # If modes explain all of the variance, what they leave is rounding.
            floor = floor.clamp(min=ROUNDING * float(whole.diagonal(dim1=1, dim2=2).mean()))
        # If all images are equal, all variances are 0 and the features stay as they are.
        scales = (values + torch.where(floor > 0, floor, 1.0)).rsqrt()
        self.matrices = ((vectors * scales[:, None]) @ vectors.mT).float().unflatten(0, moments.blocks.shape)
        self.reset()

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
            if self.modes.numel():
                projected = projected - self._common(projected, height, width)
            if self.centred:
                projected = projected - nearest_cells(self.mean, height, width).flatten(0, 2).mT
            return self.whiten(projected, height, width)

    def whiten(self, projected: Tensor, height: int, width: int) -> Tensor:
        """Multiply projected features (B, E, H·W) by the matrices, without removing mean or modes: (B, E, H, W)."""
        matrices = self.matrices
        side = max(ceil(length / count) for length, count in zip((height, width), matrices.shape, strict=False))
        blocks = Blocks((height, width), side)
        if blocks.shape != matrices.shape[:2]:
            blocks, matrices = Blocks((height, width), 1), nearest_cells(matrices, height, width)
        cells = blocks.gather(projected.permute(2, 0, 1).unflatten(0, (height, width)))
        # The matrices are symmetric. OpenVINO is faster with them on the left, where it does not pack them as weights.
        return blocks.scatter((matrices.flatten(0, 1) @ cells.mT).mT).permute(2, 3, 0, 1)

    def _find_modes(self, moments: Moments, first: list[Tensor]) -> None:
        """Find the modes in the first maps, and start the moments of what they leave, if there are any."""
        self._first = None
        maps = torch.cat(first, dim=1).transpose(0, 1).flatten(1)
        most = int(share_of_alignment(moments) * min(self.max_modes, len(maps) / _IMAGES_PER_MODE))
        with full_precision(maps):
            modes = principal_components(maps - maps.mean(0), most)
        self.modes = modes.unflatten(0, (*moments.grid, -1))
        if self.modes.numel():
            self._residual = Moments(moments.grid, moments.shift - self._along_modes(moments.shift), _LONGEST_SIDE)
            for cells in first:
                self._residual.add(cells.double() - self._along_modes(cells.double()))

    def _along_modes(self, cells: Tensor) -> Tensor:
        """The part of cells (H·W, B, E) along the modes."""
        modes = self.modes.flatten(0, 2).to(cells.dtype)
        parts = cells.transpose(0, 1).flatten(1) @ modes @ modes.mT
        return parts.unflatten(1, (len(cells), -1)).transpose(0, 1)

    def _common(self, projected: Tensor, height: int, width: int) -> Tensor:
        """The part (B, E, H·W) of projected features that differs from the mean along the modes."""
        modes = nearest_cells(self.modes, height, width).flatten(0, 2)
        # A larger map repeats the modes, which then are longer than 1.
        repeated = height * width / self.modes[..., 0, 0].numel()
        coefficients = projected.mT.flatten(1) @ modes / repeated - self.mode_offsets
        return (coefficients @ modes.mT).unflatten(1, (height * width, -1)).mT

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
