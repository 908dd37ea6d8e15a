"""Checks of arguments."""

import math
from numbers import Integral

import torch
from torch import Tensor

from ._processes import Processes

# Largest relative difference of the sums of both marginals.
_SAME_MASS = 1e-4


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


def require_same_device(**given: Tensor) -> None:
    """Check that all tensors are on the device of the first.

    Args:
        **given: The tensors by name.

    Raises:
        ValueError: If a tensor is on another device.
    """
    (first, like), *others = given.items()
    for name, value in others:
        if value.device != like.device:
            msg = f"{name} is on {value.device} but {first} is on {like.device}; move one of them with .to"
            raise ValueError(msg)


def require_without_gradients(**given: object) -> None:
    """Check that no tensor requires gradients, which a plan does not have.

    Args:
        **given: The arguments by name.

    Raises:
        ValueError: If a tensor requires gradients.
    """
    for name, value in given.items():
        if isinstance(value, Tensor) and value.requires_grad:
            msg = f"{name} requires gradients, but a plan has none; call .detach() on it, or call solve"
            raise ValueError(msg)


def require_limits(
    epsilon: float,
    max_iterations: int,
    tolerance: float | None,
    anderson: int,
    names: tuple[str, str, str] = ("epsilon", "max_iterations", "tolerance"),
) -> None:
    """Check the numbers of a solver.

    Args:
        epsilon: Regularisation ε, positive.
        max_iterations: Upper bound on the iterations, at least 1.
        tolerance: Largest marginal error, at least 0, or None.
        anderson: Number of past steps, at least 0.
        names: Names of the first three in the caller.

    Raises:
        ValueError: If a number is out of its range.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        msg = f"{names[0]} must be positive and finite, not {epsilon}"
        raise ValueError(msg)
    if max_iterations < 1:
        msg = f"{names[1]} must be at least 1, not {max_iterations}"
        raise ValueError(msg)
    if tolerance is not None and not tolerance >= 0:
        msg = f"{names[2]} must be at least 0, not {tolerance}"
        raise ValueError(msg)
    if not (isinstance(anderson, Integral) and anderson >= 0):
        msg = f"anderson must be a whole number of at least 0, not {anderson!r}"
        raise ValueError(msg)


def require_finite_potential(row_potential: Tensor, epsilon: float) -> None:
    """Check the potential f = min_j (M_ij − g_j) of the rows, which has the largest entries of M / ε.

    Raises:
        ValueError: If an entry is not finite.
    """
    if not row_potential.isfinite().all():
        msg = f"the cost divided by ε = {epsilon} has NaN or infinite entries"
        raise ValueError(msg)


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor in single precision if it has less, in which a plan would underflow."""
    return tensor.float() if tensor.dtype.itemsize < torch.float32.itemsize else tensor


def default_tolerance(dtype: torch.dtype, masses: tuple[Tensor, Tensor]) -> Tensor:
    """Marginal error at which a solver stops by default, well above the rounding errors of a data type.

    Args:
        dtype: Data type of the cost.
        masses: Σa and Σb of each problem.

    Returns:
        The tolerance of each problem.
    """
    from_rows, to_columns = masses
    share = 1e-9 if dtype == torch.float64 else 1e-5
    # No plan has an error below |Σa − Σb|, and rounding may keep it slightly above.
    return torch.maximum(share * to_columns, 2 * (from_rows - to_columns).abs())


def start(potential: Tensor, shape: torch.Size, like: Tensor, names: tuple[str, str] = ("potential", "cost")) -> Tensor:
    """The potential (..., P) of the columns to start from, in the precision of the cost.

    Args:
        potential: As given.
        shape: Its shape.
        like: Rows of the cost.
        names: Names of the potential and of the cost in the caller.

    Raises:
        TypeError: If the potential is not a tensor.
        ValueError: If its shape, its device or an entry is wrong.
    """
    name, cost = names
    require_tensors(**{name: potential})
    if potential.shape != shape:
        msg = (
            f"{name} must be of shape {tuple(shape)}, an entry for each column of {cost}, not {tuple(potential.shape)}"
        )
        raise ValueError(msg)
    require_same_device(**{cost: like, name: potential})
    if not potential.isfinite().all():
        msg = f"{name} has NaN or infinite entries"
        raise ValueError(msg)
    return potential.to(like)


def marginal(
    name: str, weights: Tensor | None, shape: torch.Size, uniform: float, like: Tensor, cost: str = "cost"
) -> Tensor:
    """A marginal in the precision of the cost.

    Args:
        name: Name of the argument.
        weights: As given, or None for uniform weights. A batch may share those of one problem.
        shape: Shape of the marginal.
        uniform: Entry of uniform weights.
        like: Rows of the cost.
        cost: Name of the cost in the caller.

    Raises:
        TypeError: If the weights are not a tensor.
        ValueError: If their shape, their device or a weight is wrong.
    """
    if weights is None:
        return like.new_full(shape, uniform)
    require_tensors(**{name: weights})
    if weights.shape not in (shape, shape[-1:]):
        msg = f"{name} must be of shape {tuple(shape)}, not {tuple(weights.shape)}"
        raise ValueError(msg)
    require_same_device(**{cost: like, name: weights})
    weights = weights.to(like)
    if not (weights.isfinite() & (weights > 0)).all():
        msg = f"{name} must be positive and finite"
        raise ValueError(msg)
    return weights.expand(shape)


def require_same_mass(
    a: Tensor, b: Tensor, processes: Processes, names: tuple[str, str] = ("row_weights", "column_weights")
) -> tuple[Tensor, Tensor]:
    """Check that both marginals have the same sum, over all processes.

    Args:
        a: Marginal of the rows, (..., N).
        b: Marginal of the columns, (..., P).
        processes: Processes that hold further rows.
        names: Names of the marginals in the caller.

    Returns:
        Σa and Σb, (...), in double precision.

    Raises:
        ValueError: If the sums differ.
    """
    from_rows, to_columns = processes.sum(a.double().sum(-1)), b.double().sum(-1)
    for rows, columns in zip(from_rows.flatten().tolist(), to_columns.flatten().tolist(), strict=True):
        if abs(rows - columns) > _SAME_MASS * max(rows, columns):
            msg = f"{names[0]} sum to {rows:g} but {names[1]} to {columns:g}; scale them to the same sum"
            raise ValueError(msg)
    return from_rows, to_columns
