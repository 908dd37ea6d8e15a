import pytest
import torch

from anomalib_ot.transport.compiled import TINY, round_rows, scale_dense_rows


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 8, 11, 30])
def test_rows_are_scaled_as_by_the_formula(rows, count, dtype, threads):
    threads(count)
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.rand(rows, 37, generator=generator).to(dtype)
    v, a = torch.rand(37, generator=generator), torch.rand(rows, generator=generator)
    u, sums = scale_dense_rows(matrix, v, a)
    exact = matrix.double()
    torch.testing.assert_close(u.double(), a.double() / (exact @ v.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.double(), exact.T @ u.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_row_that_underflows_is_scaled_by_the_smallest_sum_that_counts(rows):
    u, _ = scale_dense_rows(torch.zeros(rows, 2), torch.ones(2), torch.full((rows,), 1e-3))
    torch.testing.assert_close(u, torch.full((rows,), 1e-3 / TINY))


def test_entries_that_are_not_finite_show(threads):
    threads(1)
    matrix = torch.ones(5, 3)
    matrix[1, 1] = float("nan")
    u, sums = scale_dense_rows(matrix, torch.ones(3), torch.ones(5))
    assert u.isnan().tolist() == [False, True, False, False, False]
    assert sums.isnan().all()


@pytest.mark.parametrize("columns", [1, 5, 64, 150])
def test_rounding_is_off_by_half_a_step_and_keeps_both_ends(columns, threads):
    threads(2)
    matrix = torch.rand(7, columns, generator=torch.Generator().manual_seed(columns)) - 0.3
    matrix[3] = 0.25
    rounded, middles, steps = torch.empty(7, columns, dtype=torch.int16), torch.empty(7), torch.empty(7)
    round_rows(matrix, rounded, middles, steps)
    again = middles[:, None] + steps[:, None] * rounded
    assert ((again - matrix).abs() <= steps[:, None] / 2 + 1e-7).all()
    torch.testing.assert_close(steps, (matrix.amax(1) - matrix.amin(1)) / 65534)
    ends = rounded.gather(1, torch.stack([matrix.argmin(1), matrix.argmax(1)], 1)).tolist()
    assert ends == [[-32767, 32767] if step > 0 else [0, 0] for step in steps]
