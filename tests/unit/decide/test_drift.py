"""The drift monitor: its promised rate of false alarms, its power, and its state."""

import json

import numpy as np
import pytest
from scipy.stats import binom, kstest

from anomalib_ot.decide import DriftMonitor

STREAMS = 300


def run(monitor, scores):
    return [monitor.update(float(score)) for score in scores]


def alarms(count, calibration, stream, rate=0.05, **settings):
    """Number of streams with an alarm; each has its own calibration images."""
    found = 0
    for seed in range(count):
        random = np.random.default_rng(seed)
        monitor = DriftMonitor(calibration(random), rate, seed, **settings)
        found += run(monitor, stream(random))[-1].is_alarm
    return found


@pytest.mark.parametrize(
    "kind", ["normal", "heavy tails", "ties", "few", "stream alone", "lower only in the calibration"]
)
def test_exchangeable_streams_raise_no_more_alarms_than_promised(kind):
    draw = {
        "heavy tails": lambda random, size: random.standard_cauchy(size),
        "ties": lambda random, size: random.integers(0, 4, size).astype(float),
    }.get(kind, lambda random, size: random.normal(size=size))
    size = 5 if kind == "few" else 60
    settings, shift = ({"watch_lower": False}, 0.5) if kind.startswith("lower") else ({}, 0.0)

    def calibration(random):
        return None if kind == "stream alone" else draw(random, size) + shift

    found = alarms(STREAMS, calibration, lambda random: draw(random, 500), **settings)
    assert found <= binom.ppf(0.999, STREAMS, 0.05)


def test_p_values_of_a_stream_are_independent_and_uniform():
    lag = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        states = run(DriftMonitor(random.normal(size=10), 1e-6, seed), random.normal(size=200))
        values = np.array([state.p_value for state in states])
        assert kstest(values, "uniform").pvalue > 1e-4
        lag.append(np.corrcoef(values[1:], values[:-1])[0, 1])
    assert abs(np.mean(lag)) < 4 / np.sqrt(20 * 199)


@pytest.mark.parametrize("shift", [-3.0, 1.5, 3.0, 50.0])
@pytest.mark.parametrize("began", [0, 400])
def test_a_shift_is_found_with_its_direction_and_beginning(shift, began):
    delays, errors = [], []
    for seed in range(10):
        random = np.random.default_rng(seed)
        scores = random.normal(size=began + 100)
        scores[began:] += shift
        states = run(DriftMonitor(random.normal(size=60), seed=seed), scores)
        first = next(state for state in states if state.is_alarm)
        assert first.is_higher == (shift > 0)
        assert states[-1].began == first.began
        delays.append(first.index + 1 - began)
        errors.append(abs(first.began - began))
    assert min(delays) >= 7
    assert np.median(delays) <= 40
    assert np.median(errors) <= 2


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_a_shift_is_found_within_the_stream_alone(shift):
    random = np.random.default_rng(0)
    scores = random.normal(size=300)
    scores[200:] += shift
    monitor = DriftMonitor(None)
    states = run(monitor, scores[:-1])
    assert states[-1].is_alarm
    assert states[-1].is_higher == (shift > 0)
    assert abs(states[-1].began - 200) <= 2
    # The first image has nothing to differ from.
    for watch_lower in (True, False):
        states = run(DriftMonitor(None, 0.95, watch_lower=watch_lower), [*np.linspace(0, 5, 20)])
        assert next(state for state in states if state.is_alarm).began >= 1
    with pytest.raises(ValueError, match="the state of the drift monitor is damaged"):
        DriftMonitor.from_dict(monitor.to_dict() | {"calibration": []})
    again = DriftMonitor.from_dict(monitor.to_dict())
    assert again.update(scores[-1]) == monitor.update(scores[-1])


def test_lower_scores_are_found_only_if_they_are_watched():
    random = np.random.default_rng(0)
    calibration, scores = random.normal(size=60), random.normal(-3, 1, size=100)
    assert run(DriftMonitor(calibration), scores)[-1].is_alarm
    assert not run(DriftMonitor(calibration, watch_lower=False), scores)[-1].is_alarm


def test_anomalous_images_less_than_double_the_martingale():
    states = run(DriftMonitor(np.linspace(0, 1, 100)), [1e30] * 6)
    values = np.array([1.0, *(state.martingale for state in states)])
    assert (values[1:] < 2 * values[:-1]).all()
    assert not states[-1].is_alarm


def test_a_few_percent_of_anomalous_images_raise_no_alarm():
    def stream(random):
        return random.normal(size=2000) + 9 * (random.random(2000) < 0.03)

    assert alarms(20, lambda random: random.normal(size=60), stream, 0.01) == 0


def test_the_alarm_stays_and_later_images_are_compared_with_those_before_it():
    random = np.random.default_rng(0)
    states = run(DriftMonitor(random.normal(size=60)), random.normal(9, 1, size=500))
    first = next(state for state in states if state.is_alarm)
    later = states[first.index :]
    assert all(state.is_alarm and state.martingale == first.martingale for state in later)
    assert np.mean([state.p_value for state in later]) < 0.2


def test_a_monitor_continues_from_its_state():
    random = np.random.default_rng(0)
    calibration, scores = random.normal(size=30), random.normal(0.5, 1, size=120)
    whole = run(DriftMonitor(calibration, 0.02, 7, watch_lower=False), scores)
    monitor = DriftMonitor(calibration, 0.02, 7, watch_lower=False)
    run(monitor, scores[:50])
    restored = DriftMonitor.from_dict(json.loads(json.dumps(monitor.to_dict())))
    assert run(restored, scores[50:]) == whole[50:]
    assert run(DriftMonitor(calibration, 0.02, 8, watch_lower=False), scores) != whole


def test_a_state_does_not_change_with_the_monitor():
    monitor = DriftMonitor([0.0, 1.0])
    state = monitor.to_dict()
    monitor.update(0.5)
    assert (state["calibration"], state["scores"]) == ([0.0, 1.0], [])
    state["calibration"].append(2.0)
    assert monitor.to_dict()["calibration"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format must be 1, not 2"),
        ({"scores": None}, "is damaged"),
        ({"scores": [float("nan")]}, "must be finite"),
        ({"calibration": [1.0]}, "at least 2 good images, got 1"),
    ],
)
def test_a_damaged_state_is_refused(change, reason):
    state = DriftMonitor([0.0, 1.0]).to_dict()
    with pytest.raises(ValueError, match=f"{reason}.*start a new monitor"):
        DriftMonitor.from_dict(state | change)
    with pytest.raises(ValueError, match=r"damaged or of another version \('seed'\)"):
        DriftMonitor.from_dict({name: value for name, value in state.items() if name != "seed"})


@pytest.mark.parametrize(
    ("calibration", "settings", "reason"),
    [
        ([0.0, 1.0], {"false_alarm_rate": 0}, "false_alarm_rate must be between 0 and 1"),
        ([0.0, 1.0], {"seed": -1}, "seed must be at least 0"),
        ([0.5, 0.5], {}, "all 2 scores of good images are 0.5"),
        ([0.5, float("inf")], {}, "1 of 2 scores of good images are NaN or infinite"),
    ],
)
def test_what_cannot_be_monitored_is_refused(calibration, settings, reason):
    with pytest.raises(ValueError, match=reason):
        DriftMonitor(calibration, **settings)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_changes_nothing(score):
    monitor, other = DriftMonitor([0.0, 1.0]), DriftMonitor([0.0, 1.0])
    with pytest.raises(ValueError, match="a score must be finite; check the image"):
        monitor.update(score)
    assert monitor.update(0.5) == other.update(0.5)
