"""Anderson acceleration of fixed-point iterations (type II; Walker and Ni, 2011, doi 10.1137/10078356X)."""

import torch
from torch import Tensor

# Added to the diagonal, of ones, of the normal equations.
_RIDGE = 1e-10
# Longest entry of a step. Beyond it, the last changes do not predict the residual.
_LONGEST = 40.0
# Growth of the residual after which the past steps are forgotten.
_GROWTH = 2.0


class Anderson:
    """Steps of the fixed-point iteration x ← T(x) that combine the last residuals r = T(x) − x.

    The last changes of r, as columns of R, predict how a step changes the residual. The step is r − (X + R) γ, where X
    has the last steps and γ minimises ‖r − R γ‖. Without past steps, it is r.

    Args:
        memory: Number of past steps.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._past: list[tuple[Tensor, Tensor]] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def step(self, residual: Tensor) -> Tensor:
        """The next step.

        Args:
            residual: r (..., P), after the step that the last call returned.

        Returns:
            The step, (..., P).
        """
        if self._last is not None:
            step, before = self._last
            self._past = [*self._past, (step, residual - before)][-self._memory :]
            if bool((residual.norm(dim=-1) > _GROWTH * before.norm(dim=-1)).any()):
                self._past = []
        step = residual - self._correction(residual) if self._past else residual
        if not bool((step.abs() <= _LONGEST).all()):
            self._past, step = [], residual
        self._last = step, residual
        return step

    def _correction(self, residual: Tensor) -> Tensor:
        """(X + R) γ."""
        steps, changes = (torch.stack(each, -1).double() for each in zip(*self._past, strict=True))
        # Early changes are much longer than late ones.
        lengths = changes.norm(dim=-2, keepdim=True).clamp_(min=torch.finfo(changes.dtype).tiny)
        unit = changes / lengths
        normal = unit.mT @ unit
        normal.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
        weights: Tensor = torch.linalg.solve(normal, unit.mT @ residual[..., None].double())
        return torch.matmul((steps + changes) / lengths, weights)[..., 0].to(residual)
