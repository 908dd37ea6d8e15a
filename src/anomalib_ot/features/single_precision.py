"""Modules of which some parts stay in single precision when the rest is brought to another type."""

from typing import Any, ClassVar

from torch import nn


class SinglePrecisionParts(nn.Module):
    """A module of which some buffers and submodules stay in float32, whatever type the module is brought to.

    Whitening and anomaly maps lose too much in less than single precision. ``half()``, ``double()`` and
    ``to(torch.bfloat16)`` change all tensors through ``nn.Module._apply``, an internal of torch. This class then brings
    the named parts back to float32.

    Attributes:
        single_precision: Names of these buffers and submodules. Those that are None are skipped.

    Example:
        >>> import torch
        >>> class Scaled(SinglePrecisionParts):
        ...     single_precision = ("scale",)
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 2)
        ...         self.register_buffer("scale", torch.ones(2))
        >>> scaled = Scaled().half()
        >>> scaled.layer.weight.dtype, scaled.scale.dtype
        (torch.float16, torch.float32)
    """

    single_precision: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> "SinglePrecisionParts":
        super()._apply(fn, recurse)
        for name in self.single_precision:
            if (part := getattr(self, name)) is not None:
                setattr(self, name, part.float())
        return self
