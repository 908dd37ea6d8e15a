import pytest
import torch

from anomalib_ot.models.wt_flow import WtFlowSettings
from anomalib_ot.models.wt_flow.matching import matching_losses
from anomalib_ot.models.wt_flow.velocity import VelocityField
from anomalib_ot.transport import create_coupling


def shaken(**arguments):
    """A field whose last layers are not zero."""
    torch.manual_seed(0)
    field = VelocityField(3, **{"width": 16, **arguments})
    for parameter in field.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return field


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_maps_keep_their_shape(depth, size):
    assert shaken(depth=depth)(torch.rand(2, 3, *size), torch.rand(2)).shape == (2, 3, *size)


def test_starts_at_zero():
    assert not VelocityField(3, width=16)(torch.rand(2, 3, 4, 4), torch.rand(2)).any()


def test_depends_on_the_time_of_each_map_alone():
    field, maps = shaken(), torch.rand(2, 3, 4, 4)
    early, late = (field(maps, torch.full((1,), time)) for time in (0.1, 0.9))
    assert not torch.allclose(early, late)
    torch.testing.assert_close(field(maps, torch.tensor([0.1, 0.9])), torch.stack([early[0], late[1]]))


def test_computes_in_the_type_of_its_weights():
    maps, time = torch.rand(2, 3, 4, 4), torch.rand(2)
    low = shaken().bfloat16()(maps, time)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), shaken()(maps, time), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 24}, "width must be a multiple of 16, not 24"),
        ({"width": 0}, "width must be a multiple of 16, not 0"),
        ({"depth": -1}, "depth must be from 0 to 16, not -1"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WtFlowSettings(**arguments)


def test_maps_smaller_than_the_depth_are_refused():
    with pytest.raises(ValueError, match="feature maps of 3 x 8 cells cannot be halved 2 times; lower depth"):
        VelocityField(3, width=16, depth=2).check_size(3, 8)
    VelocityField(3, width=16, depth=2).check_size(4, 4)


def trained(coupling, data, batch, rate, steps=400):
    """A field trained on single cells (N, C)."""
    torch.manual_seed(0)
    field = VelocityField(data.shape[1], width=32, depth=0)
    optimizer = torch.optim.Adam(field.parameters(), rate)
    # Down to zero, as at the rate of the start the field does not settle.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        maps = data[torch.randint(len(data), (batch,), generator=generator)][:, :, None, None]
        loss = matching_losses([field], [maps], create_coupling(coupling, block_size=batch), generator).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return field


@pytest.fixture(scope="module")
def subspace():
    """Points (N, 8) of a plane, other points of it, and points off it as far from the centre."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    on = torch.randn(600, 2, generator=generator) @ basis[:2]
    off = torch.randn(100, 6, generator=generator) @ basis[2:]
    off = off / off.norm(dim=1, keepdim=True) * on[500:].norm(dim=1, keepdim=True)
    return on[:500], on[500:], off


# With independent noise the field takes longer to settle.
@pytest.mark.parametrize(
    ("coupling", "batch", "rate"),
    [pytest.param("independent", 512, 5e-3, marks=pytest.mark.slow), ("worst", 128, 2e-3)],
)
def test_what_is_off_the_subspace_of_the_data_keeps_a_larger_norm(subspace, coupling, batch, rate):
    data, on, off = subspace
    field = trained(coupling, data, batch, rate)
    with torch.no_grad():
        velocity = field(data[:, :, None, None], torch.zeros(1))[..., 0, 0]
        way = float(-(velocity * data).sum() / data.square().sum())
        normal, anomalous = (
            (points + field(points[:, :, None, None], torch.zeros(1))[..., 0, 0]).norm(dim=1).median()
            for points in (on, off)
        )
    # How far towards the centre a step takes the data: there, or past it.
    assert way == pytest.approx(1, abs=0.1) if coupling == "independent" else way > 1.3
    # Independent noise leaves normal points near the centre; the worst carries them past it.
    assert anomalous > (2 if coupling == "independent" else 1) * normal
