"""Memory of the solver."""

import torch
from torch import Tensor


class Workspace:
    """Memory for kernels and similarities, which one solve leaves to the next: fresh pages cost more than they seem.

    Args:
        memory: Bytes that the kernel and the similarities of one problem may take together. The sums and products work
            on blocks of a few megabytes beside it.

    Raises:
        ValueError: If the memory is not positive.
    """

    def __init__(self, memory: float = 2**31) -> None:
        if not memory > 0:
            msg = f"the memory for transport must be positive, not {memory} bytes"
            raise ValueError(msg)
        self.memory = memory
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A matrix with arbitrary entries, in the memory of the last one of this name if that is large enough."""
        size = shape.numel() * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.device != device:
            # The old one goes first, so that both need not fit.
            buffer = self._buffers[name] = torch.empty(0)
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer[:size].view(dtype).view(shape)

    def clear(self) -> None:
        """Give the memory back; the next solve takes it anew."""
        self._buffers = {}

    def __deepcopy__(self, memo: dict[int, object]) -> "Workspace":
        return Workspace(self.memory)

    def __reduce__(self) -> tuple[type["Workspace"], tuple[float]]:
        return Workspace, (self.memory,)
