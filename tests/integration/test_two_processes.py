"""A process of several is lost: the others end with an error, and do not wait for it for ever."""

import os
import signal
import time

import pytest
import torch
from torch import distributed, multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from anomalib_ot.transport import FusedCost, Processes, grid_coordinates, sinkhorn

# Seconds; far less than the half hour for which gloo waits for a process that lives and says nothing.
PATIENCE = 120
# For two processes to import all that they need, on a busy machine.
START = 600


def solve_until_one_is_lost(rank, folder, how):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    grid = grid_coordinates(4, 4)
    for step in range(1000):
        if rank == 1 and step == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            msg = "out of memory"
            raise MemoryError(msg)
        features = torch.rand(16, 8, generator=torch.Generator().manual_seed(step))
        cost = FusedCost(features, features[:8], grid, grid[:8], 0.3, processes=Processes.all())
        sinkhorn(cost, 0.1, 500, 1e-2, processes=Processes.all())
        (folder / f"{rank}-{step}").touch()


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_lost_process_is_an_error_and_not_a_wait(tmp_path, how):
    context = multiprocessing.spawn(solve_until_one_is_lost, (tmp_path, how), nprocs=2, join=False)
    end = time.monotonic() + START
    while not (tmp_path / "0-2").exists() and time.monotonic() < end:
        time.sleep(0.1)
    end = time.monotonic() + PATIENCE
    # Without the spawner's help, which ends the others when one fails.
    processes = context.processes
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert (tmp_path / "0-2").exists()
    assert not (tmp_path / "0-3").exists()
    assert None not in codes
    assert 0 not in codes
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        context.join()
