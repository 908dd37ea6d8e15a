import csv

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

from anomalib_ot.comparison import read_plan
from anomalib_ot.comparison.report.groups import Group
from anomalib_ot.shipped import shipped_files, shipped_folder

PLANS = shipped_files("compare")
REFERENCES = sorted((shipped_folder() / "compare" / "papers").glob("*.csv"))
METRICS = {"image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_F1Max", "pixel_AUSPRO"}


@pytest.fixture(scope="module")
def plans():
    return {name: read_plan(name) for name in PLANS}


@pytest.mark.parametrize("name", PLANS)
def test_plan_is_valid_and_says_how_to_run_it(name, plans):
    assert plans[name].categories()
    assert PLANS[name].read_text(encoding="utf-8").startswith(f"# anomalib-ot compare --plan {name} ")


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_reference_is_of_what_its_plan_runs(path, plans):
    (plan,) = [plan for plan in plans.values() if plan.reference == path]
    groups = [Group(label, shots, []) for label in plan.categories() for shots in plan.shots]
    titles = {title for group in groups for title in (group.title, *group.averages)}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == ["category", "model", "metric", "value", "source"]
    assert {row["category"] for row in rows} <= titles
    assert {row["metric"] for row in rows} <= METRICS
    assert all(0 <= float(row["value"]) <= 100 for row in rows)
    assert all(row["source"] for row in rows)
    assert {row["model"] for row in rows} & plan.models.keys()
    # One number for each quantity and source.
    assert len({(row["category"], row["model"], row["metric"], row["source"]) for row in rows}) == len(rows)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A function that saves a network with random weights in timm's format."""

    def save(name):
        folder = tmp_path_factory.mktemp("weights") / name
        save_for_hf(timm.create_model(name, num_classes=0), str(folder), safe_serialization=True)
        return folder

    return save


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "super_add"),
    [
        ("vit_small_patch14_reg4_dinov2", "SuperADD"),
        ("vit_small_patch16_dinov3", {"class_path": "SuperADD"}),
    ],
)
def test_all_models_of_the_plan_for_dino_load_the_same_weights(network, super_add, encoder):
    folder = encoder(network)
    models = [super_add if label == "SuperADD" else label for label in read_plan("dino").models]
    weights = load_file(folder / "model.safetensors")["patch_embed.proj.weight"]
    for job in read_plan("dino", models, ["Assembly"], backbone=folder).jobs():
        state = job.create_model().state_dict()
        own = [each for name, each in state.items() if name.endswith("patch_embed.proj.weight")]
        assert own, job.key.model
        assert all(torch.equal(each, weights) for each in own), job.key.model
