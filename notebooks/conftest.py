"""Marks notebooks as slow: each trains on real pictures."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Leave a notebook to ``make test-all``."""
    item.add_marker("slow")
