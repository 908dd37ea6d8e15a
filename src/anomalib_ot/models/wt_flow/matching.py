"""The flow-matching loss of WT-Flow's velocity fields (Li et al., 2025, arXiv 2508.05461)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.transport import Coupling, Processes


def matching_losses(
    velocities: Iterable[nn.Module],
    embeddings: Sequence[Tensor],
    coupling: Coupling,
    generator: torch.Generator,
    processes: Processes | None = None,
) -> Tensor:
    """Flow-matching loss of each layer, the mean of (v(x_t, t) − (x_1 − x_0))² over maps and their entries.

    Processes that share a batch each draw and pair the noise of the whole batch, so that together they train the same
    as one process.

    Args:
        velocities: Velocity field of each layer.
        embeddings: x_0, (B, C, H, W) of each layer. B may differ between processes, and may be 0.
        coupling: Pairs each x_0 with its noise x_1.
        generator: Source of noise and times, on the embeddings' device, in the same state in all processes.
        processes: The processes that share the batch; only this one by default.

    Returns:
        (layers,), whose mean over the processes is the loss of the batch.
    """
    share = _Share.of(embeddings[0], processes or Processes())
    losses = []
    for velocity, maps in zip(velocities, embeddings, strict=True):
        batch = share.whole(maps)
        noise = torch.randn(batch.shape, generator=generator, device=maps.device)
        noise = coupling(batch, noise, generator)[share.rows]
        times = torch.rand(len(batch), generator=generator, device=maps.device)[share.rows]
        along = times[:, None, None, None]
        predicted = velocity((1 - along) * maps + along * noise, times)
        # The mean over no maps is NaN, but the other processes wait for the gradients of this one.
        loss = F.mse_loss(predicted.float(), noise - maps) if len(maps) else predicted.sum()
        losses.append(loss * share.weight)
    return torch.stack(losses)


@dataclass(frozen=True)
class _Share:
    """The part of a batch in this process, when the maps are dealt to the processes in turn.

    Attributes:
        processes: The processes that share the batch.
        rows: Indices of this process's maps in the batch.
        total: Number of maps in the batch.
        weight: Size of this share, relative to the mean share.
    """

    processes: Processes
    rows: slice | list[int]
    total: int
    weight: float

    @classmethod
    def of(cls, maps: Tensor, processes: Processes) -> "_Share":
        """The share of a process with maps (B, C, H, W)."""
        if processes.group is None:
            return cls(processes, slice(None), len(maps), 1.0)
        ours = distributed.get_rank(processes.group)
        counts = torch.zeros(distributed.get_world_size(processes.group), dtype=torch.long, device=maps.device)
        counts[ours] = len(maps)
        numbers = processes.sum(counts).tolist()
        turns = sorted((turn, process) for process, number in enumerate(numbers) for turn in range(number))
        rows = [row for row, (_, process) in enumerate(turns) if process == ours]
        return cls(processes, rows, len(turns), len(maps) * len(numbers) / len(turns))

    def whole(self, maps: Tensor) -> Tensor:
        """The maps of all processes, in the order of the batch."""
        if self.processes.group is None:
            return maps
        batch = maps.new_zeros(self.total, *maps.shape[1:])
        batch[self.rows] = maps
        return self.processes.sum(batch)
