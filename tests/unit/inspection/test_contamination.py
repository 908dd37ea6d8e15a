"""Bad parts among good images, and two products in a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anomalib_ot.inspection import contamination as module
from anomalib_ot.inspection.contamination import find_groups, find_suspects


def good(count, seed=0, side=8):
    """Feature maps (N, 6, side, side) with a pattern in the same place of all images."""
    generator = torch.Generator().manual_seed(seed)
    pattern = 3 * torch.randn(6, side, side, generator=torch.Generator().manual_seed(99))
    return pattern + torch.randn(count, 6, side, side, generator=generator)


def paths(count):
    return [Path(f"{index:03}.png") for index in range(count)]


def indices(suspects):
    return [int(each.path.stem) for each in suspects]


def test_bad_parts_are_named_highest_first_with_their_maps():
    maps = good(60)
    maps[7, :, 1:3, 5:8] += 5
    maps[31, :, 6:8, 0:2] += 9
    suspects = find_suspects(paths(60), maps)
    assert indices(suspects) == [31, 7]
    assert suspects[0].score > suspects[1].score > 3.5
    assert suspects[0].ratio > suspects[1].ratio > 1.5
    assert suspects[1].anomaly_map.shape == (8, 8)
    assert np.unravel_index(suspects[0].anomaly_map.argmax(), (8, 8)) == (7, 0)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_named_in_a_clean_folder(seed):
    assert find_suspects(paths(60), good(60, seed), seed=seed) == []


def with_repeated_defect():
    """A defect in the same place of six images, which therefore masks itself."""
    maps = good(60)
    maps[:6, 0, 2:4, 2:4] += torch.linspace(4, 12, 6)[:, None, None]
    return maps


def test_more_rounds_find_what_masks_itself_at_first(monkeypatch):
    suspects = find_suspects(paths(60), with_repeated_defect())
    assert {*indices(suspects)} == {1, 2, 3, 4, 5}
    monkeypatch.setattr(module, "_ROUNDS", 1)
    assert indices(find_suspects(paths(60), with_repeated_defect())) == [5]


def test_the_share_of_suspects_is_capped():
    suspects = find_suspects(paths(60), with_repeated_defect(), limit=0.1, most=0.05)
    assert len(suspects) == 3


def test_images_that_are_all_alike_are_no_suspects():
    maps = good(1).repeat(40, 1, 1, 1)
    assert find_suspects(paths(40), maps) == []


def test_the_result_does_not_depend_on_how_many_maps_are_read_at_a_time(monkeypatch):
    maps = good(60)
    maps[7, :, 1:3, 5:8] += 5
    expected = find_suspects(paths(60), maps)
    monkeypatch.setattr(module, "_BATCH", 7)
    found = find_suspects(paths(60), maps)
    assert indices(found) == indices(expected) == [7]
    assert found[0].score == pytest.approx(expected[0].score, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 9, "maps": 9}, "the number of images must be at least 10, not 9"),
        ({"maps": 11}, "the number of feature maps must be that of the images, 12, not 11"),
        ({"limit": 0}, "limit must be positive"),
        ({"most": 0.5}, r"most must be in \[0, 0.5\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    count, maps = arguments.pop("count", 12), arguments.pop("maps", 12)
    with pytest.raises(ValueError, match=message):
        find_suspects(paths(count), good(maps), **arguments)
    if not arguments:
        with pytest.raises(ValueError, match=message):
            find_groups(paths(count), good(maps))


@pytest.mark.parametrize("sample", [512, 10])
def test_two_products_are_two_groups(sample, monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE", sample)
    maps = good(30)
    maps[::3] += 1
    groups = find_groups(paths(30), maps)
    assert [len(each) for each in groups] == [20, 10]
    assert groups[1] == paths(30)[::3]


def test_one_product_is_one_group():
    assert find_groups(paths(30), good(30)) == [paths(30)]


def test_two_bad_parts_are_no_group():
    maps = good(30)
    maps[:2] += 5
    assert find_groups(paths(30), maps) == [paths(30)]
