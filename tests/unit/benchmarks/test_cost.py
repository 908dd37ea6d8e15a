"""The benchmark of costs: its models by backbone, its runs in processes of their own, and its table."""

import pytest
import torch

from benchmarks.cost import (
    COLUMNS,
    FIT,
    INT8,
    NOTE,
    SINGLE,
    TORCH,
    configurations,
    jobs_of,
    main,
    measured,
    table,
    with_weights,
)
from benchmarks.nearest_cell import NearestCellModel
from benchmarks.references import NearestCell, joined


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_compares_fits_with_the_fastest_peer_and_the_rest_with_the_backbone():
    rows = {
        "Pradot": {FIT: (12.0, None), TORCH: (22.0, 20.0), INT8: (11.0, 22.0)},
        "PaDiM": {FIT: (4.0, None), TORCH: (30.0, 24.0), NOTE: "no export: a | b"},
        "PatchCore": {FIT: "> 600"},
    }
    header, _, backbone, *found = table(rows).splitlines()
    assert cells(header) == ["model", *COLUMNS]
    # The median of the processes.
    assert cells(backbone)[:6] == ["backbone alone", "", "22.0", "", "", ""]
    found = {name: dict(zip(COLUMNS, values, strict=True)) for name, *values in map(cells, found)}
    assert [found[name][FIT] for name in rows] == ["12.0 (3.00)", "4.0 (1.00)", "> 600"]
    assert [found[name][TORCH] for name in rows] == ["22.0 (1.10)", "30.0 (1.25)", "n/a"]
    assert [found[name][INT8] for name in rows] == ["11.0 (0.50)", "n/a", "n/a"]
    assert [found[name][NOTE] for name in rows] == ["", "no export: a / b", ""]
    assert found["Pradot"][SINGLE] == "n/a"


def test_fits_are_not_compared_without_peers():
    assert "| 12.0 |" in table({"Pradot": {FIT: (12.0, None)}})


def test_models_that_accept_transformers_only_are_replaced_on_other_backbones():
    assert [*configurations("resnet18")][5:] == ["AnomalyDINO's rule"]
    assert [*configurations("vit_small_patch14_dinov2.lvd142m")][5:] == ["AnomalyDINO", "RAD"]


@pytest.mark.parametrize("backbone", ["resnet18", "tf_efficientnet_lite0", "vit_small_patch14_dinov2.lvd142m"])
def test_all_models_have_layers_of_the_backbone(backbone, tmp_path):
    jobs = jobs_of(backbone, 112, [2, 4], None, tmp_path, 1, 0)
    assert [job.key.shots for job in jobs] == [2] * (len(jobs) // 2) + [4] * (len(jobs) // 2)
    names = {name for job in jobs for name in job.model["init_args"].get("layers", [])}
    assert all(name.startswith("layer" if backbone == "resnet18" else "blocks.") for name in names)


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got \['RAD'\], but the models on resnet18 are .*'PatchCore'"):
        jobs_of("resnet18", 64, [2], ["RAD"], tmp_path, 1, 0)


def test_rule_as_a_model_scores_as_the_reference(backbone):
    model = NearestCellModel(backbone, ["blocks.2", "blocks.4"])
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model.train()
    model(images[:2])
    model.fit()
    result = model.eval()(images)
    with torch.no_grad():
        features = joined([*model.feature_extractor(images).values()])
    distances = NearestCell(features[:2])(features)
    assert torch.allclose(result.pred_score[:2], torch.zeros(2), atol=1e-5)
    assert torch.allclose(result.pred_score[2], distances[2].max(), atol=1e-5), "the highest of 64 cells"
    assert model.state_dict()["bank"].shape == (2 * 64, features.shape[1])
    assert result.anomaly_map.shape == (3, 1, 64, 64)


@pytest.mark.slow
def test_fit_over_the_limit_is_shown(tmp_path):
    (job,) = jobs_of(with_weights("resnet18", tmp_path), 64, [2], ["PaDiM"], tmp_path, 1, 0)
    job.create_data().prepare_data()
    assert measured(job, 0) == {FIT: "> 0"}


@pytest.mark.slow
def test_small_models_are_measured(capsys):
    main("resnet18", 64, [2], ["WtFlow", "PaDiM"])
    header, _, backbone, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert cells(header) == ["model", *COLUMNS]
    assert all(cells(backbone)[2:5])
    found = {name: dict(zip(COLUMNS, values, strict=True)) for name, *values in map(cells, rows)}
    assert [*found] == ["WtFlow", "PaDiM"]
    assert found["PaDiM"][FIT].endswith("(1.00)")
    assert found["PaDiM"].pop(INT8) == "n/a"
    assert all(costs[column] not in {"", "n/a"} for costs in found.values() for column in costs.keys() - {NOTE})
    assert {costs[NOTE] for costs in found.values()} == {""}
