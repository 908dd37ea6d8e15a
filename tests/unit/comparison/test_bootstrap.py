"""Tests of the paired bootstrap against a slow count of pairs."""

import time
import tracemalloc
from itertools import product

import numpy as np
import pytest
from scipy.stats import rankdata

from anomalib_ot.comparison.bootstrap import paired_bootstrap
from anomalib_ot.comparison.record import Key, Predictions


def predictions(scores, labels, kinds=None):
    kinds = kinds or ["dent" if label else "good" for label in labels]
    images = [f"{kind}/{i:03}.png" for i, kind in enumerate(kinds)]
    return Predictions(images, kinds, np.array(labels), np.array(scores, dtype=np.float32))


def runs(model, *several):
    return {Key("screw", model, None, seed): it for seed, it in enumerate(several)}


def random_runs(model, generator, labels, seeds=2, gain=0.5):
    # Rounded, so that there are ties.
    return runs(
        model,
        *(predictions((generator.normal(size=len(labels)) + gain * labels).round(1), labels) for _ in range(seeds)),
    )


def slow_auroc(scores, labels):
    pairs = list(product(scores[labels == 1], scores[labels == 0]))
    return 100 * sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def rank_auroc(scores, labels):
    n_normal, n_anomalous = np.bincount(labels)
    ranks = rankdata(scores, axis=-1)[..., labels == 1].sum(-1)
    return 100 * (ranks - n_anomalous * (n_anomalous + 1) / 2) / (n_anomalous * n_normal)


@pytest.fixture
def labels():
    return np.repeat([0, 1], [13, 17])


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_difference_is_that_of_the_aurocs_with_ties(generator, labels):
    ours, theirs = (random_runs(name, generator, labels, seeds=3, gain=gain) for name, gain in (("A", 1), ("B", 0.3)))
    aurocs = [[slow_auroc(it.scores, labels) for it in some.values()] for some in (ours, theirs)]
    assert len(np.unique(next(iter(ours.values())).scores)) < len(labels)
    assert paired_bootstrap(ours, theirs).mean == pytest.approx(np.mean(aurocs[0]) - np.mean(aurocs[1]))


def test_interval_is_that_of_resampled_images(generator, labels):
    ours, theirs = (random_runs(name, generator, labels, gain=gain) for name, gain in (("A", 1), ("B", 0.3)))
    fast = paired_bootstrap(ours, theirs, resamples=4000, confidence=0.9)
    drawn = np.concatenate([generator.choice(13, (4000, 13)), 13 + generator.choice(17, (4000, 17))], axis=1)
    aurocs = [[rank_auroc(it.scores[drawn], labels) for it in some.values()] for some in (ours, theirs)]
    slow = np.mean(aurocs[0], axis=0) - np.mean(aurocs[1], axis=0)
    assert [fast.low, fast.high] == pytest.approx(np.quantile(slow, [0.05, 0.95]), abs=1)


def test_interval_is_that_of_all_pairs_weighted_by_their_images(generator, labels):
    ours, theirs = (random_runs(name, generator, labels, gain=gain) for name, gain in (("A", 1), ("B", 0.3)))
    result = paired_bootstrap(ours, theirs, resamples=200, seed=3)
    # The draws, first of the anomalous images.
    draws = np.random.default_rng(3)
    anomalous, normal = (draws.multinomial(n, np.full(n, 1 / n), size=200) for n in (17, 13))
    pairs = [it.scores[labels == 1, None] - it.scores[labels == 0] for some in (ours, theirs) for it in some.values()]
    first, second, *others = ((np.sign(each) + 1) / 2 for each in pairs)
    differences = np.einsum("ri,ij,rj->r", anomalous, first + second - sum(others), normal) * 100 / (2 * 13 * 17)
    assert [result.low, result.high] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=1e-10)


def test_model_against_itself_is_nothing(generator, labels):
    ours = random_runs("A", generator, labels)
    result = paired_bootstrap(ours, runs("B", *ours.values()))
    assert (result.mean, result.low, result.high) == (0, 0, 0)


def test_sign_and_bounds(labels):
    best, worst = (runs(name, predictions(sign * labels, labels)) for name, sign in (("A", 1), ("B", -1)))
    assert (paired_bootstrap(best, worst).low, paired_bootstrap(worst, best).high) == (100, -100)


