"""A comparison that takes seconds, with random weights and a few small images."""

import pytest

SMALL = {"layers": ["layer1"], "pre_trained": False, "n_features": 10}


@pytest.fixture(scope="session")
def small_plan(tmp_path_factory):
    """Arguments of a plan."""
    root = tmp_path_factory.mktemp("datasets")
    data = {"root": str(root), "n_train": 4, "n_validation": 1, "n_test": 2, "num_workers": 0}
    return {
        "models": {"PaDiM": {"class_path": "Padim", "init_args": SMALL}},
        "data": {"tray": {"class_path": "Assembly", "init_args": data}},
        "backbone": "resnet18",
        "image_size": (64, 64),
    }
