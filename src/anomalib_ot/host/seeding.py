"""Seeds: that of a model, as anomalib's command ignores its ``seed_everything``, and that of the user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import Dataset, RandomSampler, Sampler

from .model_settings import ModelSettings

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule


class Seeded:
    """Part of a Lightning model whose setting ``seed`` decides all random numbers of a training on given images.

    The model creates its weights within :func:`own_seed`.

    Attributes:
        settings: The model's settings.
    """

    settings: ModelSettings

    def setup(self, stage: str) -> None:
        """Set the seed when a training starts, before images are loaded. They are divided before."""
        if stage == TrainerFn.FITTING and self.settings.seed is not None:
            seed_everything(self.settings.seed, workers=True, verbose=False)
        cast("AnomalibModule", super()).setup(stage)


@contextmanager
def own_seed(seed: int | None) -> Iterator[None]:
    """Draw random numbers from a seed, and leave those of others as they are; None draws from the global ones."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def user_seed() -> int:
    """The seed given to Lightning's ``seed_everything``, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def epoch_order(dataset: Dataset, number: int, seed: int) -> Sampler:
    """Random order of a data set in an epoch that the trainer does not count.

    Args:
        dataset: A data set of known length.
        number: Number of the epoch, from 0.
        seed: Seed of the order.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return RandomSampler(cast("Any", dataset), generator=generator)
