"""Tests of plans: shared settings, settings of single models, and input that is refused before any run."""

import json
from pathlib import Path

import pytest

from anomalib_ot.comparison import Job, Key, Plan, read_plan
from anomalib_ot.features.backbones import backbone_name

PADIM = {"class_path": "Padim", "init_args": {"n_features": 10}}
MODELS = {"PaDiM": PADIM, "Flow": {"class_path": "WtFlow", "init_args": {"layers": ["blocks.4"]}}}
FOLDER = {"class_path": "Folder", "init_args": {"name": "own", "normal_dir": "good"}}
DATA = {"tray": {"class_path": "Assembly"}, "mvtec": {"class_path": "MVTecAD", "categories": ["bottle", "cable"]}}


def test_a_job_for_each_category_number_of_shots_model_and_seed():
    jobs = Plan(MODELS, DATA, seeds=(0, 1), shots=(1, None)).jobs()
    keys = [job.key for job in jobs]
    assert len({*keys}) == len(keys) == 3 * 2 * 2 * 2
    assert keys[:3] == [Key("tray", "PaDiM", 1, 0), Key("tray", "PaDiM", 1, 1), Key("tray", "Flow", 1, 0)]
    assert {job.data["init_args"]["category"] for job in jobs if job.key.category == "mvtec/cable"} == {"cable"}


def test_all_models_share_backbone_layers_size_and_trainer_but_what_they_set_themselves():
    models = {**MODELS, "Big": {**PADIM, "image_size": [96, 64], "trainer": {"max_epochs": 3}, "why": "it must"}}
    plan = Plan(models, DATA, "resnet18", ("layer1",), (32, 48), trainer={"max_epochs": 1, "precision": 32})
    padim, flow, big = plan.jobs()[:3]
    assert padim.model["init_args"] == {"backbone": "resnet18", "layers": ["layer1"], "n_features": 10}
    assert flow.model["init_args"] == {"backbone": "resnet18", "layers": ["blocks.4"]}
    assert (padim.image_size, big.image_size) == ((32, 48), (96, 64))
    assert (padim.trainer["max_epochs"], big.trainer) == (1, {"max_epochs": 3, "precision": 32})
    assert big.overrides == {
        "n_features": "10",
        "image_size": "[96, 64]",
        "trainer": "{'max_epochs': 3}",
        "why": "it must",
    }


@pytest.mark.parametrize("given", [Path, "local-dir:{}".format])
def test_a_backbone_in_the_home_directory_is_found_by_models_of_anomalib_too(monkeypatch, given):
    monkeypatch.setenv("HOME", "/home/someone")
    backbone = given("~/weights/resnet18")
    own = {"Own": {"class_path": "Padim", "init_args": {"backbone": "local-dir:~/mine"}}}
    shared, own = read_plan(models=["Padim"], data=["Assembly"], backbone=backbone).jobs() + Plan(own, DATA).jobs()[:1]
    assert shared.model["init_args"]["backbone"] == "local-dir:/home/someone/weights/resnet18"
    assert own.model["init_args"]["backbone"] == "local-dir:/home/someone/mine"
    assert Job.from_dict(json.loads(json.dumps(shared.to_dict()))) == shared


def test_models_that_call_their_backbone_an_encoder_share_it():
    models = {
        "AnomalyDINO": {"class_path": "AnomalyDINO"},
        "Own": {"class_path": "Dinomaly", "init_args": {"encoder_name": "local-dir:~/base"}},
    }
    shared, own = Plan(models, {"tray": DATA["tray"]}, "vit_small_patch14_dinov2", image_size=(28, 28)).jobs()
    assert shared.model["init_args"] == {"encoder_name": "vit_small_patch14_dinov2"}
    assert shared.overrides == {}
    assert own.model["init_args"] == {"encoder_name": backbone_name("local-dir:~/base")}