def test_same_seed_same_interval(generator, labels):
    ours, theirs = (random_runs(name, generator, labels) for name in "AB")
    assert paired_bootstrap(ours, theirs) == paired_bootstrap(ours, theirs)
    assert paired_bootstrap(ours, theirs) != paired_bootstrap(ours, theirs, seed=1)


def test_images_are_matched_by_kind_and_name(generator, labels):
    (ours, theirs), order = (random_runs(name, generator, labels) for name in "AB"), generator.permutation(len(labels))
    shuffled = {
        key: Predictions(
            [f"/elsewhere/{it.images[i]}" for i in order],
            [it.kinds[i] for i in order],
            it.labels[order],
            it.scores[order],
        )
        for key, it in theirs.items()
    }
    assert paired_bootstrap(ours, shuffled) == paired_bootstrap(ours, theirs)


def test_only_seeds_that_both_have_count(generator, labels):
    ours, theirs = (random_runs(name, generator, labels, seeds=3) for name in "AB")
    of_two = dict(list(theirs.items())[1:])
    result = paired_bootstrap(ours, of_two)
    assert result.seeds == (1, 2)
    assert result == paired_bootstrap(dict(list(ours.items())[1:]), of_two)


def test_interval_covers_the_truth():
    generator, labels = np.random.default_rng(1), np.repeat([0, 1], 50)
    covered = 0
    for _ in range(200):
        # Both models are equally good and share most of the noise of an image.
        shared = generator.normal(size=100) + labels
        ours, theirs = (runs(name, predictions(shared + 0.5 * generator.normal(size=100), labels)) for name in "AB")
        result = paired_bootstrap(ours, theirs, resamples=300)
        covered += result.low <= 0 <= result.high
    assert 0.9 <= covered / 200 <= 0.99


def test_many_images_take_little_time(generator):
    labels = np.repeat([0, 1], 300)
    ours, theirs = (random_runs(name, generator, labels, seeds=3) for name in "AB")
    start = time.perf_counter()
    paired_bootstrap(ours, theirs)
    assert time.perf_counter() - start < 5


def test_memory_grows_with_the_images_not_with_their_pairs(generator):
    labels = np.repeat([0, 1], 5000)
    ours, theirs = (random_runs(name, generator, labels, seeds=2) for name in "AB")
    tracemalloc.start()
    try:
        paired_bootstrap(ours, theirs, resamples=20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # All pairs in double precision would take 200 MB.
    assert peak < 2e7


@pytest.mark.parametrize("change", ["label", "kind"])
def test_different_images_cannot_be_compared(generator, labels, change):
    ours = random_runs("A", generator, labels, seeds=1)
    others = labels.copy()
    others[0] = change == "label"
    kinds = ["good"] + ["dent" if label else "good" for label in labels[1:]]
    kinds[-1] = "dent" if change == "label" else "scratch"
    theirs = runs("B", predictions(labels, others, kinds))
    with pytest.raises(ValueError, match=r"A on screw, seed 0 and B on screw, seed 0 .* run both again"):
        paired_bootstrap(ours, theirs)


def test_no_seed_in_common(generator, labels):
    ours, theirs = (random_runs(name, generator, labels) for name in "AB")
    first, second = ours.items()
    with pytest.raises(ValueError, match=r"A on screw, seed 0 and B on screw, seed 1 have no seed in common"):
        paired_bootstrap(dict([first]), dict([list(theirs.items())[1]]))
    with pytest.raises(ValueError, match="A on screw, seed 1 and no run"):
        paired_bootstrap(dict([second]), {})


def test_scores_that_are_not_a_number(generator, labels):
    ours, broken = random_runs("A", generator, labels, seeds=1), runs("B", predictions(labels * np.nan, labels))
    with pytest.raises(ValueError, match="B on screw, seed 0 has scores that are NaN"):
        paired_bootstrap(ours, broken)


def test_one_class_has_no_auroc():
    normal = runs("A", predictions([0.1, 0.2], [0, 0]))
    with pytest.raises(ValueError, match="2 normal and 0 anomalous images; AUROC needs both"):
        paired_bootstrap(normal, normal)
