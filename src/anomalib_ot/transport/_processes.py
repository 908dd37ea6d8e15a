"""Problems whose rows are distributed over several processes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """The processes that solve one problem together, each with some of its rows; one process by default.

    Attributes:
        group: Process group of ``torch.distributed``, or None for this process only.
    """

    group: distributed.ProcessGroup | None = None

    @classmethod
    def all(cls) -> "Processes":
        """All processes if ``torch.distributed`` is initialised, otherwise this process only."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.group.WORLD)
        return cls()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        return self._reduce(tensor, distributed.ReduceOp.SUM)

    def min(self, tensor: Tensor) -> Tensor:
        """Minimum of each element over the processes."""
        return self._reduce(tensor, distributed.ReduceOp.MIN)

    def first(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process, in all processes."""
        if self.group is not None:
            tensor = tensor.contiguous()
            distributed.broadcast(tensor, 0, self.group)
        return tensor

    def each(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.group is None:
            return [value]
        values = [None] * distributed.get_world_size(self.group)
        distributed.all_gather_object(values, value, self.group)
        return values

    def total(self, value: float, device: torch.device) -> float:
        """Sum of a number over the processes."""
        return value if self.group is None else float(self.sum(torch.tensor(value, dtype=torch.float64, device=device)))

    def least(self, value: float, device: torch.device) -> float:
        """Minimum of a number over the processes."""
        return value if self.group is None else float(self.min(torch.tensor(value, dtype=torch.float64, device=device)))

    def _reduce(self, tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            tensor = tensor.contiguous()
            distributed.all_reduce(tensor, operation, self.group)
        return tensor
