"""Every number that a user can set is refused out of its range when the model is made, and says what it may be."""

import inspect
import re
from typing import get_type_hints

import pytest
import torch
from lightning.pytorch import LightningModule

from anomalib_ot import Duo, Foct, Pradot, WtFlow
from anomalib_ot.features import backbones
from anomalib_ot.features.anomaly_map import AnomalyMapGenerator
from anomalib_ot.features.whitening import LocalWhitening
from anomalib_ot.host.model_settings import ModelSettings, Running, Scoring, Training
from anomalib_ot.models.duo import DuoSettings
from anomalib_ot.models.foct import FoctSettings
from anomalib_ot.models.pradot import PradotSettings
from anomalib_ot.models.wt_flow import WtFlowSettings

SETTINGS = {Pradot: PradotSettings, Foct: FoctSettings, WtFlow: WtFlowSettings, Duo: DuoSettings}
MODELS = [*SETTINGS]
PARTS = [*SETTINGS.values(), LocalWhitening, AnomalyMapGenerator]
COMPONENTS = {"pre_processor", "post_processor", "evaluator", "visualizer"}
BAD = [float("nan"), float("inf"), float("-inf"), -1, -0.5]
# Names in the messages, where they are not the setting's.
NAMES = {
    "alphas": "each of alphas",
    "image_size": "each of image_size",
    "max_channels": "whitened_channels",
    "max_modes": "global_modes",
}


def settings(kind):
    """Settings of a class that are numbers, the types that they may be of, and whether there may be several."""
    hints = get_type_hints(kind.__init__)
    for name in inspect.signature(kind).parameters:
        hint = str(hints[name])
        kinds = {each for each in (int, float) if re.search(rf"\b{each.__name__}\b", hint)}
        if kinds:
            yield name, kinds, "Sequence" in hint or "tuple" in hint


ALL = [(kind, name, kinds, is_list) for kind in MODELS + PARTS for name, kinds, is_list in settings(kind)]


@pytest.fixture(scope="module", autouse=True)
def one_backbone():
    """Makes the backbone once: none of the settings is its."""
    made = backbones.create_extractor("resnet18", ["layer2", "layer3"], pre_trained=False)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pradot", "foct", "wt_flow", "duo"):
            patch.setattr(f"anomalib_ot.models.{name}.torch_model.prepare_extractor", lambda *_: made)
        yield


def make(kind, **arguments):
    if kind in MODELS:
        arguments = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "pre_trained": False, **arguments}
    if issubclass(kind, LightningModule):
        arguments = {"visualizer": False, "evaluator": False, **arguments}
    return kind(**arguments)


@pytest.mark.parametrize("kind", MODELS)
def test_the_settings_are_the_arguments_of_the_model_and_have_their_defaults(kind):
    ours = inspect.signature(SETTINGS[kind]).parameters
    theirs = {name: each for name, each in inspect.signature(kind).parameters.items() if name not in COMPONENTS}
    assert ours.keys() == theirs.keys()
    for name, argument in theirs.items():
        assert argument.default == ours[name].default
        assert get_type_hints(kind.__init__)[name] == get_type_hints(SETTINGS[kind])[name]


def test_a_setting_without_a_kind_is_refused():
    with pytest.raises(TypeError, match="Own must annotate depth, width with Scoring, Training or Running"):

        class Own(ModelSettings):
            layers: Scoring[int] = 1
            depth: int = 1
            epochs: Training[int] = 1
            width: float = 1
            threads: Running[int] = 1


def test_numbers_are_found_in_all_models():
    found = {(kind, name) for kind, name, *_ in ALL}
    assert {(Pradot, "batch_size"), (Pradot, "prototypes_per_cell"), (WtFlow, "mismatch_times")} <= found
    assert len(found) >= 90


@pytest.mark.parametrize(("kind", "name", "kinds", "is_list"), ALL, ids=lambda value: getattr(value, "__name__", None))
def test_a_number_out_of_its_range_is_refused_in_words(kind, name, kinds, is_list):
    for value in [*BAD, *([1.5] if kinds == {int} else [])]:
        given = [value, 0.5] if is_list else value
        with pytest.raises(ValueError, match=rf"^({name}|{NAMES.get(name)}) must be .+, not .*{re.escape(str(value))}"):
            make(kind, **{name: given})


@pytest.mark.parametrize("value", [2**31, 2**63, 2**70])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, name, kinds, is_list in ALL if kinds == {int} and not is_list],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_no_number_is_so_large_that_memory_runs_out_when_a_model_is_made(kind, name, value):
    try:
        make(kind, **{name: value})
    except ValueError as error:
        assert re.match(rf"({name}|{NAMES.get(name)}|capacity) must be ", str(error))  # noqa: PT017


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Pradot, {"cache_budget": -5}, r"cache_budget must be in \(0, 1\], not -5"),
        (WtFlow, {"cache_budget": 0.0}, r"cache_budget must be in \(0, 1\], not 0.0"),
        (WtFlow, {"cache_budget": 1.5}, r"cache_budget must be in \(0, 1\], not 1.5"),
        (Pradot, {"epochs": 2.5}, "epochs must be at least 1 and whole, not 2.5"),
        (Pradot, {"epochs": True}, "epochs must be at least 1 and whole, not True"),
        (Pradot, {"compress_tolerance": float("inf")}, "compress_tolerance must be at least 0 and finite, not inf"),
        (WtFlow, {"coupling": "independent", "block_size": -4}, "block_size must be at least 0, not -4"),
        (Foct, {"image_size": (64, 0)}, "each of image_size must be at least 1, not 0"),
        (Foct, {"image_size": (64,)}, "image_size must be height and width"),
    ],
)
def test_what_was_accepted_and_failed_late_or_never_is_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **arguments)


@pytest.mark.parametrize("value", [1e300, 1e-300])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((Foct, name) for name in ("learning_rate", "temperature", "position_weight")),
        *((Pradot, name) for name in ("epsilon", "sinkhorn_tolerance", "compress_tolerance", "transport_memory")),
        *((WtFlow, name) for name in ("learning_rate", "weight_decay")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_number_that_single_precision_does_not_know_is_refused(kind, name, value):
    with pytest.raises(
        ValueError, match=rf"^{name} must be .+ between 1e-18 and 1e18 in size, not {re.escape(str(value))}"
    ):
        make(kind, **{name: value})


TOO_SMOOTH = r"smoothing must be below 15.875 pixels for images of 64 x 64, not 100"
SMALL = {"image_size": (64, 64), "smoothing": 100.0, "visualizer": False}


@pytest.mark.parametrize("kind", MODELS)
def test_a_smoothing_that_is_too_wide_is_refused_before_training(data, engine, kind, monkeypatch):
    model = make(kind, **SMALL)
    monkeypatch.setattr(model, "on_train_batch_end", lambda *_: pytest.fail("a batch was trained on"))
    with pytest.raises(ValueError, match=TOO_SMOOTH):
        engine().fit(model, datamodule=data())


def test_a_smoothing_that_is_too_wide_for_a_smaller_picture_is_refused():
    generator = AnomalyMapGenerator(15.8)
    scores = [torch.rand(1, 1, 8, 8)]
    assert generator(scores, (64, 64)).isfinite().all()
    with pytest.raises(ValueError, match=r"smoothing must be below 7.875 pixels for images of 64 x 32, not 15.8"):
        generator(scores, (64, 32))
