"""How runs are handed out; ``anomalib-ot compare`` as a whole is in the integration tests."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from anomalib_ot.comparison import compare


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [(0, None, {None}), (2, None, {"0", "1"}), (2, "4,7", {"4", "7"}), (3, None, {"0", "1"})],
)
def test_workers_take_turns_at_the_devices(monkeypatch, count, visible, expected):
    module = sys.modules[compare.__module__]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    both = threading.Barrier(2, timeout=10)
    monkeypatch.setattr(module, "run_job", lambda job, device: (both.wait(), {device: job})[1])
    call = module._local_call(2)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            seen = [device for result in pool.map(call, ["one", "two"]) for device in result]
            assert {*seen} == expected
            assert len(seen) == 2
