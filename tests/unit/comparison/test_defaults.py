"""Tests of models from the command line, with the backbone of anomalib-ot weights and no other settings."""

import inspect

import anomalib.models
import pytest

from anomalib_ot.comparison import read_plan
from anomalib_ot.comparison.defaults import defaults_for

HOST = ("Padim", "Patchcore", "Dfm", "Dfkde", "Stfpm", "Fre")


def init_args(*models, **settings):
    plan = read_plan(None, models, ["Assembly"], **settings)
    return {job.key.model: job.model["init_args"] for job in plan.jobs()}


def test_models_have_the_layers_of_the_shipped_plan_for_real_pictures(backbone):
    found = init_args("Pradot", "WtFlow", "Foct", *HOST, backbone=backbone, image_size=[224, 224])
    planned = read_plan("real", backbone=backbone).jobs()
    names = ("layer", "layers", "n_features", "input_dim")
    wanted = {
        job.model["class_path"].rpartition(".")[2]: {
            name: value for name, value in job.model["init_args"].items() if name in names
        }
        for job in planned
    }
    assert {label: {k: v for k, v in found[label].items() if k != "backbone"} for label in found} == {
        label: wanted[label] for label in found
    }


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2"])
def test_what_works_by_itself_is_left_alone(name):
    given = init_args("Pradot", "WtFlow", "Foct", "Padim", "Patchcore", "Dfm", backbone=name)
    assert {*map(str, given.values())} == {str({"backbone": name})}


def test_what_is_given_wins(backbone):
    padim = {"class_path": "Padim", "init_args": {"layers": ["blocks.1"], "n_features": 5}}
    given = init_args(padim, "Patchcore", backbone=backbone, layers=["blocks.0", "blocks.1"])
    assert given["Padim"] == {"backbone": backbone, "layers": ["blocks.1"], "n_features": 5}
    assert given["Patchcore"]["layers"] == ["blocks.0", "blocks.1"]


def test_padim_keeps_no_more_features_than_there_are(backbone):
    assert init_args("Padim", backbone=backbone, layers=["blocks.0", "blocks.1"])["Padim"]["n_features"] == 40


def test_the_report_is_told_what_was_chosen(backbone):
    (job,) = read_plan(None, ["Padim"], ["Assembly"], backbone=backbone).jobs()
    assert job.overrides == {
        "layers": "['blocks.1', 'blocks.2', 'blocks.4'], default on this backbone",
        "n_features": "100, required with this backbone",
    }


@pytest.mark.parametrize("backbone", ["no_such_network", "local-dir:/nowhere"])
def test_a_backbone_that_is_not_there_is_for_the_run_to_say(backbone):
    assert init_args("Padim", backbone=backbone) == {"Padim": {"backbone": backbone}}


@pytest.mark.parametrize("name", ["quick", "real", "few_shot"])
def test_runs_of_shipped_plans_keep_their_settings(name, backbone):
    plan = read_plan(name, backbone=backbone)
    for job in plan.jobs():
        own = plan.models[job.key.model].get("init_args", {})
        shared = {"backbone", "layers"}
        assert job.model["init_args"].keys() - shared == own.keys() - shared


@pytest.mark.parametrize("name", sorted(anomalib.models.__all__))
def test_a_model_of_the_host_that_names_no_layers_is_left_to_itself(name):
    kind = getattr(anomalib.models, name)
    if isinstance(kind, type) and "backbone" in inspect.signature(kind).parameters:
        assert isinstance(defaults_for(kind, {"backbone": "resnet18"}, (64, 64)), dict)
