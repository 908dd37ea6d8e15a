"""The comparison of solvers gives all of them the same problem, and does not time the compilation of iterations."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anomalib_ot.transport import Workspace, sinkhorn
from benchmarks.growth import _steps_of_pot
from benchmarks.peers import PEERS, Given
from benchmarks.solvers import OURS, PLAIN, Case, time_peer, time_stopping_peer, weigh
from benchmarks.steps import Problem, Steps
from benchmarks.transport import make_problem, rows_of, solving


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return make_problem("random", 4, 16, 8, 4, 2)


def case(path=Path(), epsilon=0.05):
    return Case(path, 0.3, epsilon, tolerance=1e-3, seconds=5, memory=0.1, device="cpu")


@pytest.mark.parametrize(("slope", "note"), [(0.01, None), (1.0, "extrapolated")])
def test_compilation_is_not_timed(slope, note, problem, monkeypatch):
    clock, counts = 0.0, []
    monkeypatch.setattr("benchmarks.watch.time", SimpleNamespace(perf_counter=lambda: clock))

    def peer(given, _epsilon, count):
        nonlocal clock
        clock += 0.5 + slope * count + (0 if count in counts else 60)
        counts.append(count)
        return lambda: given.weights

    row = time_peer(peer, Given(problem, 0.3), case(), 10)
    assert row["to_tolerance_s"] == pytest.approx(0.5 + 10 * slope)
    assert row["hundred_s"] == pytest.approx(0.5 + 100 * slope)
    assert row.get("note") == note


@pytest.mark.parametrize(("error", "note"), [(5e-4, None), (2e-3, "not reached"), (float("nan"), "not reached")])
def test_a_solver_that_stops_by_itself_is_timed_until_then(error, note, problem):
    counts = []

    def peer(given, _epsilon, count):
        counts.append(count)
        rows, columns = given.weights
        return lambda: (rows, columns + error / len(columns))

    row = time_stopping_peer(peer, Given(problem, 0.3), case(), 10)
    assert row["error"] == pytest.approx(error, rel=1e-3, nan_ok=True)
    assert row.get("note") == note
    assert counts == [100, 100]
    assert "hundred_s" not in row


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_each_form_of_the_cost_is_that_of_our_solver(alpha, problem):
    expected = problem.cost(alpha)[:]
    torch.testing.assert_close(problem.matrix(alpha), expected, atol=1e-5, rtol=0)
    x, y = problem.points(alpha)
    torch.testing.assert_close(torch.cdist(x, y).square(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in PEERS if "screen" not in name])
def test_other_solvers_reach_the_error_of_our_plain_iterations(name, problem):
    plan = sinkhorn(problem.cost(0.3), 0.05, 5, 0)
    rows, columns = PEERS[name](Given(problem, 0.3), 0.05, 200)()
    for sums in (rows, columns):
        torch.testing.assert_close(sums, torch.full_like(sums, 1 / len(sums)), atol=1e-3 / len(sums), rtol=0)
    assert plan.marginal_error < 0.1


def test_each_solver_has_a_row(problem, tmp_path):
    class Here:
        def submit(self, function, *arguments):
            return SimpleNamespace(result=lambda: function(*arguments))

    problem.save(tmp_path / "problem.pt")
    names = [*OURS, "POT sinkhorn"]
    processes = dict.fromkeys(("ours", "POT", "memory"), Here())
    rows = {row["solver"]: row for row in rows_of(case(tmp_path / "problem.pt"), names, processes, repeats=2)}
    assert set(rows) == set(names)
    assert rows[PLAIN]["iterations"] == rows["POT sinkhorn"]["iterations"]
    assert float(rows["POT sinkhorn"]["error"]) == pytest.approx(float(rows[PLAIN]["error"]), rel=0.1)
    assert all(float(row["to_tolerance_s"]) > 0 for row in rows.values())
    assert {name for name, row in rows.items() if "memory_mb" in row} == {name for name in names if "limit" not in name}


@pytest.mark.slow
def test_the_memory_of_a_dense_solver_is_a_few_times_that_of_the_matrix(tmp_path):
    torch.manual_seed(0)
    problem = make_problem("random", 14, 16, 8, 16, 8)
    problem.save(tmp_path / "problem.pt")
    matrix = len(problem.features) * len(problem.prototypes) * 4 / 1e6
    with solving([], 1, "highest") as processes:
        memory = processes["memory"].submit(weigh, "POT sinkhorn", case(tmp_path / "problem.pt")).result()
    assert 2 * matrix < memory < 6 * matrix


def test_steps_of_pot_move_the_prototypes_as_ours(problem):
    steps = Steps(problem, 0.3, Workspace())
    theirs = Problem(**{**vars(problem), "prototypes": problem.prototypes.clone()})
    iterations = [steps.take(1e-4, 500).iterations for _ in range(3)]
    take = _steps_of_pot(theirs, iterations)
    for _ in range(3):
        take()
    torch.testing.assert_close(theirs.prototypes, steps.problem.prototypes, atol=1e-3, rtol=0)
