"""Checks of the tensors that a caller gives."""

import torch
from torch import Tensor


def require_tensors(**given: object) -> None:
    """Refuse what is no tensor.

    Args:
        **given: The arguments by their names.

    Raises:
        TypeError: If one is no tensor.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            kind = type(value)
            named = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
            msg = f"{name} must be a tensor, not {named}; torch.as_tensor makes one of an array or a list"
            raise TypeError(msg)


def require_floats(**given: object) -> None:
    """Refuse what is no tensor of floating-point numbers.

    Args:
        **given: The arguments by their names.

    Raises:
        TypeError: If one is no tensor.
        ValueError: If one has entries of another type.
    """
    require_tensors(**given)
    for name, value in given.items():
        if isinstance(value, Tensor) and not value.is_floating_point():
            msg = f"{name} must be a tensor of floating-point numbers, not of {value.dtype}; call .float() on it"
            raise ValueError(msg)


def require_vectors(**given: object) -> None:
    """Refuse what are no tensors (..., N, D) with one D.

    Args:
        **given: The arguments by their names.

    Raises:
        TypeError: If one is no tensor.
        ValueError: If one has entries of another type or fewer than two dimensions, or the sizes differ.
    """
    require_floats(**given)
    if torch.jit.is_tracing():
        # Sizes are tensors then, and to compare them would become a part of the graph.
        return
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.ndim < 2:  # noqa: PLR2004 - vectors and their entries
            msg = f"{name} must be a tensor (..., N, D) of vectors, not of shape {tuple(value.shape)}"
            raise ValueError(msg)
    if len({value.shape[-1] for value in tensors.values()}) > 1:
        msg = " but ".join(f"{name} have {value.shape[-1]} channels" for name, value in tensors.items())
        raise ValueError(msg)
