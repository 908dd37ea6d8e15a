"""Checks of what a user sets."""


def require(condition: bool, name: str, allowed: object, value: object) -> None:
    """Refuse a value out of its range.

    Args:
        condition: Whether it is within.
        name: Name of the argument.
        allowed: What it may be, in words or as the possible values.
        value: What it is.

    Raises:
        ValueError: If it is not within.
    """
    if not condition:
        allowed = " or ".join(map(repr, allowed)) if isinstance(allowed, tuple) else allowed
        msg = f"{name} must be {allowed}, not {value!r}"
        raise ValueError(msg)
