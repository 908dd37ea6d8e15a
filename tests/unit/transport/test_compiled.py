import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core.caching import IndexDataCacheFile

import anomalib_ot
from anomalib_ot.transport import DenseCost, FusedCost, Workspace, grid_coordinates, sinkhorn
from anomalib_ot.transport._compiled import TINY, round_rows, scale_columns, scale_dense_rows
from anomalib_ot.transport._exponentials import sum_exponentials, write_exponentials

LOOP = """
from anomalib_ot.transport._compiled import compiled

@compiled()
def double(values):
    for i in range(len(values)):
        values[i] *= 2
"""
SOLVE = """
import torch
from anomalib_ot import Pradot
from anomalib_ot.transport import sinkhorn
from anomalib_ot.transport._compiled import scale_dense_rows

scale_dense_rows(torch.ones(4, 3), torch.ones(3), torch.ones(4))
cost = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))
plan = sinkhorn(cost, 1e-3, 3, 0)
print(type(plan.kernel).__name__, plan.transport_cost())
"""


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 8, 11, 30])
def test_row_scaling_equals_the_formula(rows, count, threads):
    threads(count)
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.rand(rows, 37, generator=generator)
    v, a = torch.rand(37, generator=generator), torch.rand(rows, generator=generator)
    u, sums = scale_dense_rows(matrix, v, a)
    exact = matrix.double()
    torch.testing.assert_close(u.double(), a.double() / (exact @ v.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.double(), exact.T @ u.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_sum_of_a_row_that_underflows_is_clamped(rows):
    u, _ = scale_dense_rows(torch.zeros(rows, 2), torch.ones(2), torch.full((rows,), 1e-3))
    torch.testing.assert_close(u, torch.full((rows,), 1e-3 / TINY))


def test_nan_entries_propagate(threads):
    threads(1)
    matrix = torch.ones(5, 3)
    matrix[1, 1] = float("nan")
    u, sums = scale_dense_rows(matrix, torch.ones(3), torch.ones(5))
    assert u.isnan().tolist() == [False, True, False, False, False]
    assert sums.isnan().all()


@pytest.mark.parametrize("zeros", [0, 1])
def test_column_scaling_equals_the_formula(zeros):
    generator = torch.Generator().manual_seed(0)
    v, sums, b = torch.rand(3, 37, generator=generator) + 0.1
    sums[:zeros] = 0
    following, found = scale_columns(v, sums, b)
    assert torch.equal(following, b / sums)
    expected = [sums.min(), (v * sums - b).abs().sum(), *(b / sums).log().aminmax()]
    assert found == pytest.approx([float(each) for each in expected], rel=1e-6)


@pytest.fixture(params=["dense", "stored", "rounded", "product"])
def cost(request):
    """A cost matrix (144, 21) in each form that loops read."""
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (torch.rand(size, 6, generator=generator) for size in (9 * 16, 21))
    grid = grid_coordinates(4, 4)
    entries = len(features) * len(prototypes)
    memory = {"stored": 2**20, "rounded": 4 * entries}.get(request.param)
    cost = FusedCost(features, prototypes, grid, grid.repeat(2, 1)[:21], 0.3, workspace=memory and Workspace(memory))
    return DenseCost(cost[:]) if request.param == "dense" else cost


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("epsilon", [10.0, 0.1, 1e-3])
def test_sums_of_exponentials_equal_the_formula(cost, epsilon, count, threads):
    threads(count)
    exponents = cost.exponents(torch.linspace(0, 0.1, 21), epsilon)
    largest, sums = sum_exponentials(exponents, list(cost.blocks()), 21)
    expected = torch.cat([exponents(rows).double() for rows in cost.blocks()])
    found = largest.double() + sums.double().log()
    torch.testing.assert_close(found, expected.logsumexp(0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("epsilon", [10.0, 0.1, 1e-3])
def test_exponentials_equal_the_formula(cost, epsilon, count, threads):
    threads(count)
    exponents = cost.exponents(torch.linspace(0, 0.1, 21), epsilon)
    highest, store = torch.empty(144), torch.full((144, 21), torch.nan)
    write_exponentials(exponents, list(cost.blocks()), -60.0, highest, store)
    expected = torch.cat([exponents(rows).double() for rows in cost.blocks()])
    torch.testing.assert_close(highest.double(), expected.amax(1), rtol=1e-6, atol=1e-6)
    expected -= expected.amax(1, keepdim=True)
    # A product of threads of its own differs by its rounding, times 1 / ε.
    torch.testing.assert_close(store.double(), expected.exp(), rtol=1e-6 / epsilon + 1e-6, atol=1e-26)
    assert not store[expected < -60.1].any()


@pytest.mark.parametrize("columns", [1, 5, 64, 150])
def test_the_rounding_error_is_half_a_step_and_zero_at_both_ends(columns, threads):
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


def read_only_installation(folder):
    """Environment of a process that cannot write to its copy of the package or to its home, not even as root."""
    package = Path(anomalib_ot.__file__).parent
    shutil.copytree(package, folder / "anomalib_ot", ignore=shutil.ignore_patterns("__pycache__"))
    # A file in the place of the folder that Numba would create.
    (folder / "anomalib_ot/transport/__pycache__").write_text("")
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), "/dev/null/nowhere")
    usual = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return {**usual, **nowhere, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.slow
def test_a_read_only_installation_without_a_home_registers_and_solves(tmp_path):
    environment = read_only_installation(tmp_path)
    result = subprocess.run([sys.executable, "-c", SOLVE], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "could not register" not in result.stderr
    cost = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))
    assert result.stdout.splitlines()[-1] == f"SparseKernel {sinkhorn(cost, 1e-3, 3, 0).transport_cost()}"
    assert not list(tmp_path.rglob("*.nb?"))


@pytest.fixture
def double(tmp_path):
    """Import a loop again, as another process would, and double a number with it."""
    (tmp_path / "loop.py").write_text(LOOP)

    def double():
        spec = importlib.util.spec_from_file_location("loop", tmp_path / "loop.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        values = np.ones(1)
        module.double(values)
        assert values.tolist() == [2.0]
        return module.double

    return double


def test_the_next_process_uses_the_cached_code(double):
    assert not sum(double().stats.cache_hits.values())
    assert sum(double().stats.cache_hits.values()) == 1


def test_loops_run_on_a_full_disk(double, monkeypatch):
    def save(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "save", save)
    double()


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("size", [0, 20])
def test_a_loop_with_a_damaged_cache_is_compiled_again(double, tmp_path, suffix, size):
    double()
    [path] = tmp_path.rglob(f"*.{suffix}")
    path.write_bytes(path.read_bytes()[:size])
    double()
    assert sum(double().stats.cache_hits.values()) == 1
