"""AU-sPRO on drawn maps and defects, against the definition, one threshold after the other."""

import warnings
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from anomalib_ot.data.defects import Defects
from anomalib_ot.metrics import AUSPRO, PROCurve

KINDS = ("logical_anomalies", "structural_anomalies")
properties = settings(derandomize=True, deadline=None, database=None, max_examples=15)
limits = st.sampled_from([0.001, 0.05, 0.3, 0.999, 1.0])


@st.composite
def categories(draw):
    """Pictures, of which some are normal: their paths, scores and defects.

    Scores are few numbers of either sign, so that there are ties within and across pictures, or all the same. Defects
    are random pixels, from a single one to all of the picture, overlap, and saturate at a whole number of pixels.
    """
    size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    # Steps of an eighth are not rounded.
    steps = draw(st.sampled_from([0.125, 1.0]))
    folders = draw(st.lists(st.sampled_from(["good", *KINDS]), min_size=1, max_size=6))
    pictures = []
    for number, folder in enumerate(folders):
        scores = steps * (rng.integers(levels, size=size) - levels // 2)
        count = 0 if folder == "good" else rng.integers(1, 4)
        masks = rng.random((count, *size)) < rng.choice([0.0, 0.2, 0.6, 1.0], size=(count, 1, 1))
        masks[:, rng.integers(size[0]), rng.integers(size[1])] = True
        areas = [rng.integers(1, mask.sum() + 1) for mask in masks]
        defects = Defects(torch.from_numpy(masks).byte(), torch.tensor(areas, dtype=torch.float64))
        pictures.append((f"test/{folder}/{number:03d}.png", torch.from_numpy(scores).float(), defects))
    return pictures


@contextmanager
def files(pictures):
    """Defects as if they had been read from files, which other tests do."""
    defects = {path: each for path, _, each in pictures}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomalib_ot.metrics.au_spro.image_defects", lambda path: defects[path])
        yield


def updated(pictures, limit, batch_size=6):
    metric = AUSPRO(fpr_limit=limit)
    with files(pictures):
        for start in range(0, len(pictures), batch_size):
            paths, scores, _ = zip(*pictures[start : start + batch_size], strict=True)
            maps = torch.stack(scores)
            metric.update(ImageBatch(image=torch.zeros(len(maps), 3, 1, 1), anomaly_map=maps, image_path=list(paths)))
    return metric


def slow_curve(pictures, kind):
    """Points (false-positive rate, mean sPRO), or None where a rate or an overlap is not defined."""
    normal, overlaps = [], []
    for path, scores, defects in pictures:
        folder = path.split("/")[1]
        if folder == "good":
            normal.append(scores.flatten())
        elif folder == kind:
            normal.append(scores[~defects.masks.bool().any(0)])
            overlaps += [
                (scores[mask.bool()], area) for mask, area in zip(defects.masks, defects.saturation, strict=True)
            ]
    normal = torch.cat([torch.zeros(0), *normal])
    if not len(normal) or not overlaps:
        return None
    curve = [(0.0, 0.0)]
    for threshold in sorted({float(score) for _, scores, _ in pictures for score in scores.flatten()}, reverse=True):
        rate = float((normal >= threshold).double().mean())
        sums = [min(float((scores >= threshold).sum() / area), 1.0) for scores, area in overlaps]
        curve.append((rate, sum(sums) / len(sums)))
    return curve


def slow_area(curve, limit):
    """Area by the trapezoidal rule, cut off at the limit."""
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < x1 and x0 < limit:
            end = min(x1, limit)
            area += (end - x0) * (y0 + (y1 - y0) * (end - x0) / (x1 - x0) / 2)
    return area / limit


@properties
@given(categories(), limits)
def test_areas_and_curves_are_those_of_the_definition(pictures, limit):
    metric = updated(pictures, limit)
    expected = {kind: slow_curve(pictures, kind) for kind in KINDS}
    for kind, area in metric.per_kind().items():
        if expected[kind] is None:
            assert area.isnan()
            with pytest.raises(ValueError, match=f"there is no curve of {kind}"):
                metric.curve(kind)
            continue
        assert float(area) == pytest.approx(slow_area(expected[kind], limit), abs=1e-6)
        # Thresholds of other kinds' pictures alone add no point to a curve.
        points = sorted(set(expected[kind]))
        torch.testing.assert_close(torch.stack(metric.curve(kind), 1), torch.tensor(points).double(), atol=1e-6, rtol=0)
    areas = [slow_area(curve, limit) for curve in expected.values() if curve is not None]
    if areas:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert float(metric.compute()) == pytest.approx(sum(areas) / len(areas), abs=1e-6)
    else:
        with pytest.warns(UserWarning, match="AU-sPRO is undefined"):
            assert metric.compute().isnan()


@properties
@given(categories(), limits, st.integers(1, 3), st.randoms(use_true_random=False))
def test_batches_and_their_order_change_no_digit(pictures, limit, batch_size, random):
    expected = updated(pictures, limit)
    shuffled = updated(random.sample(pictures, len(pictures)), limit, batch_size)
    for name in ("overlap", "defect_free"):
        assert torch.equal(getattr(shuffled, name), getattr(expected, name))
    torch.testing.assert_close(shuffled.per_kind(), expected.per_kind(), atol=0, rtol=0, equal_nan=True)


@properties
@given(categories(), limits)
def test_a_map_that_finds_all_scores_one_and_one_that_finds_nothing_the_least(pictures, limit):
    perfect = [(path, defects.masks.sum(0).clamp(max=1).float(), defects) for path, _, defects in pictures]
    inverted = [(path, -scores, defects) for path, scores, defects in perfect]
    for kind, area in updated(perfect, limit).per_kind().items():
        if not area.isnan():
            assert float(area) == pytest.approx(1)
            assert float(updated(inverted, limit).per_kind()[kind]) == pytest.approx(0, abs=1e-6)


@properties
@given(categories(), st.floats(-100, 100), limits)
def test_maps_of_one_score_are_worth_half_the_limit(pictures, score, limit):
    constant = [(path, torch.full_like(scores, score), defects) for path, scores, defects in pictures]
    for area in updated(constant, limit).per_kind().values():
        assert area.isnan() or float(area) == pytest.approx(limit / 2)


def test_a_defect_may_cover_its_whole_picture():
    masks = torch.zeros(2, 2, 3)
    masks[0] = 1
    curve = PROCurve(1.0, points=2)
    curve.update(masks, masks)
    assert float(curve.area()) == 1
    assert int(curve.defect_free[0].sum()) == 6


@properties
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([0.2, 0.5, 0.9]), limits, st.integers(2, 9))
def test_pro_curve_is_that_of_connected_regions(seed, pictures, share, limit, points):
    rng = np.random.default_rng(seed)
    masks = rng.random((pictures, 6, 7)) < share
    scores = rng.integers(-4, 4, size=masks.shape) / 2
    drawn = []
    for number, (mask, values) in enumerate(zip(masks, scores, strict=True)):
        regions, count = label(mask, structure=np.ones((3, 3)))
        each = torch.from_numpy(
            np.array([regions == region for region in range(1, count + 1)]).reshape(-1, *mask.shape)
        )
        defects = Defects(each.byte(), each.flatten(1).sum(1).double())
        drawn.append((f"test/{KINDS[0]}/{number:03d}.png", torch.from_numpy(values).float(), defects))
    expected = slow_curve(drawn, KINDS[0])
    curve = PROCurve(limit, points)
    curve.update(torch.from_numpy(scores).float(), torch.from_numpy(masks))
    if expected is None:
        assert curve.area().isnan()
        return
    assert float(curve.area()) == pytest.approx(slow_area(expected, limit), abs=1e-6)
    rates, overlaps = (values.numpy() for values in curve.compute())
    assert rates == pytest.approx(np.linspace(0, limit, points), abs=1e-6)
    x, y = np.array(expected).T
    assert overlaps == pytest.approx(np.interp(np.linspace(0, limit, points), x, y), abs=1e-5)
