"""Training of the velocity fields: what each step does, with Lightning's trainer and without it."""

import math
from collections.abc import Iterable
from copy import deepcopy
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anomalib_ot.features.extraction import FeatureMaps
from anomalib_ot.host.seeding import user_seed
from anomalib_ot.transport import Coupling

from .matching import matching_losses
from .settings import WtFlowSettings
from .torch_model import WtFlowModel

GRADIENT_NORM = 1.0
"""Largest norm of the gradient of a step."""

# Share of the training during which the learning rate rises.
_WARM_UP = 0.1


def create_optimizer(
    trained: nn.Module, settings: WtFlowSettings, learning_rate: float
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW, with a learning rate that rises, then falls by a cosine, over ``training_steps``.

    Args:
        trained: The velocity fields that are trained.
        settings: The model's settings.
        learning_rate: Highest learning rate.

    Returns:
        The optimiser, and its schedule by steps.
    """

    def share(step: int) -> float:
        # Warm-up times cosine, in closed form. A chain of torch's schedulers would round at each step.
        done = min(1.0, (step + 1) / (settings.training_steps + 1))
        return min(1.0, done / _WARM_UP) * (1 + math.cos(math.pi * done)) / 2

    optimizer = torch.optim.AdamW(trained.parameters(), learning_rate, weight_decay=settings.weight_decay)
    return optimizer, LambdaLR(optimizer, share)


def noise_generator(step: int, device: torch.device) -> torch.Generator:
    """Source of noise and times, which depend on seed and step only, not on resuming or the number of processes."""
    return torch.Generator(device).manual_seed(user_seed() * 1_000_003 + step)


@torch.no_grad()
def average_into(averages: nn.Module, trained: nn.Module, step: int, ema_rate: float) -> None:
    """Move the averaged weights towards the trained ones.

    Args:
        averages: Velocity fields with the averaged weights.
        trained: Velocity fields with the trained weights.
        step: Number of the step, from 0, before which the weights are averaged.
        ema_rate: Share of the averaged weights that a late step keeps. The first steps keep less.
    """
    # As torch's get_ema_multi_avg_fn, but with a rising rate, and in the precision of the averages. AveragedModel would
    # rename the weights in checkpoints.
    rate = min(ema_rate, (1 + step) / (10 + step)) if step else 0.0
    for average, weights in zip(averages.parameters(), trained.parameters(), strict=True):
        average.lerp_(weights.to(average.dtype), 1 - rate)


def fit_flow(
    model: WtFlowModel, batches: Iterable[FeatureMaps], coupling: Coupling, steps: int, learning_rate: float
) -> None:
    """Train the velocity fields of a model whose normalisation is fitted, as the trainer does, in single precision.

    Args:
        model: The model.
        batches: Feature maps (B, D, H, W) of training batches, at least one for each step.
        coupling: Pairs features with noise.
        steps: Number of steps.
        learning_rate: Highest learning rate.
    """
    settings, averages = model.settings, model.velocities()
    trained = deepcopy(averages).requires_grad_()
    model.requires_grad_(requires_grad=False)
    optimizer, schedule = create_optimizer(trained, settings, learning_rate)
    with torch.enable_grad():
        for step, features in enumerate(islice(batches, steps)):
            embeddings = [maps.detach() for maps in model.embed(features)]
            losses: Tensor = matching_losses(trained, embeddings, coupling, noise_generator(step, embeddings[0].device))
            average_into(averages, trained, step, settings.ema_rate)
            optimizer.zero_grad()
            losses.mean().backward()
            nn.utils.clip_grad_norm_(trained.parameters(), GRADIENT_NORM)
            optimizer.step()
            schedule.step()
