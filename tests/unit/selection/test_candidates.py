"""The candidates and their Lightning models."""

import pytest
import torch

from anomalib_ot.comparison import read_plan
from anomalib_ot.selection import CANDIDATES, Candidate, on_backbones


def test_the_candidates_are_five_models_at_two_sizes():
    assert [each.name for each in CANDIDATES] == [
        f"{name} at {side} px" for side in (224, 336) for name in ("Duo", "Pradot", "WtFlow", "PaDiM", "PatchCore")
    ]


def test_candidates_have_the_settings_of_the_plan(backbone):
    names = [each.name.split()[0] for each in CANDIDATES[:5]]
    jobs = {job.key.model: job for job in read_plan("real", names, ["Assembly"], backbone=backbone).jobs()}
    for name, candidate in zip(names, CANDIDATES, strict=False):
        own, planned = candidate.on(backbone).create(), jobs[name].create_model()
        assert type(own) is type(planned)
        assert [*own.model.feature_extractor.layers] == [*planned.model.feature_extractor.layers]
        for setting in ("n_features", "coreset_sampling_ratio"):
            assert own.hparams.get(setting) == planned.hparams.get(setting)


def test_the_model_resizes_and_normalises(backbone):
    model = Candidate("PaDiM", "anomalib.models.Padim", {}, (64, 96)).on(backbone).create()
    image = model.pre_processor.transform(torch.ones(1, 3, 50, 50))
    assert image.shape == (1, 3, 64, 96)
    assert torch.allclose(image, torch.ones(()), atol=1e-5)


def test_a_candidate_survives_json():
    assert all(Candidate.from_dict({**vars(each), "image_size": [*each.image_size]}) == each for each in CANDIDATES)


def test_on_one_backbone_the_names_are_those_of_the_sizes(backbone):
    assert on_backbones(CANDIDATES, [backbone]) == [each.on(backbone) for each in CANDIDATES]


def test_several_backbones_are_named_the_first_one_first(backbone):
    found = on_backbones(CANDIDATES[:6], ["resnet18", backbone])
    assert len({each.name for each in found}) == len(found) == 12
    assert found[0].name == "Duo at 224 px on resnet18"
    assert found[5].name == "Duo at 336 px on resnet18"
    assert (found[6].name, found[6].backbone) == ("Duo at 224 px on tf_efficientnet_lite0", backbone)
    assert found[6].model == "Duo"


def test_a_backbone_of_one_size_has_each_model_once():
    found = on_backbones(CANDIDATES, ["swin_tiny_patch4_window7_224"])
    assert [each.name for each in found] == [each.name for each in CANDIDATES[:5]]
    found = on_backbones(CANDIDATES, ["vit_small_patch14_dinov2"])
    assert [each.name for each in found] == [f"{each.model} at 448 px" for each in CANDIDATES[:5]]
    assert {each.image_size for each in found} == {(448, 448)}


@pytest.mark.parametrize("backbones", [[], ["resnet18", "resnet18"]])
def test_backbones_are_given_once(backbones):
    with pytest.raises(ValueError, match="backbones must be at least one, each once"):
        on_backbones(CANDIDATES, backbones)
