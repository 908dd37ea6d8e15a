"""Small random models of ours, fitted to noise."""

import pytest
import torch
from anomalib.data import ImageItem
from anomalib.post_processing import PostProcessor

from anomalib_ot import Duo, Foct, Pradot, WtFlow
from anomalib_ot.drawing.pictures import pictures_of

PROTOTYPES = {"prototypes_per_cell": 1, "whitened_channels": 8}
FLOW = {"width": 16, "whitened_channels": 8}
SETTINGS = {
    "backbone": "test_resnet",
    "layers": ["layer2", "layer3"],
    "pre_trained": False,
    "image_size": (64, 64),
    "evaluator": False,
}


def noise(count, seed=0, size=(72, 80)):
    """Pictures that have no file."""
    generator = torch.Generator().manual_seed(seed)
    return [ImageItem(image=torch.rand(3, *size, generator=generator)) for _ in range(count)]


def set_threshold(processor, threshold):
    """As a validation leaves it whose scores are from 0 to twice the threshold."""
    for level in ("image", "pixel"):
        getattr(processor, f"_{level}_threshold").fill_(threshold)
        getattr(processor, f"{level}_min").fill_(0.0)
        getattr(processor, f"{level}_max").fill_(2 * threshold)


def fit_prototypes(model, features):
    model.fit_whitening([features])
    model.initialise(features)
    parts = model.weights.shape[1]
    model.weights = torch.tensor([[0.1, 0.2, 0.05], [0.3, 0.4, 0.05]])[:, :parts]


def fit_flow(model, features):
    model.fit_normalization([features])
    # A field that is still zero would move nothing.
    for weights in model.velocities().parameters():
        weights.add_(0.05 * torch.randn_like(weights))


@pytest.fixture
def fitted():
    """A model fitted to four pictures, with anomalib's post-processor and the thresholds given."""

    def make(name, threshold=None, **arguments):
        torch.manual_seed(0)
        arguments.setdefault("post_processor", PostProcessor())
        if name == "Foct":
            model = Foct(**{**SETTINGS, "rotations": 2, "support_steps": 3, **arguments}).eval()
        elif name == "Pradot":
            model = Pradot(**{**SETTINGS, **PROTOTYPES, **arguments}).eval()
        elif name == "Duo":
            model = Duo(**{**SETTINGS, "pradot": PROTOTYPES, "wt_flow": FLOW, **arguments}).eval()
        else:
            model = WtFlow(**{**SETTINGS, **FLOW, **arguments}).eval()
        images = torch.stack([each.prepared for each in pictures_of(model, noise(4))])
        with torch.no_grad():
            if name == "Foct":
                model.model.fit(images)
            elif name == "Duo":
                features = model.model.extract(images)
                fit_prototypes(model.model.pradot, features)
                fit_flow(model.model.wt_flow, features)
                model.model.weigh([model.model.part_scores(features)], images.shape[-2:])
            else:
                fit = fit_prototypes if name == "Pradot" else fit_flow
                fit(model.model, model.model.extract(images))
        if threshold is not None:
            set_threshold(model.post_processor, threshold)
        return model

    return make


@pytest.fixture
def pictures():
    """Pictures as a model sees them, other than those that it was fitted to."""
    return lambda model, count=1, seed=1: list(pictures_of(model, noise(count, seed)))
