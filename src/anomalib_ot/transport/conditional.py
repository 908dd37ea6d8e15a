"""Conditional transport between the features of a query and of a memory, with a learned navigator.

For memory features m_1 … m_N, query features q_1 … q_M and costs c_ij between them, the navigators are

    π(m_i | q_j) = softmax over i of −d_φ(m_i, q_j)        forward, from the query to the memory
    π(q_j | m_i) = softmax over j of −d_φ(m_i, q_j)        backward

and φ minimises ρ/M Σ_ij π(m_i | q_j) c_ij + (1 − ρ)/N Σ_ij π(q_j | m_i) c_ij (eqs. 4 and 5 of FOCT, after Zheng and
Zhou, Exploiting chain rule and Bayes' theorem to compare probability distributions, NeurIPS 2021).
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ._arguments import require_floats, require_vectors

NavigatorStart = Literal["metric", "random"]


class Navigator(nn.Module):
    """The pairwise function d_φ(m, q) = v · relu(W (m − q)² + b), the square taken in each channel.

    (m − q)² is never formed: W_h · (m − q)² = W_h · m² + W_h · q² − 2 (W_h ∘ q) · m is one product of matrices for each
    hidden unit h, and only M x N numbers exist at a time where the literal form needs M x N x C.

    Args:
        channels: C, of the features.
        hidden: H, hidden units.
        start: ``metric`` starts at ``d_φ = |m − q|² / temperature``, where the navigators already send to what is near;
            ``random`` at the usual random weights of linear layers, as in the paper.
        temperature: Temperature of the start ``metric``, in units of c².
        generator: What to draw the weights from; torch's own of the process if left out.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> navigator = Navigator(3, temperature=0.5)
        >>> memory, query = torch.rand(5, 3), torch.rand(4, 3)
        >>> torch.allclose(navigator(memory, query), torch.cdist(query, memory) ** 2 / 0.5, atol=1e-5)
        True
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 4,
        start: NavigatorStart = "metric",
        temperature: float = 0.3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or hidden < 1:
            msg = f"a navigator needs at least one channel and one hidden unit, not {channels} and {hidden}"
            raise ValueError(msg)
        if not temperature > 0:
            msg = f"temperature must be positive, not {temperature}"
            raise ValueError(msg)
        if start not in get_args(NavigatorStart):
            msg = f"start must be one of {', '.join(get_args(NavigatorStart))}, not {start!r}"
            raise ValueError(msg)
        # The bias of the last layer would leave the softmaxes as they are.
        self.weight = nn.Parameter(_linear_start((hidden, channels), channels, generator))
        self.bias = nn.Parameter(_linear_start((hidden,), channels, generator))
        self.out = nn.Parameter(_linear_start((hidden,), hidden, generator))
        if start == "metric":
            shares = self.weight.detach().abs() + 1e-6
            self.weight.data = shares / shares.sum(0) / temperature
            self.bias.data.zero_()
            self.out.data.fill_(1.0)

    def forward(self, memory: Tensor, query: Tensor) -> Tensor:
        """Compute d_φ of all pairs.

        Args:
            memory: (..., N, C).
            query: (..., M, C).

        Returns:
            (..., M, N).
        """
        require_vectors(memory=memory, query=query)
        memory_part = memory.square() @ self.weight.mT
        query_part = query.square() @ self.weight.mT + self.bias
        # The squares and the bias come in as two more channels.
        left, right = torch.ones_like(query[..., :1]), torch.ones_like(memory[..., :1])
        total: Tensor | None = None
        for h, (weight, out) in enumerate(zip(self.weight, self.out, strict=True)):
            queries = torch.cat([query * (-2 * weight), query_part[..., h : h + 1], left], -1)
            memories = torch.cat([memory, right, memory_part[..., h : h + 1]], -1)
            unit = (queries @ memories.mT).relu() * out
            total = unit if total is None else total + unit
        assert total is not None  # noqa: S101 - there is at least one hidden unit
        return total


def _linear_start(shape: tuple[int, ...], inputs: int, generator: torch.Generator | None) -> Tensor:
    """Weights as those of ``nn.Linear`` start, which takes no generator."""
    bound = 1 / math.sqrt(inputs)
    device = generator.device if generator else None
    drawn = torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
    return drawn.to(torch.get_default_device())


class ConditionalPlan(NamedTuple):
    """The navigators between a memory and a query.

    Attributes:
        forward: π(m_i | q_j), (..., M, N); its rows sum to 1.
        backward: π(q_j | m_i), (..., M, N); its columns sum to 1.
    """

    forward: Tensor
    backward: Tensor

    def cost(self, costs: Tensor, rho: float = 0.5) -> Tensor:
        """The objective, eq. 4, for costs (..., M, N) and the weight ρ of the forward part: (...)."""
        require_floats(costs=costs)
        forward = (self.forward * costs).sum(-1).mean(-1)
        backward = (self.backward * costs).sum(-2).mean(-1)
        return rho * forward + (1 - rho) * backward


