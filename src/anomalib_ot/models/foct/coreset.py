"""Greedy coreset of features."""

import torch
from torch import Tensor


def greedy_coreset(features: Tensor, size: int) -> Tensor:
    """Choose features that cover the others: each next one is the farthest from those chosen (k-centre greedy).

    The result covers at a radius at most twice the smallest possible (Sener and Savarese, 2018, arXiv 1708.00489).
    anomalib's ``KCenterGreedy`` draws its start and its projection from global random state; here the start is the
    feature nearest to the mean, so that what a stream of queries leaves in a memory depends on the stream alone.

    Args:
        features: (N, D).
        size: Number of features to choose, in [1, N].

    Returns:
        Indices (size,), in the order they were chosen.

    Raises:
        ValueError: If the size is out of its range.
    """
    if not 1 <= size <= features.shape[0]:
        msg = f"a coreset of {features.shape[0]} features has between 1 and as many, not {size}"
        raise ValueError(msg)
    chosen = [(features - features.mean(0)).square().sum(1).argmin()]
    distances = torch.full_like(features[:, 0], torch.inf)
    while len(chosen) < size:
        distances = torch.minimum(distances, (features - features[chosen[-1]]).square().sum(1))
        chosen.append(distances.argmax())
    return torch.stack(chosen)


def random_projection(features: int, dimensions: int, seed: int = 0) -> Tensor:
    """Gaussian matrix (features, dimensions) that keeps distances up to a small factor (Johnson and Lindenstrauss).

    The identity where there are no more features than dimensions.
    """
    if features <= dimensions:
        return torch.eye(features)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(features, dimensions, generator=generator) / dimensions**0.5
