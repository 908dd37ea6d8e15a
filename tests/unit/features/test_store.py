import logging

import pytest
import torch

from anomalib_ot.features import store as feature_store
from anomalib_ot.features.store import allocate


@pytest.mark.parametrize(("processes", "place"), [(1, "cpu"), (2, "cpu"), (3, "disk")])
def test_processes_of_a_machine_share_its_memory(monkeypatch, caplog, processes, place):
    features = {"layer1": torch.zeros(1, 4, 8, 8)}
    # Fifty images of 1,024 bytes, twice, in half of what is free.
    monkeypatch.setattr(feature_store, "free_memory", lambda: 4 * 50 * 1024)
    with caplog.at_level(logging.INFO):
        allocate(features, 50, "auto", 0.5, torch.device("cpu"), processes)
    assert f"place {place}" in caplog.text
