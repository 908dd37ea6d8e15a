"""One candidate, fitted on some of the good images and scored on the others and on synthetic ones."""

import time
from dataclasses import asdict, dataclass
from math import nan
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from anomalib_ot.comparison.measurement import median_seconds
from anomalib_ot.decide.conformal import promised_rate, threshold
from anomalib_ot.features.given import Scorer
from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.synthetic import KINDS

from .candidates import Candidate
from .detection import Detected, detected_shares
from .fitting import fit_on_features
from .trial_features import TrialFeatures

Scores = NDArray[np.float64]

# Promised rate of false alarms of the detected shares. A lower one needs more images than are held out.
_RATE = 0.05
_REPEATS = 10


@dataclass(frozen=True)
class Trial:
    """How well a candidate finds synthetic anomalies.

    Attributes:
        candidate: The candidate.
        auroc: Image AUROC in percent by kind of defect, of synthetic against held-out good images; empty if the images
            are too small for defects.
        mean: Its mean over the kinds, NaN without any.
        fit_s: Seconds of the fit on extracted features.
        ms_per_image: Median milliseconds of pre-processing, backbone and scoring on single images.
        false_alarm_rate: Promised rate of false alarms of ``detection``: 5 %, or what the held-out images support.
        detection: Detected shares by area and contrast, over all kinds.
    """

    candidate: Candidate
    auroc: dict[str, float]
    mean: float
    fit_s: float
    ms_per_image: float
    false_alarm_rate: float
    detection: tuple[Detected, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Trial":
        """A trial from the values of :meth:`to_dict`, which may have been converted to JSON and back."""
        parts = {
            "candidate": Candidate.from_dict(values["candidate"]),
            "detection": tuple(Detected(**each) for each in values["detection"]),
        }
        return cls(**{**values, **parts})

    def to_dict(self) -> dict[str, Any]:
        """The trial as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """A fitted candidate and its scores.

    Attributes:
        candidate: The candidate.
        score: Scores features.
        good: Scores (n,) of the held-out good images.
        synthetic: Scores (m,) of the synthetic images.
        fit_s: Seconds of the fit.
        seconds_per_image: Median seconds to score the features of an image.
    """

    candidate: Candidate
    score: Scorer
    good: Scores
    synthetic: Scores
    fit_s: float
    seconds_per_image: float

    def trial(self, features: TrialFeatures) -> Trial:
        """What is known of the candidate, for the features that it was fitted and scored on.

        Raises:
            ValueError: If the scores of good images are equal or not finite.
        """
        kinds = np.array([kind for kind, *_ in features.labels], dtype=str)
        auroc = {kind: image_auroc(self.good, self.synthetic[kinds == kind]) for kind in KINDS if kind in kinds}
        rate = promised_rate(_RATE, len(self.good))
        detected = self.synthetic > threshold(self.good, rate)
        return Trial(
            candidate=self.candidate,
            auroc=auroc,
            mean=float(np.mean([*auroc.values()])) if auroc else nan,
            fit_s=self.fit_s,
            ms_per_image=1000 * (features.seconds_per_image + self.seconds_per_image),
            false_alarm_rate=rate,
            detection=tuple(detected_shares(features.labels, detected)),
        )


def run_trial(candidate: Candidate, features: TrialFeatures, seed: int = 0) -> Outcome:
    """Fit and score a candidate.

    Args:
        candidate: The candidate.
        features: Features at its image size.
        seed: Seed of the fit.
    """
    with isolate_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - PatchCore's projection draws from the global numbers
        model = candidate.untrained()
        start = time.perf_counter()
        score = fit_on_features(model, features.to_fit, candidate.image_size, seed)
        fit_s = time.perf_counter() - start
    good = scores_of(score, features.good)
    synthetic = np.empty(0) if features.synthetic is None else scores_of(score, features.synthetic)
    one = features.good[[0]]
    return Outcome(candidate, score, good, synthetic, fit_s, median_seconds(lambda: score(one), _REPEATS))


def scores_of(score: Scorer, features: FeatureDataset) -> Scores:
    """Scores (N,) of images, from their features."""
    return np.array([float(score(features[[index]])[0]) for index in range(len(features))])


def image_auroc(good: ArrayLike, anomalous: ArrayLike) -> float:
    """AUROC in percent: the share of the pairs in which the anomalous image scores higher, and half of the ties.

    Args:
        good: Scores (n,) of good images.
        anomalous: Scores (m,) of anomalous images.
    """
    scores = np.concatenate([good, anomalous])
    return 100 * float(roc_auc_score(np.arange(len(scores)) >= len(np.asarray(good)), scores))
