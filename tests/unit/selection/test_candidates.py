"""The candidates and their Lightning models."""

import torch

from anomalib_ot.comparison import read_plan
from anomalib_ot.selection import CANDIDATES, Candidate


def test_the_candidates_are_five_models_at_two_sizes():
    assert [each.name for each in CANDIDATES] == [
        f"{name} at {side} px" for side in (224, 336) for name in ("Duo", "Pradot", "WtFlow", "PaDiM", "PatchCore")
    ]


def test_candidates_have_the_settings_of_the_plan(backbone):
    names = [each.name.split()[0] for each in CANDIDATES[:5]]
    jobs = {job.key.model: job for job in read_plan("real", names, ["Assembly"], backbone=backbone).jobs()}
    for name, candidate in zip(names, CANDIDATES, strict=False):
        own, planned = candidate.create(backbone), jobs[name].create_model()
        assert type(own) is type(planned)
        assert [*own.model.feature_extractor.layers] == [*planned.model.feature_extractor.layers]
        for setting in ("n_features", "coreset_sampling_ratio"):
            assert own.hparams.get(setting) == planned.hparams.get(setting)


def test_the_model_resizes_and_normalises(backbone):
    model = Candidate("PaDiM", "anomalib.models.Padim", {}, (64, 96)).create(backbone)
    image = model.pre_processor.transform(torch.ones(1, 3, 50, 50))
    assert image.shape == (1, 3, 64, 96)
    assert torch.allclose(image, torch.ones(()), atol=1e-5)


def test_a_candidate_survives_json():
    assert all(Candidate.from_dict({**each.to_dict(), "image_size": [*each.image_size]}) == each for each in CANDIDATES)
