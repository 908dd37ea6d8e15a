"""Figures of a trial, and the order of trials."""

import json
from dataclasses import replace

import pytest

from anomalib_ot.selection import Candidate, Detected, Trial, rank
from anomalib_ot.selection.trial import image_auroc
from anomalib_ot.selection.trial_features import MOST_HELD_OUT, MOST_TO_FIT, divide

TRIAL = Trial(
    Candidate("A", "WtFlow", {"width": 16}, (64, 96)),
    {"blur": 70.0, "stain": 90.0},
    80.0,
    2.5,
    7.5,
    0.05,
    (Detected(0.001, 0.5, 0.25, 8),),
)


def of(name, mean):
    return replace(TRIAL, candidate=Candidate(name, "WtFlow"), mean=mean)


@pytest.mark.parametrize(
    ("good", "anomalous", "auroc"), [([1, 2], [3, 4], 100), ([3, 4], [1, 2], 0), ([1, 3], [2], 50), ([1, 2], [2], 75)]
)
def test_the_auroc_counts_pairs_and_half_of_the_ties(good, anomalous, auroc):
    assert image_auroc(good, anomalous) == auroc


def test_a_trial_survives_json():
    assert Trial.from_dict(json.loads(json.dumps(TRIAL.to_dict()))) == TRIAL


@pytest.mark.parametrize(
    ("means", "order"),
    [
        ({"default": 90, "A": 95, "B": 80}, ["A", "default", "B"]),
        ({"default": 90, "A": 91.5, "B": 91}, ["default", "A", "B"]),
        ({"A": 91, "B": 92}, ["B", "A"]),
        ({"default": 90}, ["default"]),
    ],
)
def test_another_candidate_is_chosen_if_it_exceeds_the_default_by_the_margin(means, order):
    trials = [of(name, mean) for name, mean in means.items()]
    assert [trial.candidate.name for trial in rank(trials, "default", margin=2)] == order


def test_the_margin_is_a_point():
    for lead, first in ((0.9, "default"), (1.1, "A")):
        assert rank([of("A", 50 + lead), of("default", 50)], "default")[0].candidate.name == first


@pytest.mark.parametrize("other", [{"image_size": (336, 336)}, {"backbone": "resnet18"}])
def test_candidates_of_another_size_or_backbone_are_information(other):
    larger = of("A", 99)
    larger = replace(larger, candidate=replace(larger.candidate, **other))
    trials = [larger, of("default", 50), of("B", 70), of("C", 20)]
    assert [trial.candidate.name for trial in rank(trials, "default")] == ["B", "A", "default", "C"]
    assert [trial.candidate.name for trial in rank(trials, "default", margin=30)] == ["default", "A", "B", "C"]


@pytest.mark.parametrize(
    ("count", "to_fit", "held_out"), [(10, 8, 2), (60, 48, 12), (1000, MOST_TO_FIT, MOST_HELD_OUT)]
)
def test_a_fifth_is_held_out_up_to_a_number(count, to_fit, held_out, tmp_path):
    paths = [tmp_path / f"{index:04}.png" for index in range(count)]
    division = divide(paths[::-1], 0)
    assert (len(division.to_fit), len(division.held_out)) == (to_fit, held_out)
    assert len({*division.to_fit, *division.held_out}) == to_fit + held_out
    assert division == divide(paths, 0)
    assert division != divide(paths, 1)
