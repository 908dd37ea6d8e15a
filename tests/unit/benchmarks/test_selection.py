"""The benchmark of the choice without labels: its runs, and its figures."""

import pandas as pd
import pytest

from anomalib_ot.selection import Candidate, choosing, trial_features
from anomalib_ot.synthetic import KINDS
from benchmarks import selection
from benchmarks.selection import chosen_regrets, correlations, held_out_regret, main, rows, rule_rows

REGRETS = pd.DataFrame({"A": [0.0, 4.0], "B": [2.0, 0.0]}, index=["one", "two"])
SYNTHETIC = pd.DataFrame({"A": [90.0, 80.0], "B": [91.0, 85.0]}, index=["one", "two"])


@pytest.mark.parametrize(("margin", "regrets"), [(0, [2, 0]), (2, [0, 0]), (100, [0, 4])])
def test_the_default_is_left_for_what_exceeds_it_by_the_margin(margin, regrets):
    assert [*chosen_regrets(REGRETS, SYNTHETIC, "A", margin)] == regrets


def test_rules_are_compared_by_their_mean_and_largest_regret():
    found = {row["rule"]: (row["mean"], row["largest"]) for row in rule_rows(REGRETS, SYNTHETIC)}
    assert found["always A"] == (2, 4)
    assert found["a random candidate"] == (1.5, 2)
    assert found["A, or what exceeds it by 2"] == (0, 0)


def test_the_margin_is_chosen_on_other_categories(monkeypatch):
    monkeypatch.setattr(selection, "_HELD_OUT", 1)
    # Category two chooses margin 0, with regret 2 on one; category one chooses 1, with regret 0 on two.
    assert held_out_regret(REGRETS, SYNTHETIC, "A") == 1


def test_ranks_are_correlated_by_category():
    runs = pd.DataFrame(
        {
            "category": ["one"] * 3 + ["two"] * 3,
            "real": [1, 2, 3] * 2,
            **{kind: [4, 6, 9, 3, 2, 1] for kind in [*KINDS, "mean"]},
        }
    )
    table = correlations(runs)
    assert table["mean"].tolist() == pytest.approx([1, -1, 0])


def test_runs_that_are_in_the_output_are_not_repeated(tmp_path, monkeypatch, capsys):
    candidates = [Candidate("it at 64 px", "anomalib.models.Padim", {"n_features": 10}, (64, 64))]
    data = {
        "class_path": "Assembly",
        "init_args": {"root": str(tmp_path), "n_train": 12, "n_validation": 1, "n_test": 2},
    }
    monkeypatch.setattr(selection, "CANDIDATES", candidates)
    monkeypatch.setattr(selection, "categories_in", lambda _: {"tray": data})
    monkeypatch.setattr(selection, "print_tables", lambda _: None)
    monkeypatch.setattr(trial_features, "SYNTHETIC", 84)
    # For few images no graph of the backbone is made.
    monkeypatch.setattr(choosing, "SYNTHETIC", 0)
    main(output=tmp_path / "runs")
    assert "tray it at 64 px" in capsys.readouterr().out
    main(output=tmp_path / "runs")
    assert "tray" not in capsys.readouterr().out
    (row,) = rows(tmp_path / "runs")
    assert row.keys() == {"category", "candidate", "real", "mean", *KINDS}
    assert 0 <= row["real"] <= 100
