"""How FOCT's navigator is learned: settings of its conditional transport (ACM Multimedia 2024)."""

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from anomalib_ot.settings import require, require_finite, require_whole
from anomalib_ot.transport import Navigator, NavigatorStart, fit_navigator

# More than any feature has channels.
_MOST_HIDDEN = 2**14


@dataclass(frozen=True)
class TransportSettings:
    """How the navigator is learned.

    Args:
        rho: ρ of eq. 4, weight of the forward transport, in [0, 1].
        hidden: Hidden units of the navigator, at most 16384.
        start: Where the navigator starts, ``metric`` or, as in the paper, ``random``.
        temperature: Temperature of the start ``metric``.
        learning_rate: Of Adam.
        support_steps: Largest number of steps on the support set.
        query_steps: Largest number of steps on each query; 0 keeps the navigator of the support set.
        fit_features: Features of memory and query that a fit takes; 0 for all.
        tolerance: Relative change of the objective at which a fit ends; 0 takes all steps.

    Raises:
        ValueError: If a setting is out of its range.
    """

    rho: float = 0.5
    hidden: int = 4
    start: NavigatorStart = "metric"
    temperature: float = 0.3
    learning_rate: float = 1e-2
    support_steps: int = 100
    query_steps: int = 0
    fit_features: int = 256
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        require(0 <= self.rho <= 1, "rho", "in [0, 1]", self.rho)
        require_whole(1, "hidden", self.hidden, _MOST_HIDDEN)
        require(self.start in get_args(NavigatorStart), "start", get_args(NavigatorStart), self.start)
        require_finite(self.temperature > 0, "temperature", "positive", self.temperature)
        require_finite(self.learning_rate > 0, "learning_rate", "positive", self.learning_rate)
        require_whole(0, "support_steps", self.support_steps)
        require_whole(0, "query_steps", self.query_steps)
        require_whole(0, "fit_features", self.fit_features)
        require_finite(self.tolerance >= 0, "tolerance", "at least 0", self.tolerance)

    def fit(self, navigator: Navigator, memory: Tensor, query: Tensor, steps: int) -> None:
        """Fit a navigator, in place, to a memory (N, C) and a query (M, C)."""
        fit_navigator(
            navigator,
            memory,
            query,
            rho=self.rho,
            learning_rate=self.learning_rate,
            steps=steps,
            features=self.fit_features or None,
            tolerance=self.tolerance,
        )
