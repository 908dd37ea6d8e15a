"""Fits Lightning models on cached features, without a trainer."""

import io
from contextlib import redirect_stderr
from typing import Any

import torch
from anomalib.models.components import MemoryBankMixin

from anomalib_ot.features.given import GivenFeatures, Scorer, on_features
from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.host.cross_fit import FoldFeatures
from anomalib_ot.host.feature_training import FeatureTraining

_BATCH = 16


def fit_on_features(model: Any, features: FeatureDataset, image_size: tuple[int, int], seed: int = 0) -> Scorer:
    """Fit a model on cached features of good images.

    Args:
        model: A new Lightning model: one of this package that trains on features, or one of anomalib with a memory
            bank, such as PaDiM and PatchCore. Its feature extractor is replaced.
        features: Features of the images, of the layers of the model and maybe others.
        image_size: Height and width of the images, in pixels.
        seed: Seed of the order of the images. The caller sets that of torch's random numbers.

    Returns:
        Scores features.

    Raises:
        TypeError: If the model is of neither kind.
    """
    if not isinstance(model, FeatureTraining | MemoryBankMixin):
        msg = (
            f"{type(model).__name__} cannot be fitted on features: a candidate must be a model of this package that "
            "trains on features, or one of anomalib with a memory bank"
        )
        raise TypeError(msg)
    network: Any = model.model
    own = FeatureDataset({layer: features.features[layer] for layer in network.feature_extractor.layers})
    if isinstance(model, FeatureTraining):
        size = min(model.batch_size, len(own))
        network = model.fit_on(FoldFeatures(own, size, torch.device("cpu"), seed))
    else:
        _fit_memory_bank(model, own, image_size)
    return on_features(network, image_size)


def _fit_memory_bank(model: Any, features: FeatureDataset, image_size: tuple[int, int]) -> None:
    network = model.model
    extractor, network.feature_extractor = network.feature_extractor, GivenFeatures()
    network.train()
    with torch.no_grad():
        for start in range(0, len(features), _BATCH):
            network.feature_extractor.features = features[range(start, min(start + _BATCH, len(features)))]
            network(torch.empty(1, 3, *image_size))
        # PatchCore's own bar would disturb the progress display.
        with redirect_stderr(io.StringIO()):
            model.fit()
    network.eval()
    network.feature_extractor = extractor
