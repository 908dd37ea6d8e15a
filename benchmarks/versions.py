"""Versions of the software of a measurement."""

import platform
from importlib.metadata import version


def versions(*packages: str) -> str:
    """Names and versions of packages, and the version of Python."""
    return ", ".join([*(f"{name} {version(name)}" for name in packages), f"Python {platform.python_version()}"])