def test_a_model_that_takes_no_backbone_is_told_of():
    (job,) = Plan({"G": {"class_path": "Ganomaly"}}, {"tray": DATA["tray"]}, "resnet18").jobs()
    assert job.overrides == {"backbone": "its own"}
    assert job.model["init_args"] == {}


def test_models_and_images_are_made_alike():
    models = {
        "PaDiM": {"class_path": "Padim", "init_args": {"layers": ["layer1"], "pre_trained": False, "n_features": 9}}
    }
    (job,) = Plan(models, {"tray": DATA["tray"]}, "resnet18", image_size=(32, 48)).jobs()
    model = job.create_model()
    resize, normalize = model.pre_processor.transform.transforms
    assert (resize.size, list(normalize.mean)) == ([32, 48], [0.485, 0.456, 0.406])
    assert model.evaluator is None
    assert model.visualizer is None


def test_a_job_survives_its_way_through_json():
    (job,) = Plan({"PaDiM": PADIM}, {"tray": DATA["tray"]}, "resnet18", shots=(2,)).jobs(threads=3)
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"models": {}}, "needs models"),
        ({"data": {}}, "needs data"),
        ({"seeds": ()}, "needs seeds"),
        ({"backbone": ""}, "backbone is empty; .* that command failed"),
        ({"seeds": (-1,)}, "seeds must be at least 0"),
        ({"shots": (0,)}, "shots must be at least 1"),
        ({"seeds": (2**32,)}, "a seed must be at most 4294967295"),
        ({"seeds": (1, 1)}, "seeds must be different from one another"),
        ({"shots": (None, 2, 2)}, "shots must be different from one another"),
        ({"image_size": (0, 32)}, "image_size must be two whole numbers of at least 1"),
        ({"models": {"PaDiM": {**PADIM, "image_size": [32]}}}, "PaDiM: image_size must be two whole numbers"),
        ({"models": {"PaDiM": {**PADIM, "image_size": [32, -1]}}}, "PaDiM: image_size must be two whole numbers"),
        ({"trainer": {"epochs": 3}}, "each of trainer must be an argument of Lightning's Trainer"),
        (
            {"models": {"PaDiM": {**PADIM, "trainer": {"logger": True}}}},
            "each of PaDiM: trainer must be .* no job sets",
        ),
        ({"data": {"mvtec": {"class_path": "MVTecAD", "categories": [3]}}}, "mvtec: categories must be text"),
        (
            {"data": {"a": {"class_path": "Assembly", "init_args": {"category": "x"}, "categories": [""]}}},
            "a: categories",
        ),
        ({"data": {"own": {**FOLDER, "categories": ["a"]}}}, "own/a: .*category"),
        ({"models": {"": PADIM}}, "a label must be text, in quotation marks, not ''"),
        ({"models": {"x" * 256: PADIM}}, "is too long for a folder name; rename it"),
        ({"models": {"a": PADIM, "A": PADIM}}, "a, A have the same folder"),
        ({"models": {"PaDiM": {"class_path": "Padim", "init_args": {"layers": {1}}}}}, "PaDiM.* must be text, finite"),
        ({"title": "\ud800"}, "the title.* must be text"),
        ({"models": {"PaDiM": {"class_path": "Padm"}}}, "PaDiM: .*Padm"),
        (
            {"models": {"PaDiM": {"class_path": "Padim", "init_args": {"layer": 1}}}},
            # Before jsonargparse 4.44 it is not expected, or there is no action for it.
            "PaDiM: .*('layer' is not (accepted|expected)|No action for key \"layer\")",
        ),
        ({"models": {"PaDiM": {"init_args": {}}}}, "PaDiM must have a class_path"),
        ({"models": {"PaDiM": {**PADIM, "epochs": 3}}}, "may have image_size, init_args, shots, trainer, why"),
        ({"models": {1: PADIM}}, "a label must be text, in quotation marks, not 1"),
        ({"models": {"PaDiM": {**PADIM, "image_size": 32}}}, "PaDiM: image_size must be a list, not 32"),
        ({"models": {"PaDiM": {**PADIM, "shots": "4"}}}, "PaDiM: shots must be a whole number of at least 1, not '4'"),
        ({"models": {"PaDiM": {**PADIM, "shots": 0}}}, "PaDiM: shots must be a whole number of at least 1, not 0"),
        ({"models": {"PaDiM": {**PADIM, "trainer": [1]}}}, r"PaDiM: trainer must be a dict, not \[1\]"),
        ({"models": {"PaDiM": {"class_path": "Padim", "init_args": 3}}}, "PaDiM: init_args must be a dict, not 3"),
        ({"data": {"tray": {"class_path": "Assembly", "categories": 3}}}, "tray: categories must be a list, not 3"),
        ({"data": {"tray": {"class_path": "Padim"}}}, "tray: "),
        ({"baseline": "Padim"}, "the baseline 'Padim' is not among PaDiM, Flow"),
        ({"models": {"a 1": PADIM, "a:1": PADIM}}, "a 1, a:1 have the same folder"),
        ({"data": {"a/b": DATA["tray"], "a-b": DATA["tray"]}}, "a/b, a-b have the same folder"),
        ({"ensembles": ("PaDiM",)}, "joins the labels of two models"),
        ({"ensembles": ("PaDiM+PaDiM",)}, "joins the labels of two models"),
        ({"ensembles": ("PaDiM+Foo",)}, "no model is called Foo; there are PaDiM, Flow"),
    ],
)
def test_what_cannot_run_is_refused_at_once(changes, reason):
    with pytest.raises(ValueError, match=reason):
        Plan(**{"models": MODELS, "data": DATA, **changes})


