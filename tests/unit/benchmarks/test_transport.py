"""The comparison of solvers does not time the compilation of a number of iterations."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.peers import Given
from benchmarks.transport import Comparison, make_problem


@pytest.mark.parametrize(("slope", "note"), [(0.01, None), (1.0, "extrapolated")])
def test_compilation_is_not_timed(slope, note, monkeypatch):
    clock, counts = 0.0, []
    monkeypatch.setattr("benchmarks.transport.time", SimpleNamespace(perf_counter=lambda: clock))

    def peer(given, _epsilon, count):
        nonlocal clock
        clock += 0.5 + slope * count + (0 if count in counts else 60)
        counts.append(count)
        return given.weights

    comparison = Comparison(make_problem("random", 4, 16, 8, 2, 1), 0.3, 0.01, tolerance=1e-3, seconds=5, memory=0.1)
    given = Given(torch.rand(8, 4), (torch.rand(8, 2), torch.rand(4, 2)))
    row = comparison._time(peer, given, 10, forming=0.25)
    assert row["to_tolerance_s"] == pytest.approx(0.75 + 10 * slope)
    assert row["hundred_s"] == pytest.approx(0.75 + 100 * slope)
    assert row.get("note") == note
