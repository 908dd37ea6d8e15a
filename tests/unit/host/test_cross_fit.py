"""Scores of training images by models that were fitted without them."""

import pytest
import torch
from anomalib.data import InferenceBatch
from torch.utils.data import Dataset

from anomalib_ot.host.calibration import FOLDS
from anomalib_ot.host.cross_fit import FoldFeatures, cross_fit


class Numbers(Dataset):
    """Features that say which image they are of."""

    def __len__(self):
        return 11

    def __getitems__(self, indices):
        return {"layer": torch.tensor(indices, dtype=torch.float)[:, None, None, None].expand(-1, 1, 2, 2)}


FEATURES = FoldFeatures(Numbers(), 4, torch.device("cpu"), seed=1)


def numbers(batches):
    return [int(number) for batch in batches for number in batch["layer"][:, 0, 0, 0]]


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_each_image_is_scored_once_by_a_model_that_has_not_seen_it(folds):
    seen, scored = [], []

    def fit(features):
        known = numbers(features.in_order())
        seen.append(known)

        def score(batch):
            left_out = numbers([batch])
            assert not {*left_out} & {*known}
            scored.extend(left_out)
            maps = batch["layer"]
            return InferenceBatch(pred_score=maps.mean((1, 2, 3)), anomaly_map=2 * maps)

        return score

    scores = cross_fit(FEATURES, folds, fit)
    assert sorted(scored) == list(range(11))
    assert len(seen) == folds
    assert scores.images == tuple(range(11))
    assert scores.maps == tuple(2 * score for score in scores.images)
    assert scores.source == FOLDS
    # The same seed gives the same folds.
    again = list(seen)
    seen.clear()
    cross_fit(FEATURES, folds, fit)
    assert seen == again


def test_epochs_have_an_order_of_their_own():
    first, second = (numbers(FEATURES.epoch(number)) for number in (0, 1))
    assert sorted(first) == sorted(second) == numbers(FEATURES.in_order())
    assert first != second
    assert numbers(FEATURES.epoch(0)) == first


def test_scores_that_are_no_numbers_are_refused():
    def fit(_):
        return lambda batch: InferenceBatch(
            pred_score=torch.full((len(batch["layer"]),), float("nan")), anomaly_map=batch["layer"]
        )

    with pytest.raises(ValueError, match="scores that are NaN or infinite"):
        cross_fit(FEATURES, 2, fit)
