"""Couplings are those of torchcfm where it is installed."""

import numpy as np
import ot
import pytest
import torch

from anomalib_ot.transport import OptimalCoupling, solve


def test_couplings_are_those_of_torchcfm():
    sampler = pytest.importorskip("torchcfm.optimal_transport").OTPlanSampler("exact")
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(64, 2, generator=generator) for _ in range(2))
    plan = torch.as_tensor(sampler.get_map(data, noise))
    paired = OptimalCoupling("maps")(data.view(64, 2, 1, 1), noise.view(64, 2, 1, 1)).flatten(1)
    torch.testing.assert_close((64 * plan).to(noise) @ noise, paired)

    def entropic(a, b, cost):
        return solve(*(torch.as_tensor(np.asarray(each)) for each in (cost, a, b)), 0.5).plan.numpy()

    sampler.ot_fn = entropic
    a = torch.full((64,), 1 / 64)
    expected = ot.sinkhorn(a, a, torch.cdist(data, noise).square().double(), 0.5, stopThr=1e-12)
    np.testing.assert_allclose(sampler.get_map(data, noise), expected, atol=1e-6)
