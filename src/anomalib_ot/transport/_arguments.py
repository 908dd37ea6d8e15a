"""Checks of tensor arguments."""

import torch
from torch import Tensor


def require_tensors(**given: object) -> None:
    """Check that all arguments are tensors.

    Args:
        **given: The arguments by name.

    Raises:
        TypeError: If an argument is not a tensor.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            kind = type(value)
            named = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
            msg = f"{name} must be a tensor, not {named}; convert an array or a list with torch.as_tensor"
            raise TypeError(msg)


def require_floats(**given: object) -> None:
    """Check that all arguments are tensors of floating-point numbers.

    Args:
        **given: The arguments by name.

    Raises:
        TypeError: If an argument is not a tensor.
        ValueError: If a tensor has another data type.
    """
    require_tensors(**given)
    for name, value in given.items():
        if isinstance(value, Tensor) and not value.is_floating_point():
            msg = f"{name} must be a tensor of floating-point numbers, not of {value.dtype}; call .float() on it"
            raise ValueError(msg)


def require_vectors(**given: object) -> None:
    """Check that all arguments are tensors (..., N, D) of floating-point numbers with the same D.

    Args:
        **given: The arguments by name.

    Raises:
        TypeError: If an argument is not a tensor.
        ValueError: If a tensor has another data type or fewer than two dimensions, or if the D differ.
    """
    require_floats(**given)
    if torch.jit.is_tracing():
        # Sizes are tensors while tracing, and comparing them would add to the graph.
        return
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.ndim < 2:  # noqa: PLR2004 - vectors and their entries
            msg = f"{name} must be a tensor (..., N, D) of vectors, not of shape {tuple(value.shape)}"
            raise ValueError(msg)
    if len({value.shape[-1] for value in tensors.values()}) > 1:
        msg = " but ".join(f"{name} have {value.shape[-1]} channels" for name, value in tensors.items())
        raise ValueError(msg)