def euclidean_cost(memory: Tensor, query: Tensor) -> Tensor:
    """Euclidean distance of all pairs, by one product of matrices.

    Args:
        memory: (..., N, C).
        query: (..., M, C).

    Returns:
        (..., M, N). Distances far smaller than the norms lose digits, unless the features are centred.
    """
    return squared_distance(memory, query).clamp(min=0).sqrt()


def squared_distance(memory: Tensor, query: Tensor) -> Tensor:
    """Squared Euclidean distance of all pairs, up to rounding errors, which may leave it just below 0.

    Args:
        memory: (..., N, C).
        query: (..., M, C).

    Returns:
        (..., M, N).
    """
    require_vectors(memory=memory, query=query)
    # The squares come in as two more channels of the one product.
    queries = torch.cat([-2 * query, query.square().sum(-1, keepdim=True), torch.ones_like(query[..., :1])], -1)
    memories = torch.cat([memory, torch.ones_like(memory[..., :1]), memory.square().sum(-1, keepdim=True)], -1)
    return queries @ memories.mT


def conditional_plan(pairwise: Tensor) -> ConditionalPlan:
    """Both navigators for d_φ of all pairs, (..., M, N)."""
    require_floats(pairwise=pairwise)
    return ConditionalPlan(torch.softmax(-pairwise, -1), torch.softmax(-pairwise, -2))


class NavigatorFit(NamedTuple):
    """How a navigator was fitted.

    Attributes:
        steps: Steps taken.
        objective: Objective before each step.
    """

    steps: int
    objective: list[float]


def fit_navigator(
    navigator: Navigator,
    memory: Tensor,
    query: Tensor,
    *,
    rho: float = 0.5,
    learning_rate: float = 1e-4,
    steps: int = 100,
    features: int | None = 256,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> NavigatorFit:
    """Minimise the transport objective, eq. 4, over φ by Adam, in place.

    Args:
        navigator: Starts where it stands; fitting it to one query after another is a warm start.
        memory: (N, C).
        query: (M, C).
        rho: ρ, weight of the forward part, in [0, 1].
        learning_rate: Of Adam.
        steps: Largest number of steps.
        features: Fit to a sample of so many features of each side; None for all.
        tolerance: Relative change of the objective from step to step at which it has settled; 0 takes all steps.
        seed: Seed of the sample.

    Returns:
        The steps taken and the objective.

    Raises:
        TypeError: If a side is no tensor.
        ValueError: If an argument is out of its range, a side has no features, or a feature is not finite.
    """
    if not 0 <= rho <= 1:
        msg = f"rho must be in [0, 1], not {rho}"
        raise ValueError(msg)
    if steps < 0 or not learning_rate > 0:
        msg = f"steps must be at least 0 and learning_rate positive, not {steps} and {learning_rate}"
        raise ValueError(msg)
    if features is not None and features < 1:
        msg = f"features must be at least 1 or None, not {features}"
        raise ValueError(msg)
    require_vectors(memory=memory, query=query)
    if not (len(memory) and len(query) and memory.isfinite().all() and query.isfinite().all()):
        msg = "the features of the memory and of the query must be finite, and at least one of each"
        raise ValueError(msg)
    objective: list[float] = []
    # Scoring runs in inference mode, whose tensors cannot take part in a gradient: samples are copies.
    with torch.inference_mode(mode=False), torch.enable_grad():
        generator = torch.Generator().manual_seed(seed)
        memory, query = _sample(memory, features, generator), _sample(query, features, generator)
        costs = euclidean_cost(memory, query)
        needed_gradients = [parameter.requires_grad for parameter in navigator.parameters()]
        optimizer = torch.optim.Adam(navigator.requires_grad_().parameters(), learning_rate)
        for _ in range(steps):
            loss = conditional_plan(navigator(memory, query)).cost(costs, rho)
            objective.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if len(objective) > 1 and abs(objective[-2] - objective[-1]) < tolerance * abs(objective[-1]):
                break
        optimizer.zero_grad()
        for parameter, needed in zip(navigator.parameters(), needed_gradients, strict=True):
            parameter.requires_grad_(needed)
    return NavigatorFit(len(objective), objective)


def _sample(features: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """So many rows, without repetition, or a copy of all where there are not more."""
    if count is None or count >= features.shape[0]:
        return features.clone()
    rows = torch.randperm(features.shape[0], generator=generator)[:count]
    return features[rows.to(features.device)].clone()
