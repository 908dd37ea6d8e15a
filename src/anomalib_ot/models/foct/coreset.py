"""Greedy coreset of features."""

import torch
from torch import Tensor

from anomalib_ot.settings import require


def greedy_coreset(features: Tensor, size: int) -> Tensor:
    """Choose features that cover the others: the next one is the farthest from those chosen so far (k-centre greedy).

    The covering radius is at most twice the smallest possible one (Sener and Savarese, 2018, arXiv 1708.00489).
    anomalib's ``KCenterGreedy`` draws its start and its projection from the global random state. Here the start is the
    feature nearest to the mean, so that the memory after a stream of queries depends on the stream only.

    Args:
        features: (N, D).
        size: Number of features to choose, in [1, N].

    Returns:
        Indices (size,), in the order they were chosen.

    Raises:
        ValueError: If the size is out of its range.
    """
    count = features.shape[0]
    require(1 <= size <= count, "the size of a coreset", f"from 1 to {count}, the number of features", size)
    chosen = [(features - features.mean(0)).square().sum(1).argmin()]
    distances = torch.full_like(features[:, 0], torch.inf)
    while len(chosen) < size:
        distances = torch.minimum(distances, (features - features[chosen[-1]]).square().sum(1))
        chosen.append(distances.argmax())
    return torch.stack(chosen)


def random_projection(features: int, dimensions: int) -> Tensor:
    """Gaussian matrix (features, dimensions) that keeps distances up to a small factor (Johnson and Lindenstrauss).

    It is the same in each call, and the identity if there are no more features than dimensions.
    """
    if features <= dimensions:
        return torch.eye(features)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(features, dimensions, generator=generator) / dimensions**0.5
