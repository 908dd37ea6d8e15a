from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

from anomalib_ot import transport
from anomalib_ot.transport import FusedCost, Processes, _anderson, _kernels, _sparse, grid_coordinates, sinkhorn

TOLERANCE = 1e-3


def problem():
    generator = torch.Generator().manual_seed(0)
    grid = grid_coordinates(4, 4)
    return torch.randn(6, 16, 8, generator=generator), torch.randn(32, 8, generator=generator), grid, grid.repeat(2, 1)


def solve(images, processes=None):
    features, prototypes, grid, coordinates = problem()
    features = features[images].flatten(0, 1)
    cost = FusedCost(features, prototypes, grid, coordinates, 0.3, processes=processes)
    plan = sinkhorn(cost, 0.01, 500, TOLERANCE, processes=processes)
    warm = sinkhorn(cost, 0.02, 500, TOLERANCE, potential=plan.potential, processes=processes)
    smooth = sinkhorn(cost, 0.2, 500, TOLERANCE, processes=processes)
    return [
        (plan.potential, plan.barycentres(features), plan.transport_cost(), plan.iterations, plan.marginal_error)
        for plan in (plan, warm, smooth)
    ]


def meet(rank, folder):
    # Processes that stop at different iterations would wait for each other forever.
    limit = timedelta(seconds=60)
    distributed.init_process_group("gloo", f"file://{folder}/meet", limit, world_size=2, rank=rank)


def share(rank, folder, is_sparse):
    meet(rank, folder)
    if is_sparse:
        # Also use sparse kernels for small matrices and for those with many entries.
        _kernels._SPARSE_ENTRIES, _sparse._SPARSE = 1, 2.0
    # Unequal shares: four and two images; all and none.
    results = [solve([slice(0, end), slice(end, 6)][rank], Processes.all()) for end in (4, 6)]
    assert Processes.all().first(torch.full((2, 3), float(rank)).T).tolist() == [[0, 0]] * 3
    torch.save((results, accelerated(rank), uneven(rank)), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def accelerated(rank):
    """Potential and iterations of accelerated iterations whose steps differ between the processes, as by rounding."""
    step = _anderson.Anderson.step
    _anderson.Anderson.step = lambda self, residual: step(self, residual) * (1 + 1e-3 * rank)
    features, *others = problem()
    cost = FusedCost(features[3 * rank : 3 * rank + 3].flatten(0, 1), *others, 0.3, processes=Processes.all())
    plan = sinkhorn(cost, 0.01, 500, TOLERANCE, anderson=5, processes=Processes.all())
    return plan.potential, plan.iterations


def uneven(rank):
    """Potential where the costs of one process vary more than those of the other."""
    cost = torch.rand(20, 15, generator=torch.Generator().manual_seed(rank)) * [1, 30][rank]
    return sinkhorn(cost, 1.0, 500, TOLERANCE, processes=Processes.all()).potential


@pytest.mark.parametrize("is_sparse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_give_the_plan_of_one(tmp_path, is_sparse):
    multiprocessing.spawn(share, (tmp_path, is_sparse), nprocs=2)
    alone = solve(slice(None))
    (results, first, potential), (more, second, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(potential, same)
    assert first[1] == second[1] < alone[0][3]
    results += more
    assert len(results) == 4
    assert all(len(result) == len(alone) == 3 for result in results)
    for result in results:
        for ours, expected in zip(result, alone, strict=True):
            torch.testing.assert_close(ours[0], expected[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(ours[1], expected[1], atol=1e-4, rtol=1e-4)
            assert ours[2] == pytest.approx(expected[2], rel=1e-4)
            assert ours[3] == expected[3]
            assert ours[4] == pytest.approx(expected[4], abs=1e-5)


def gradient(rank):
    """Gradient of a problem that only this process has: a batch in one process, and a large matrix in the other."""
    generator = torch.Generator().manual_seed(rank)
    cost = torch.rand([(3, 20, 15), (600, 500)][rank], generator=generator).requires_grad_()
    transport.solve(cost, reg=[0.02, 0.2][rank], tol=TOLERANCE).value.sum().backward()
    return cost.grad


def solve_own(rank, folder):
    meet(rank, folder)
    if rank:
        torch.save(gradient(rank), folder / "1.pt")
    # The processes do not call it at the same time.
    distributed.barrier()
    if not rank:
        torch.save(gradient(rank), folder / "0.pt")
    distributed.destroy_process_group()


def test_solve_does_not_wait_for_other_processes(tmp_path):
    multiprocessing.spawn(solve_own, (tmp_path,), nprocs=2)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), gradient(rank), atol=1e-6, rtol=1e-3)


def test_a_single_process_needs_no_group():
    tensor = torch.rand(3)
    assert Processes.all() == Processes()
    assert Processes().sum(tensor) is tensor
    assert Processes().first(tensor) is tensor
    assert Processes().total(5, torch.device("cpu")) == 5
