"""Conditional transport between the features of a query and those of a memory, with a learned navigator.

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
    """The pairwise function d_φ(m, q) = v · relu(W (m − q)² + b), with the square in each channel.

    (m − q)² is never computed: W_h · (m − q)² = W_h · m² + W_h · q² − 2 (W_h ∘ q) · m is one matrix product for each
    hidden unit h. It needs memory for M x N numbers, the literal form for M x N x C.

    Args:
        channels: C, of the features.
        hidden: H, hidden units.
        start: ``metric`` starts at ``d_φ = |m − q|² / temperature``, where the navigators already prefer near features;
            ``random`` starts at the usual random weights of linear layers, as in the paper.
        temperature: Temperature of the start ``metric``, in units of c².
        generator: Source of the random weights; torch's default generator by default.

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
        # There is no bias in the last layer, because the softmaxes do not depend on it.
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
        # Two more channels add the squares and the bias.
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
    """Initial weights like those of ``nn.Linear``, which accepts no generator."""
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
    """Euclidean distance of all pairs, by one matrix product.

    Args:
        memory: (..., N, C).
        query: (..., M, C).

    Returns:
        (..., M, N). Distances much smaller than the norms lose digits; centre the features to avoid this.
    """
    return squared_distance(memory, query).clamp(min=0).sqrt()


def squared_distance(memory: Tensor, query: Tensor) -> Tensor:
    """Squared Euclidean distance of all pairs. Rounding errors may make it slightly negative.

    Args:
        memory: (..., N, C).
        query: (..., M, C).

    Returns:
        (..., M, N).
    """
    require_vectors(memory=memory, query=query)
    # Two more channels of the product add the squares.
    queries = torch.cat([-2 * query, query.square().sum(-1, keepdim=True), torch.ones_like(query[..., :1])], -1)
    memories = torch.cat([memory, torch.ones_like(memory[..., :1]), memory.square().sum(-1, keepdim=True)], -1)
    return queries @ memories.mT


def conditional_plan(pairwise: Tensor) -> ConditionalPlan:
    """Both navigators for d_φ of all pairs, (..., M, N)."""
    require_floats(pairwise=pairwise)
    return ConditionalPlan(torch.softmax(-pairwise, -1), torch.softmax(-pairwise, -2))


class NavigatorFit(NamedTuple):
    """Course of a fit.

    Attributes:
        steps: Number of steps.
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
        navigator: The fit starts at its weights. Fitting it to one query after another is a warm start.
        memory: (N, C).
        query: (M, C).
        rho: ρ, weight of the forward part, in [0, 1].
        learning_rate: Learning rate of Adam.
        steps: Maximum number of steps.
        features: Number of features of each side to sample and fit to; None uses all.
        tolerance: Stop when the relative change of the objective in one step is below this; 0 runs all steps.
        seed: Seed of the sample.

    Returns:
        The number of steps and the objective.

    Raises:
        TypeError: If memory or query is not a tensor.
        ValueError: If an argument is out of its range, memory or query has no features, or a feature is not finite.
    """
    _check_fit(memory, query, rho, learning_rate, steps, features)
    objective: list[float] = []
    # Scoring runs in inference mode, whose tensors cannot take part in a gradient, so samples are copies.
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


def _check_fit(
    memory: Tensor, query: Tensor, rho: float, learning_rate: float, steps: int, features: int | None
) -> None:
    """Check the arguments of :func:`fit_navigator`."""
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
        msg = "memory and query must each have at least one feature, and all features must be finite"
        raise ValueError(msg)


def _sample(features: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """A random sample of rows without replacement, or a copy of all rows if there are not more."""
    if count is None or count >= features.shape[0]:
        return features.clone()
    rows = torch.randperm(features.shape[0], generator=generator)[:count]
    return features[rows.to(features.device)].clone()
