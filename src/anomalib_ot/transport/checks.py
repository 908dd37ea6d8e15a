"""Checks of what the public functions are given."""

from torch import Tensor


def require_tensors(**values: object) -> None:
    """Refuse arrays and lists, which fail later in words that do not name them.

    Args:
        values: Arguments by name; None for one that was left out.

    Raises:
        TypeError: If one is no tensor.
    """
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            msg = f"{name} must be a torch tensor, not {kind}; torch.as_tensor({name}) makes one"
            raise TypeError(msg)
