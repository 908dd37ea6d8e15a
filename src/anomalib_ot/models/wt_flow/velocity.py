"""The velocity field of WT-Flow: a compact U-Net with a time embedding."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.features.single_precision import SinglePrecisionParts

_GROUPS = 8
_EMBEDDING = 64


class VelocityField(SinglePrecisionParts):
    """v(x, t), a U-Net over feature maps.

    Each level halves the resolution and has one residual block on the way down and one on the way up. All blocks have
    ``width`` channels, which an embedding of t shifts and scales. The last layer is initialised to zero, and therefore
    the field is zero at first.

    Args:
        channels: C, the channels of the feature maps.
        width: Channels of the blocks, a multiple of 16, at most 16384.
        depth: Number of times that the resolution is halved, at most 16; 0 for none.

    Example:
        >>> velocity = VelocityField(4, width=16, depth=1)
        >>> velocity(torch.rand(2, 4, 6, 6), torch.rand(2)).shape
        torch.Size([2, 4, 6, 6])
    """

    single_precision = ("frequencies",)

    def __init__(self, channels: int, width: int = 64, depth: int = 1) -> None:
        super().__init__()
        self.depth = depth
        self.time = nn.Sequential(
            nn.Linear(_EMBEDDING, _EMBEDDING), nn.SiLU(), nn.Linear(_EMBEDDING, _EMBEDDING), nn.SiLU()
        )
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(_Block(width, width) for _ in range(depth))
        self.halve = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(depth))
        self.middle = _Block(width, width)
        self.up = nn.ModuleList(_Block(2 * width, width) for _ in range(depth))
        self.norm = nn.GroupNorm(_GROUPS, width)
        self.last = _zero(nn.Conv2d(width, channels, 3, padding=1))
        frequencies = torch.exp(-math.log(1000) * torch.arange(_EMBEDDING // 2) / (_EMBEDDING // 2))
        self.frequencies: Tensor
        self.register_buffer("frequencies", 100 * frequencies, persistent=False)

    def check_size(self, height: int, width: int) -> None:
        """Check that maps can be halved ``depth`` times.

        Raises:
            ValueError: If a map of this size, in cells, is too small.
        """
        if min(height, width) < 2**self.depth:
            msg = (
                f"feature maps of {height} x {width} cells cannot be halved {self.depth} times; lower depth, raise "
                "image_size or take an earlier layer"
            )
            raise ValueError(msg)

    def forward(self, maps: Tensor, time: Tensor) -> Tensor:
        """Compute the velocity.

        Args:
            maps: x, (B, C, H, W), which is cast to the type of the weights.
            time: t in [0, 1], (B,), or (1,) for one value for all maps.

        Returns:
            (B, C, H, W).
        """
        weights = self.first.weight.dtype
        angles = time[:, None] * self.frequencies
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(weights))
        hidden = self.first(maps.to(weights))
        skips = []
        for block, halve in zip(self.down, self.halve, strict=True):
            hidden = block(hidden, embedding)
            skips.append(hidden)
            hidden = halve(hidden)
        hidden = self.middle(hidden, embedding)
        for block in self.up:
            skip = skips.pop()
            hidden = F.interpolate(hidden, size=skip.shape[-2:], mode="nearest")
            hidden = block(torch.cat([hidden, skip], 1), embedding)
        return self.last(F.silu(self.norm(hidden)))


class _Block(nn.Module):
    """Residual block of two convolutions, with a shift and a scale by the time in between."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(_GROUPS, channels)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(_EMBEDDING, 2 * width)
        self.second_norm = nn.GroupNorm(_GROUPS, width)
        self.second = _zero(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, maps: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.first(F.silu(self.first_norm(maps)))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, 1)
        hidden = self.second(F.silu(self.second_norm(hidden) * (1 + scale) + shift))
        return self.skip(maps) + hidden


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(cast("Tensor", layer.bias))
    return layer
