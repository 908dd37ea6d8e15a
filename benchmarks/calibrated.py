"""Models fitted to features that are extracted once, with the scores that calibrate their verdicts.

Pradot, WtFlow and Duo are fitted as in a training, without the trainer: to all images, and again without each fold of
them. One fit of Duo measures three models, as its parts are a WtFlow and a Pradot. Alone, a Pradot takes batches of 32
images instead of 16, and a training of it may end before the last of its epochs. Foct is trained on the images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from numpy.typing import NDArray
from torch import Tensor

from anomalib_ot.comparison import Job
from anomalib_ot.comparison.measurement import QUIET
from anomalib_ot.features.extraction import FeatureMaps
from anomalib_ot.features.given import on_features
from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.host.cross_fit import FoldFeatures, left_out
from anomalib_ot.host.seeding import own_seed
from anomalib_ot.models.duo import DuoModel
from anomalib_ot.models.duo.torch_model import PartScores

Numbers = NDArray[np.float64]
_Scored = TypeVar("_Scored")
_BATCH = 16


@dataclass(frozen=True)
class Calibrated:
    """A fitted model, or the models that one fit measures.

    Args:
        calibration: Scores (n,) of training images that calibrate each model; empty without folds.
        score: From the feature map (B, D, H, W) of each layer to the image scores (B,) of each model.
    """

    calibration: dict[str, Numbers]
    score: Callable[[FeatureMaps], dict[str, Tensor]]

    @torch.no_grad()
    def scores_of(self, features: FeatureMaps) -> dict[str, Numbers]:
        """Image scores (N,) of each model for the feature map (N, D, H, W) of each layer; no models without images."""
        return _joined([self.score(batch) for batch in batches_of(features)])


def batches_of(features: FeatureMaps) -> list[FeatureMaps]:
    """Batches (B, D, H, W) of the feature maps (N, D, H, W) of each layer."""
    count = len(next(iter(features.values())))
    parts = [slice(start, start + _BATCH) for start in range(0, count, _BATCH)]
    return [{layer: maps[part] for layer, maps in features.items()} for part in parts]


def fitted_on_features(
    job: Job, features: FeatureMaps, size: tuple[int, int], seed: int, *, has_folds: bool = True
) -> Calibrated:
    """Fit a Pradot, a WtFlow, or a Duo with its parts, and calibrate it.

    Args:
        job: A run of the model.
        features: Feature map (N, D, H, W) of each of its layers, and maybe others, for the training images.
        size: Height and width of the images, in pixels.
        seed: Seed of all random numbers.
        has_folds: Whether folds calibrate the model. A Duo without them has parts only, as folds give it the weights.
    """
    name = job.key.model

    def unweighed(network: Any) -> Callable[[FeatureMaps], Any]:
        is_duo = isinstance(network, DuoModel)
        return network.part_scores if is_duo else lambda maps: network.score(maps, size).pred_score

    network, batches = fitted_with_folds(job, features, seed, unweighed, has_folds=has_folds)
    if isinstance(network, DuoModel) and has_folds:
        network.weigh(batches, size)

    def named(scored: Any) -> dict[str, Tensor]:
        if not isinstance(network, DuoModel):
            return {name: scored}
        whole = {name: network.combine(scored, size).pred_score} if has_folds else {}
        return whole | {part: maps.flatten(1).amax(1) for part, maps in part_maps(network, scored, size).items()}

    scorer = unweighed(network)
    return Calibrated(_joined([named(batch) for batch in batches]), lambda maps: named(scorer(maps)))


def fitted_with_folds(
    job: Job,
    features: FeatureMaps,
    seed: int,
    scorer_of: Callable[[Any], Callable[[FeatureMaps], _Scored]],
    *,
    has_folds: bool = True,
) -> tuple[Any, list[_Scored]]:
    """Fit a network to all images, and score them by networks that are fitted without them.

    Args:
        job: A run of a Pradot, a WtFlow or a Duo.
        features: Feature map (N, D, H, W) of each of its layers, and maybe others.
        seed: Seed of all random numbers.
        scorer_of: What scores feature maps (B, D, H, W) of each layer with a network.
        has_folds: Whether to score the images.

    Returns:
        The network, and the scores of each batch of images; none without folds.
    """
    seed_everything(seed, workers=True, verbose=False)
    model: Any = job.create_model()
    own = FeatureDataset({layer: features[layer] for layer in model.model.feature_extractor.layers})
    known = FoldFeatures(own, min(model.batch_size, len(own)), torch.device("cpu"), seed)
    # The networks of the folds take the scale of the one that is fitted to all images.
    network = model.model = model.fit_fold(known)
    if not has_folds:
        return network, []
    # As at the end of a training.
    with own_seed(seed):
        scored = left_out(known, model.settings.calibration_folds, lambda rest: scorer_of(model.fit_fold(rest)))
    return network, scored


def part_maps(network: DuoModel, scores: PartScores, size: tuple[int, int]) -> dict[str, Tensor]:
    """The map (B, 1, h, w) of each part of a Duo, from its score maps, as each part alone has it."""
    pradot, wt_flow = scores
    return {
        "Pradot": network.pradot.anomaly_map_generator(pradot, size),
        "WtFlow": network.wt_flow.anomaly_map_generator(wt_flow, size),
    }


def fitted_on_images(job: Job, data: AnomalibDataModule, size: tuple[int, int], seed: int) -> Calibrated:
    """Fit a Foct, whose support images calibrate it.

    Args:
        job: A run of the model.
        data: The training images.
        size: Height and width of the images, in pixels.
        seed: Seed of all random numbers.
    """
    seed_everything(seed, workers=True, verbose=False)
    model = job.create_model()
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, limit_val_batches=1, **QUIET)
        engine.fit(model, datamodule=data)
    one = on_features(model.model.eval(), size)

    def score(maps: FeatureMaps) -> dict[str, Tensor]:
        count = len(next(iter(maps.values())))
        images = ({layer: each[index : index + 1] for layer, each in maps.items()} for index in range(count))
        return {job.key.model: torch.stack([one(image)[0] for image in images])}

    return Calibrated({job.key.model: np.array(model.calibration_scores.images)}, score)


def _joined(batches: list[dict[str, Tensor]]) -> dict[str, Numbers]:
    names = batches[0] if batches else ()
    return {name: torch.cat([batch[name] for batch in batches]).double().numpy() for name in names}
