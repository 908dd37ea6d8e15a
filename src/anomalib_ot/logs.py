"""Quiet logs of others."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_alone(name: str) -> Iterator[None]:
    """Let a logger report nothing but errors.

    Args:
        name: Name of the logger.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
