"""The few-shot protocol on small random images."""

import pytest
import torch
import yaml
from anomalib.models import Padim

from anomalib_ot import Assembly
from anomalib_ot.cli import main
from anomalib_ot.comparison import FewShotPlan, compare_few_shot, summarise
from anomalib_ot.comparison.few_shot import with_same_metrics

SMALL = {"backbone": "resnet18", "layers": ["layer3"], "pre_trained": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def plan(root, tmp_path):
    path = tmp_path / "plan.yaml"
    data = {"root": str(root), "n_train": 4, "n_validation": 1, "n_test": 2}
    models = {
        "Foct": {"class_path": "anomalib_ot.Foct", "init_args": {**SMALL, "rotations": 1}},
        "PatchCore": {"class_path": "anomalib.models.Patchcore", "init_args": dict(SMALL)},
    }
    plan = {
        "image_size": [64, 64],
        "data": {"class_path": "anomalib_ot.Assembly", "init_args": data},
        "models": models,
    }
    path.write_text(yaml.safe_dump(plan))
    return path


def test_command_prints_a_table_and_keeps_every_result(plan, tmp_path, capsys):
    output = tmp_path / "deep" / "few.csv"
    arguments = ["few-shot", str(plan), "--shots", "[1, 2]", "--output", str(output), "--accelerator", "cpu"]
    main([*arguments, "--seeds", "1"])
    table = capsys.readouterr().out
    assert [line.count("|") for line in table.splitlines()] == [10] * (2 + 4)
    kept = output.read_text()
    assert len(kept.splitlines()) == 1 + 4
    # It goes on where it stopped.
    main([*arguments, "--seeds", "2"])
    assert output.read_text().startswith(kept)
    assert len(output.read_text().splitlines()) == 1 + 8
    assert "±" in capsys.readouterr().out


def test_models_of_a_plan_share_backbone_size_and_metrics(plan):
    read = FewShotPlan(plan, "resnet34")
    for make in read.models().values():
        model = make()
        assert model.hparams["backbone"] == "resnet34"
        assert model.pre_processor.transform.transforms[0].size == [64, 64]
        assert [metric.name for metric in model.evaluator.test_metrics] == [
            "image_AUROC",
            "pixel_AUROC",
            "image_F1Max",
            "pixel_F1Max",
        ]


def test_table_is_mean_and_standard_deviation():
    row = {"category": "tray", "shots": "1", "model": "Foct", "image_AUROC": "80", "pixel_AUROC": ""}
    (line,) = summarise([row, {**row, "image_AUROC": "90"}]).splitlines()[2:]
    assert line == "| tray | 1 | Foct | 2 | 85.0 ± 7.1 |  |  |  |  |"


def test_file_of_something_else_is_not_touched(plan, tmp_path):
    output = tmp_path / "other.csv"
    output.write_text("a,b\n1,2\n")
    read = FewShotPlan(plan)
    with pytest.raises(ValueError, match="something else than few-shot results"):
        compare_few_shot(read.data, read.models(), [1], 1, output)
    assert output.read_text() == "a,b\n1,2\n"


def test_plan_without_models(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("data: {class_path: anomalib_ot.Assembly}\n")
    with pytest.raises(ValueError, match="must have data and models"):
        FewShotPlan(path)


@pytest.mark.parametrize("arguments", [{"shots": []}, {"seeds": 0}, {"models": {}}])
def test_nothing_to_compare(root, tmp_path, arguments):
    models = {"PaDiM": lambda: with_same_metrics(Padim(**SMALL), (64, 64), None)}
    arguments = {"models": models, "shots": [1], "seeds": 1, **arguments}
    with pytest.raises(ValueError, match="a comparison needs models, shots and at least one seed"):
        compare_few_shot(lambda: Assembly(root), output=tmp_path / "few.csv", **arguments)


def test_image_scores_survive_without_masks(root, tmp_path):
    def blank():
        data = Assembly(root, n_train=4, n_validation=1, n_test=2)
        data.prepare_data()
        data.setup()
        for part in (data.test_data, data.val_data):
            part.samples["mask_path"] = ""
        return data

    torch.manual_seed(0)
    models = {"PaDiM": lambda: with_same_metrics(Padim(**SMALL), (64, 64), None)}
    rows = compare_few_shot(blank, models, [1], 1, tmp_path / "few.csv")
    assert 0 <= float(rows[0]["image_AUROC"]) <= 100
