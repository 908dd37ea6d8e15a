import math
import multiprocessing

import pytest
import torch

from anomalib_ot.transport import DenseCost, Workspace
from anomalib_ot.transport._sparse import make_sparse

ROWS, COLUMNS, EPSILON, ERROR, ALLOWANCE = 300, 70, 0.01, 1e-3, 8.0


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exponents():
    """Exponents of which a tenth matter; in one row only one does."""
    generator = torch.Generator().manual_seed(0)
    matrix = -torch.rand(ROWS, COLUMNS, generator=generator) * 300
    matrix[17] = -1000
    matrix[17, 5] = -2
    return matrix


def build(exponents, error=ERROR):
    cost = DenseCost(-exponents * EPSILON)
    highest = torch.empty(ROWS)
    potential = torch.zeros(COLUMNS)
    blocks = [slice(0, 64), slice(64, 65), slice(65, ROWS)]
    kernel = make_sparse(cost.exponents(potential, EPSILON), blocks, cost.shape, highest, Workspace(), error, ALLOWANCE)
    return kernel, highest


def dense(kernel):
    return torch.cat([block for _, block in kernel.blocks()])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_entries_and_products_are_those_of_the_dense_matrix(exponents, count, threads):
    threads(count)
    kernel, highest = build(exponents)
    torch.testing.assert_close(highest, exponents.amax(1))
    relative = exponents - exponents.amax(1, keepdim=True)
    theta = math.log(COLUMNS / ERROR) + ALLOWANCE
    expected = torch.where(relative >= -theta, relative.exp(), 0.0)
    torch.testing.assert_close(dense(kernel), expected, atol=1e-9, rtol=1e-4)

    u, v, a, points = torch.rand(ROWS), torch.rand(COLUMNS) + 0.1, torch.rand(ROWS), torch.randn(ROWS, 6)
    torch.testing.assert_close(kernel.column_sums(u), expected.T @ u)
    scaling, sums = kernel.scale_rows(v, a)
    torch.testing.assert_close(scaling, a / (expected @ v), atol=0, rtol=1e-4)
    torch.testing.assert_close(sums, expected.T @ scaling, atol=0, rtol=1e-4)
    entropy = (u[:, None] * torch.xlogy(expected, expected) * v).sum()
    assert kernel.entropy(u, v) == pytest.approx(float(entropy), rel=1e-4)
    lost = (kernel.project(u, torch.ones(ROWS, 1))[:, 0] - expected.T @ u).abs() / (expected.T @ u)
    assert lost.max() <= ERROR
    largest = points.abs().max() * (expected.T @ u)[:, None]
    assert ((kernel.project(u, points) - (expected * u[:, None]).T @ points).abs() <= ERROR * largest).all()


def test_projection_omits_no_more_than_its_share(exponents):
    kernel, _ = build(exponents, error=0.5)
    u = torch.rand(ROWS)
    whole = dense(kernel).T @ u
    projected = kernel.project(u, torch.ones(ROWS, 1))[:, 0]
    assert (projected < whole * (1 - 1e-5)).any()
    assert (projected >= whole * 0.5).all()


def test_there_is_no_sparse_kernel_with_too_many_entries(exponents):
    assert build(exponents / 100)[0] is None
    cost = DenseCost(-exponents * EPSILON)
    little = Workspace(8 * 100)
    blocks = [slice(0, ROWS)]
    function = cost.exponents(torch.zeros(COLUMNS), EPSILON)
    assert make_sparse(function, blocks, cost.shape, torch.empty(ROWS), little, ERROR, ALLOWANCE) is None


def column_sums(kernel, queue):
    queue.put(kernel.column_sums(torch.ones(ROWS)).tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_process_has_its_own_threads(exponents, threads):
    threads(2)
    kernel, _ = build(exponents)
    here = kernel.column_sums(torch.ones(ROWS))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=column_sums, args=(kernel, queue))
    child.start()
    try:
        torch.testing.assert_close(torch.tensor(queue.get(timeout=60)), here)
    finally:
        child.kill()
        child.join()
