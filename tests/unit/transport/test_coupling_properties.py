"""Couplings on random batches, compared with all permutations."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_ot.transport import IndependentCoupling, OptimalCoupling, WorstCoupling, create_coupling

properties = settings(derandomize=True, deadline=None, database=None, max_examples=30)
seeds = st.integers(0, 2**32 - 1)
couplings = st.sampled_from([OptimalCoupling, WorstCoupling])
scopes = st.sampled_from(["positions", "maps"])
solvers = st.sampled_from(["auto", "exact", "greedy"])


@st.composite
def batches(draw, largest=6):
    """Data and noise (B, C, H, W) with a limited number of positions: all different, with ties, or equal points."""
    shape = draw(st.tuples(*[st.integers(1, 3)] * 4).filter(lambda shape: shape[0] * shape[2] * shape[3] <= largest))
    generator = torch.Generator().manual_seed(draw(seeds))
    data, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    kind = draw(st.sampled_from(["different", "ties", "equal noise", "zeros", "strided"]))
    if kind == "ties":
        data, noise = data.round(), noise.round()
    elif kind == "equal noise":
        noise = noise[:1, :, :1, :1].expand(shape)
    elif kind == "zeros":
        data = torch.zeros(shape)
    elif kind == "strided":
        data, noise = (each.contiguous(memory_format=torch.channels_last) for each in (data, noise))
    return data, noise


def points(maps, scope):
    return maps.flatten(1) if scope == "maps" else maps.permute(0, 2, 3, 1).flatten(0, 2)


def cost(data, noise):
    return float((data.double() - noise.double()).square().sum())


def as_set(rows):
    return sorted(map(tuple, rows.tolist()))


@properties
@given(batches(), couplings, scopes)
def test_no_permutation_is_better(batch, coupling, scope):
    data, noise = batch
    paired = points(coupling(scope, 0, "exact")(data, noise), scope)
    data, noise = points(data, scope), points(noise, scope)
    best = max if coupling is WorstCoupling else min
    expected = best(cost(data, noise[list(order)]) for order in permutations(range(len(data))))
    assert cost(data, paired) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@properties
@given(batches(largest=27), couplings, scopes, solvers, st.data())
def test_noise_is_only_permuted_within_each_block(batch, coupling, scope, solver, data):
    maps, noise = batch
    count = len(points(maps, scope))
    size = data.draw(st.sampled_from([size for size in range(1, count + 1) if count % size == 0]))
    seed = data.draw(seeds)
    paired = coupling(scope, size, solver)(maps, noise, torch.Generator().manual_seed(seed))
    assert paired.shape == noise.shape
    assert paired.dtype == noise.dtype
    order = (
        torch.randperm(count, generator=torch.Generator().manual_seed(seed)) if size < count else torch.arange(count)
    )
    for block in order.view(-1, size):
        assert as_set(points(paired, scope)[block]) == as_set(points(noise, scope)[block])


@properties
@given(batches(), couplings, scopes, st.data())
def test_blocks_are_paired_independently(batch, coupling, scope, data):
    maps, noise = (points(each, scope) for each in batch)
    size = data.draw(st.sampled_from([size for size in range(1, len(maps)) if len(maps) % size == 0] or [len(maps)]))
    paired = points(coupling(scope, size)(*batch, torch.Generator().manual_seed(3)), scope)
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(3))
    if size == len(maps):
        order = torch.arange(size)
    best = max if coupling is WorstCoupling else min
    for block in order.view(-1, size):
        expected = best(cost(maps[block], noise[list(each)]) for each in permutations(block.tolist()))
        assert cost(maps[block], paired[block]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@properties
@given(batches(largest=27), scopes, solvers, seeds)
def test_the_worst_partner_is_the_best_one_of_the_negated_data(batch, scope, solver, seed):
    data, noise = batch
    worst, best = (
        coupling(scope, 1 if seed % 2 else None, solver)(each, noise, torch.Generator().manual_seed(seed))
        for coupling, each in ((WorstCoupling, data), (OptimalCoupling, -data))
    )
    assert torch.equal(worst, best)


@properties
@given(batches(), couplings, scopes)
def test_greedy_takes_the_best_pair_that_is_left(batch, coupling, scope):
    maps, noise = (points(each, scope) for each in batch)
    gains = maps @ noise.T * (-1 if coupling is WorstCoupling else 1)
    expected = 0.0
    left = gains.double().clone()
    for _ in range(len(left)):
        index = int(left.argmax())
        expected += float(left.flatten()[index])
        left[index // len(left)] = left[:, index % len(left)] = -math.inf
    paired = points(coupling(scope, 0, "greedy")(*batch), scope)
    sign = -1 if coupling is WorstCoupling else 1
    found = sign * float((maps.double() * paired.double()).sum())
    is_unique = len(gains.unique()) == gains.numel()
    assert not is_unique or found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    exact = points(coupling(scope, 0, "exact")(*batch), scope)
    assert found <= sign * float((maps.double() * exact.double()).sum()) + 1e-5


@properties
@given(batches(largest=27), st.sampled_from(["independent", "optimal", "worst"]), scopes, seeds)
def test_one_generator_state_one_pairing(batch, name, scope, seed):
    coupling = create_coupling(name, scope, block_size=1)
    first, second = (coupling(*batch, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, second)
    # In blocks of one point, points keep the noise that they were drawn with.
    assert torch.equal(first, batch[1])


@pytest.mark.parametrize("count", [1, 131])
def test_points_that_no_block_divides_stay_with_their_noise(count):
    data, noise = torch.randn(count, 2, 1, 1), torch.randn(count, 2, 1, 1)
    assert torch.equal(WorstCoupling()(data, noise), noise)


def test_independent_coupling_uses_no_randomness():
    data, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert IndependentCoupling()(data, noise, generator) is noise
    assert torch.equal(generator.get_state(), before)
    IndependentCoupling().check((7, 1, 13, 11))


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_gap_is_zero_if_no_pairing_gains_anything(solver):
    zeros = torch.zeros(2, 3, 2, 2)
    assert WorstCoupling(solver=solver).gap(zeros, zeros) == 0.0
