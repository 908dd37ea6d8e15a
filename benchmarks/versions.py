"""What a table was measured with."""

import platform
from importlib.metadata import version


def versions(*packages: str) -> str:
    """Names and versions of packages, and that of Python."""
    return ", ".join([*(f"{name} {version(name)}" for name in packages), f"Python {platform.python_version()}"])
