"""The figure of a model's failures."""

import pytest
import torch
from PIL import Image

from anomalib_ot import Assembly, WtFlow
from benchmarks.failures import WIDTH, draw, failures


def test_failures_are_the_anomalies_below_and_the_normal_images_above_the_others():
    scores = torch.tensor([0.1, 0.9, 0.3, 0.5, 0.2])
    anomalous = torch.tensor([False, True, True, False, True])
    assert failures(scores, anomalous) == ([4, 2], [3])


@pytest.mark.slow
def test_the_figure_of_a_model_is_drawn_and_its_failures_are_counted(backbone, tmp_path):
    data = Assembly(tmp_path / "data", n_train=6, n_validation=1, n_test=2)
    path = tmp_path / "failures.png"
    text = draw(
        lambda: WtFlow(backbone, layers=["blocks.4"], image_size=(64, 64), training_steps=2, width=16), data, 0, path
    )
    assert "anomalous images score below a normal one" in text
    with Image.open(path) as figure:
        assert figure.width == WIDTH