def test_reference_with_other_columns(tmp_path):
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns category, model"):
        Plan(MODELS, DATA, reference=tmp_path / "r.csv").published()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"category,model,metric,value,source\n\xff,b,c,1,d\n", "cannot be read as CSV"),
        (b"category,model,metric,value,source\n" + b"a" * 200_000 + b",b,c,1,d\n", "cannot be read as CSV"),
        (b"category,model,metric,value,source\na,b,c,1\n", "a line that does not have 5 cells"),
        (b"category,model,metric,value,source\na,b,c,1,d,e\n", "a line that does not have 5 cells"),
    ],
)
def test_reference_that_is_no_table(tmp_path, content, reason):
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        Plan(MODELS, DATA, reference=tmp_path / "r.csv").published()


def test_shots_are_drawn_by_the_seed(tmp_path):
    data = {"root": str(tmp_path), "n_train": 20, "n_validation": 1, "n_test": 1}
    plan = Plan(
        {"PaDiM": PADIM}, {"tray": {"class_path": "Assembly", "init_args": data}}, seeds=(0, 1), shots=(2, None)
    )
    drawn = []
    for job in plan.jobs():
        few = job.create_data()
        few.prepare_data()
        few.setup()
        drawn.append(few.train_data.samples.image_path.tolist())
    assert [len(paths) for paths in drawn] == [2, 2, 20, 20]
    assert drawn[0] != drawn[1]


def test_a_model_may_have_a_number_of_shots_of_its_own(tmp_path):
    data = {"class_path": "Assembly", "init_args": {"root": str(tmp_path), "n_train": 5, "n_validation": 1}}
    plan = Plan({"PaDiM": PADIM, "Few": {**PADIM, "shots": 3}}, {"tray": data}, shots=(2, None))
    jobs = plan.jobs()
    assert [job.training_images for job in jobs] == [2, 3, None, 3]
    assert [job.key.shots for job in jobs] == [2, 2, None, None]
    assert [("shots" in job.config, "shots" in job.overrides) for job in jobs] == [(False, False), (True, True)] * 2
    few = jobs[-1].create_data()
    few.prepare_data()
    few.setup()
    assert len(few.train_data) == 3
