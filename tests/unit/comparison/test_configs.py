import csv

import pytest

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
