"""Duo's settings are those of its parts, each given once."""

from dataclasses import fields

import pytest

from anomalib_ot.models.duo import DuoSettings
from anomalib_ot.models.pradot import PradotSettings
from anomalib_ot.models.wt_flow import WtFlowSettings

SMALL = {"backbone": "resnet18", "layers": ("layer2", "layer3"), "image_size": (64, 64)}


def test_the_parts_have_their_own_defaults():
    duo = DuoSettings(**SMALL)
    shared = {each.name for each in fields(DuoSettings)}
    for part, alone in ((duo.of_pradot(), PradotSettings(**SMALL)), (duo.of_wt_flow(), WtFlowSettings(**SMALL))):
        own = [each.name for each in fields(part) if each.name not in shared]
        assert [getattr(part, name) for name in own] == [getattr(alone, name) for name in own]


def test_the_parts_share_what_duo_has_and_the_flow_has_the_last_layer():
    given = {"batch_size": 7, "validation_fraction": 0.3, "patience": 9, "cache_budget": 0.1}
    duo = DuoSettings(**SMALL, **given)
    for part in (duo.of_pradot(), duo.of_wt_flow()):
        assert {name: getattr(part, name) for name in given} == given
        assert (part.backbone, part.image_size) == ("resnet18", (64, 64))
    assert duo.of_pradot().layers == ("layer2", "layer3")
    assert duo.of_wt_flow().layers == ("layer3",)


def test_the_map_of_the_prototypes_alone_is_smoothed():
    duo = DuoSettings(**SMALL, smoothing=2.0)
    assert (duo.of_pradot().smoothing, duo.of_wt_flow().smoothing) == (2, 0)


def test_a_part_takes_what_only_it_has():
    duo = DuoSettings(**SMALL, pradot={"epochs": 3}, wt_flow={"width": 32})
    assert (duo.of_pradot().epochs, duo.of_wt_flow().width) == (3, 32)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"pradot": {"width": 16}}, ValueError, r"a setting of pradot must be one of alphas, .*, not 'width'"),
        ({"pradot": {"smoothing": 1.0}}, ValueError, "a setting of pradot must be one of .*, not 'smoothing'"),
        ({"wt_flow": {"top_share": 0.1}}, ValueError, "a setting of wt_flow must be one of .*, not 'top_share'"),
        ({"wt_flow": {"width": 17}}, ValueError, "width must be a multiple of 16, not 17"),
        ({"wt_flow": {"width": "wide"}}, TypeError, "wt_flow has a setting of a wrong type: "),
        ({"pradot": {"epochs": 0}}, ValueError, "epochs must be at least 1, not 0"),
        ({"pradot": ["epochs"]}, TypeError, r"pradot must be a dictionary of settings, not \['epochs'\]"),
    ],
)
def test_what_a_part_does_not_accept_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        DuoSettings(**SMALL, **given)
