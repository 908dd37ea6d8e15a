"""Foct's navigator: its start, and its fit to a memory and a query."""

import torch
from torch import Tensor

from anomalib_ot.transport import Navigator, fit_navigator

from .settings import FoctSettings


def new_navigator(channels: int, settings: FoctSettings) -> Navigator:
    """Create a navigator before any fit, the same in every call.

    Args:
        channels: C, the dimensions of the points that it compares.
        settings: Its hidden units and its start.
    """
    # Other threads draw from torch's generator, so this one is separate.
    generator = torch.Generator().manual_seed(0)
    start = (settings.navigator_hidden, settings.navigator_start, settings.temperature)
    return Navigator(channels, *start, generator).requires_grad_(requires_grad=False)


def fit_to(navigator: Navigator, memory: Tensor, query: Tensor, settings: FoctSettings, steps: int) -> None:
    """Fit a navigator, in place.

    Args:
        navigator: The navigator.
        memory: Points of the memory, (N, C).
        query: Points of the query, (M, C).
        settings: Settings of the fit.
        steps: Largest number of steps.
    """
    fit_navigator(
        navigator,
        memory,
        query,
        rho=settings.rho,
        learning_rate=settings.learning_rate,
        steps=steps,
        features=settings.fit_features or None,
        tolerance=settings.tolerance,
    )
