import pytest
import torch

from anomalib_ot.models.wt_flow.matching import matching_losses
from anomalib_ot.transport import IndependentCoupling, WorstCoupling


def test_loss_is_the_mean_squared_error_of_the_velocity():
    maps = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def field(between, times):
        seen.append((between, times))
        return torch.zeros_like(between)

    loss = matching_losses([field], [maps], IndependentCoupling(), torch.Generator().manual_seed(3))
    (between, times), *_ = seen
    # x_t = (1 − t) x_0 + t x_1 gives x_1 back.
    noise = (between - (1 - times.view(-1, 1, 1, 1)) * maps) / times.view(-1, 1, 1, 1)
    assert times.shape == (4,)
    assert float(loss) == pytest.approx(float((noise - maps).square().mean()), rel=1e-3)
    worst = matching_losses([field], [maps], WorstCoupling(), torch.Generator().manual_seed(3))
    assert float(worst) > float(loss)
