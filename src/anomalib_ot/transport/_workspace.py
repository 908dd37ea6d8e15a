"""Memory that the solver reuses."""

import torch
from torch import Tensor


class Workspace:
    """Memory for kernels and similarities, reused from one solve to the next because new pages are slow to map.

    Args:
        memory: Upper bound, in bytes, of the kernel and the similarities of one problem together. Sums and products
            need blocks of a few megabytes in addition.

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
        """An uninitialised tensor, in the memory of the last one of this name if that is large enough."""
        size = shape.numel() * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.device != device:
            # Release the old buffer first, so that both need not fit at once.
            buffer = self._buffers[name] = torch.empty(0)
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer[:size].view(dtype).view(shape)

    def clear(self) -> None:
        """Release the memory; the next solve allocates it again."""
        self._buffers = {}

    def __deepcopy__(self, memo: dict[int, object]) -> "Workspace":
        return Workspace(self.memory)

    def __reduce__(self) -> tuple[type["Workspace"], tuple[float]]:
        return Workspace, (self.memory,)
