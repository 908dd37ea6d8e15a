"""Steps of Pradot's training as problems of transport."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.transport import FusedCost, TransportPlan, Workspace, sinkhorn, spatial_cost

EPSILON = 0.01
ITERATIONS = 100


@dataclass
class Problem:
    """Features (B·N, C) of a batch, prototypes (P, C), and the coordinates of both, (N, 2) and (P, 2)."""

    features: Tensor
    prototypes: Tensor
    grid: Tensor
    coordinates: Tensor

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "Problem":
        """The problem of a file."""
        return cls(**torch.load(path, map_location=device))

    def save(self, path: Path) -> None:
        """Write the problem to a file."""
        torch.save(vars(self), path)

    def cost(self, alpha: float, workspace: Workspace | None = None) -> FusedCost:
        """The cost matrix as our solver takes it."""
        return FusedCost(self.features, self.prototypes, self.grid, self.coordinates, alpha, workspace=workspace)

    def similarities(self) -> Tensor:
        """Product of features and prototypes of unit length, (B·N, P)."""
        return F.normalize(self.features) @ F.normalize(self.prototypes).T

    def matrix(self, alpha: float) -> Tensor:
        """The cost matrix (B·N, P), from one product and in its memory."""
        matrix = self.similarities()
        scale = (1 - alpha) / (1 - float(matrix.min()))
        space = spatial_cost(self.grid, self.coordinates)
        space.mul_(alpha / space.max()).add_(scale)
        return matrix.view(-1, *space.shape).mul_(-scale).add_(space).view_as(matrix)

    def points(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Points (B·N, C + 2) and (P, C + 2) whose squared distances are the cost."""
        cells = self.grid.repeat(len(self.features) // len(self.grid), 1)
        farthest = 1 - min(
            float((F.normalize(rows) @ F.normalize(self.prototypes).T).min()) for rows in self.features.split(1024)
        )
        scales = ((1 - alpha) / (2 * farthest)) ** 0.5, (alpha / 2) ** 0.5
        pairs = (self.features, cells), (self.prototypes, self.coordinates)
        rows, columns = (torch.cat([F.normalize(left) * scales[0], right * scales[1]], 1) for left, right in pairs)
        return rows, columns


class Steps:
    """Successive training steps on one batch.

    Args:
        problem: Features and prototypes; a copy of the prototypes moves.
        alpha: Weight of the spatial cost.
        workspace: Memory of the solver.
        epsilon: Regularisation.
        anderson: Number of past steps that accelerate the iterations.
    """

    def __init__(
        self, problem: Problem, alpha: float, workspace: Workspace, epsilon: float = EPSILON, anderson: int = 0
    ) -> None:
        self.problem = Problem(**{**vars(problem), "prototypes": problem.prototypes.clone()})
        self.alpha = alpha
        self.workspace = workspace
        self._options = {"epsilon": epsilon, "anderson": anderson}
        self._potential: Tensor | None = None

    def solve(self, tolerance: float, iterations: int = ITERATIONS) -> TransportPlan:
        """Form the cost and solve to a marginal error."""
        return sinkhorn(
            self.problem.cost(self.alpha, self.workspace),
            max_iterations=iterations,
            tolerance=tolerance,
            potential=self._potential,
            workspace=self.workspace,
            warn=False,
            **self._options,
        )

    def take(self, tolerance: float, iterations: int = ITERATIONS) -> TransportPlan:
        """Solve, and move the prototypes by a twentieth as in the paper."""
        plan = self.solve(tolerance, iterations)
        self.problem.prototypes.lerp_(plan.barycentres(self.problem.features), 0.05)
        self._potential = plan.potential
        return plan
