from itertools import permutations

import ot
import pytest
import torch

from anomalib_ot.transport import IndependentCoupling, OptimalCoupling, WorstCoupling, create_coupling


def batch(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def cost(data, noise):
    return float((data - noise).square().sum())


def cells(maps):
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def as_set(points):
    return sorted(map(tuple, points.tolist()))


@pytest.mark.parametrize(("coupling", "best"), [(OptimalCoupling, min), (WorstCoupling, max)])
def test_maps_are_paired_at_the_best_cost_of_all_permutations(coupling, best):
    data, noise = batch(5, 2, 3, 2)
    expected = best(cost(data, noise[list(order)]) for order in permutations(range(5)))
    assert cost(data, coupling("maps")(data, noise)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("coupling", "sign"), [(OptimalCoupling, 1), (WorstCoupling, -1)])
def test_positions_are_paired_at_the_cost_of_pot(coupling, sign):
    data, noise = batch(3, 4, 2, 5)
    distances = torch.cdist(cells(data).double(), cells(noise).double()).square().numpy()
    expected = 30 * abs(ot.emd2([], [], sign * distances))
    assert cost(data, coupling("positions", 0)(data, noise)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("solver", ["exact", "greedy"])
@pytest.mark.parametrize("scope", ["positions", "maps"])
def test_paired_noise_is_the_noise_in_another_order(scope, solver):
    data, noise = batch(6, 3, 4, 4)
    paired = WorstCoupling(scope, 0, solver)(data, noise)
    assert paired.shape == noise.shape
    if scope == "maps":
        assert as_set(paired.flatten(1)) == as_set(noise.flatten(1))
    else:
        assert as_set(cells(paired)) == as_set(cells(noise))
        assert as_set(paired.flatten(1)) != as_set(noise.flatten(1))


def test_blocks_are_drawn_at_random_and_keep_their_noise():
    data, noise = batch(4, 3, 4, 4)
    paired = WorstCoupling("positions", 16)(data, noise, torch.Generator().manual_seed(5))
    blocks = torch.randperm(64, generator=torch.Generator().manual_seed(5)).view(4, 16)
    for block in blocks:
        assert as_set(cells(paired)[block]) == as_set(cells(noise)[block])
        distances = torch.cdist(cells(data)[block].double(), cells(noise)[block].double()).square().numpy()
        assert cost(cells(data)[block], cells(paired)[block]) == pytest.approx(-16 * ot.emd2([], [], -distances))


def test_larger_blocks_cost_more_at_worst_and_less_at_best():
    data, noise = batch(8, 6, 8, 8)
    worst, best = (
        [cost(data, coupling("positions", size)(data, noise)) for size in (1, 8, 64, 512)]
        for coupling in (WorstCoupling, OptimalCoupling)
    )
    assert worst == sorted(worst)
    assert best == sorted(best, reverse=True)
    assert worst[0] == best[0] == pytest.approx(cost(data, IndependentCoupling()(data, noise)))


@pytest.mark.parametrize("coupling", [OptimalCoupling, WorstCoupling])
def test_greedy_pairs_stay_close_to_exact_ones(coupling):
    data, noise = batch(4, 16, 8, 8)
    assert 0 < coupling("positions", 128, "greedy").gap(data, noise) < 0.1
    assert coupling("positions", 128, "exact").gap(data, noise) == pytest.approx(0, abs=1e-6)


def test_gap_is_the_loss_of_inner_product():
    data, noise = batch(4, 8, 4, 4)
    greedy, exact = (WorstCoupling("positions", 0, solver) for solver in ("greedy", "exact"))
    ours, best = (float((data * each(data, noise)).sum()) for each in (greedy, exact))
    assert greedy.gap(data, noise) == pytest.approx(1 - ours / best, abs=1e-6)


def test_greedy_uses_each_noise_once_if_all_are_equal():
    data, _ = batch(2, 3, 4, 4)
    noise = torch.arange(32.0).view(2, 1, 4, 4).expand(-1, 3, -1, -1)
    paired = WorstCoupling("positions", 0, "greedy")(torch.zeros_like(data), noise)
    assert as_set(cells(paired)) == as_set(cells(noise))


def test_same_generator_same_pairs():
    data, noise = batch(4, 3, 8, 8)
    one, other, third = (
        WorstCoupling("positions", 32)(data, noise, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


def test_block_size_is_the_largest_divisor_up_to_128_by_default():
    coupling = WorstCoupling()
    assert [coupling._size_of_blocks(count) for count in (64, 128, 4096, 9 * 256, 14 * 14 * 16, 13 * 13)] == [
        *(64, 128, 128, 128, 112, 13)
    ]


def test_velocity_at_the_data_is_their_negative_with_independent_noise_and_points_past_the_centre_at_worst():
    # Flow matching learns E[z − x | x] at t = 0, which is −x with independent noise.
    data = torch.randn(64, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    velocity = {}
    for name in ("independent", "worst", "optimal"):
        coupling = create_coupling(name, block_size=0)
        generator = torch.Generator().manual_seed(1)
        draws = [coupling(data, torch.randn(data.shape, generator=generator)) - data for _ in range(400)]
        velocity[name] = torch.stack(draws).mean(0)
    torch.testing.assert_close(velocity["independent"], -data, atol=0.2, rtol=0)
    # Share of the way to the centre: 1 ends at the centre, and more ends beyond it.
    way = {name: float(-(each * data).sum() / data.square().sum()) for name, each in velocity.items()}
    assert way["independent"] == pytest.approx(1, abs=0.02)
    assert way["worst"] > 1.3
    assert way["optimal"] < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "best"}, "coupling must be one of independent, optimal, worst, not 'best'"),
        ({"name": "worst", "scope": "pixels"}, "scope must be one of positions, maps, not 'pixels'"),
        ({"name": "worst", "solver": "fast"}, "solver must be one of auto, exact, greedy, not 'fast'"),
        ({"name": "worst", "block_size": -1}, "block_size must be at least 0, not -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_coupling(**arguments)


def test_a_block_size_that_does_not_divide_is_refused():
    data, noise = batch(2, 3, 4, 4)
    coupling = WorstCoupling("positions", 7)
    with pytest.raises(ValueError, match="block_size 7 does not divide the 32 positions of a batch"):
        coupling(data, noise)
    with pytest.raises(ValueError, match="block_size 7 does not divide the 32 positions of a batch"):
        coupling.check(data.shape)
    with pytest.raises(ValueError, match="block_size 3 does not divide the 2 maps of a batch"):
        WorstCoupling("maps", 3).check(data.shape)
    WorstCoupling("positions", 8).check(data.shape)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"data of shape .* cannot be paired with noise of shape"):
        WorstCoupling()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5))
