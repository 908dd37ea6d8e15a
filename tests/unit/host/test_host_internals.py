"""Internals of the host that we use, one test each: a release that changes one fails here, and says which.

The head of ``anomalib_ot.host`` lists them.
"""

import ast
import inspect
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import timm
import torch
from anomalib.data import AnomalibDataModule, Folder, ImageBatch, InferenceBatch
from anomalib.data.datasets import AnomalibDataset
from anomalib.engine import Engine
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models import UnknownModelError, get_model
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.spec import transform_to_spec
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchvision.transforms import v2

import anomalib_ot
import anomalib_ot.host
from anomalib_ot import Foct, Pradot, WtFlow
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.host.asked_post_processing import _given_to_export
from anomalib_ot.host.finishing import validate_now
from anomalib_ot.host.scale import scale_of
from anomalib_ot.host.seeding import user_seed

PACKAGE = Path(anomalib_ot.__file__).parent
# Public in spite of their names.
PUBLIC = {"_asdict", "_exit"}
# Of Numba, which is no host.
OF_NUMBA = {"_cache"}
# Private attributes that the bases of our models from other packages have.
INHERITED = {
    name
    for model in (Foct, Pradot, WtFlow)
    for base in model.__mro__
    if base is not object and not base.__module__.startswith("anomalib_ot")
    for name in re.findall(r"self\.(_\w+)", inspect.getsource(base))
}

SMALL = {"backbone": "test_resnet", "layers": ["layer2"], "pre_trained": False, "visualizer": False}


class Exported(WtFlow):
    """Notes where it is exported to, and writes nothing."""

    def to_torch(self, export_root, **_):
        self.exported_to = export_root
        return export_root


def engine_after_export(model, ckpt_path=None, **settings):
    """An engine that has made its trainer."""
    engine = Engine(accelerator="cpu", logger=False, **settings)
    engine.export(model, "torch", ckpt_path=ckpt_path)
    return engine


class Learner(LightningModule):
    """Has nothing to learn, and notes what the trainer does."""

    def __init__(self, **hooks):
        super().__init__()
        self.automatic_optimization = False
        self.batches = []
        self.validations = 0
        self.hooks = hooks

    def training_step(self, batch):
        self.batches.append(batch.flatten().tolist())

    def validation_step(self, batch):
        del batch
        self.validations += 1

    def configure_optimizers(self):
        return None

    def on_fit_start(self):
        self.hooks.get("on_fit_start", lambda _: None)(self)

    def on_train_batch_end(self, *_):
        self.hooks.get("on_train_batch_end", lambda _: None)(self)

    def on_train_epoch_end(self):
        self.hooks.get("on_train_epoch_end", lambda _: None)(self)


def trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{**quiet, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1, **settings})


def fit(learner, **settings):
    runner = trainer(**settings)
    runner.fit(learner, DataLoader(torch.arange(2.0)), DataLoader(torch.arange(1.0)))
    return runner


def own_names(tree):
    """Names that a module defines: functions, classes, variables and attributes of its own classes."""
    for kind in ast.walk(tree):
        if isinstance(kind, ast.FunctionDef | ast.ClassDef):
            yield kind.name
        elif isinstance(kind, ast.Name) and isinstance(kind.ctx, ast.Store):
            yield kind.id
        if isinstance(kind, ast.ClassDef):
            for node in ast.walk(kind):
                is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                if is_set and ast.unparse(node.value) == "self" and (node.attr not in INHERITED or not kind.bases):
                    yield node.attr


def private_names():
    """Names with an underscore that the package uses and does not define, each with a file that uses it."""
    used, own = {}, {*PUBLIC, *OF_NUMBA}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used |= {node.attr: path for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        own |= {*own_names(tree)}
    return {name: path for name, path in used.items() if name.startswith("_") and name[:2] != "__" and name not in own}


def test_each_private_name_of_another_package_is_listed_at_the_door():
    unlisted = {
        name: path for name, path in private_names().items() if not re.search(rf"\b{name}\b", anomalib_ot.host.__doc__)
    }
    assert not unlisted, "list these in the head of anomalib_ot.host, and add a test here"


def test_no_private_module_of_another_package_is_imported():
    found = [
        (path.name, node.module)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        if "._" in node.module and not node.module.startswith("anomalib_ot")
    ]
    assert not found


def test_data_source_of_the_fit_loop_gives_the_batches_and_is_set_by_each_fit():
    given = []

    def replace(learner):
        source = learner.trainer.fit_loop._data_source
        given.append(source.dataloader())
        source.instance = DataLoader(torch.tensor([7.0, 8.0, 9.0]), batch_size=3)

    learner, runner, loader = Learner(on_fit_start=replace), trainer(), DataLoader(torch.arange(2.0))
    for epochs in (1, 2):
        runner.fit_loop.max_epochs = epochs
        runner.fit(learner, loader)
    assert given == [loader, loader]
    assert learner.batches == [[7.0, 8.0, 9.0]] * 2


def test_pl_global_seed_is_the_seed_of_seed_everything(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    seed_everything(41, verbose=False)
    assert user_seed() == 41


def test_can_stop_early_waits_for_the_least_number_of_epochs():
    found = []
    fit(
        Learner(on_train_epoch_end=lambda each: found.append(each.trainer.fit_loop._can_stop_early)),
        min_epochs=2,
        max_epochs=3,
    )
    assert found == [False, True, True]


def test_skip_next_val_skips_one_validation():
    def skip(learner):
        assert learner.trainer.fit_loop.epoch_loop._skip_next_val is False
        learner.trainer.fit_loop.epoch_loop._skip_next_val = learner.current_epoch == 0

    learner = Learner(on_train_batch_end=skip)
    fit(learner, max_epochs=2, num_sanity_val_steps=0)
    assert learner.validations == 1


def test_val_loop_runs_within_training():
    learner = Learner(on_train_epoch_end=lambda each: validate_now(each.trainer))
    fit(learner, num_sanity_val_steps=0)
    assert learner.validations == 2


def test_signal_connector_holds_back_a_termination_and_gives_it_again():
    def terminate(learner):
        connector = learner.trainer._signal_connector
        connector.received_sigterm = True
        assert learner.trainer.received_sigterm is True
        connector.received_sigterm = False

    learner = Learner(on_train_batch_end=terminate)
    fit(learner)
    assert len(learner.batches) == 2

    def end(learner):
        learner.trainer._signal_connector.received_sigterm = True

    with pytest.raises(SIGTERMException):
        fit(Learner(on_train_epoch_end=end), max_epochs=2)


def test_val_check_time_interval_is_set_by_a_time_alone():
    found = [trainer(val_check_interval=each)._val_check_time_interval for each in (None, 0.5, "00:00:01:00")]
    assert found == [None, None, 60.0]


def test_trainer_of_a_module_is_none_where_the_property_raises():
    learner = Learner()
    assert learner._trainer is None
    with pytest.raises(RuntimeError):
        learner.trainer  # noqa: B018 - the property is what is tested
    runner = fit(learner)
    assert learner._trainer is runner


def test_allowed_modules_let_get_model_import_from_a_package(caplog):
    assert "anomalib_ot.models" in anomalib_ot.host.anomalib.models.ALLOWED_MODULES
    assert "WtFlow" in anomalib_ot.host.anomalib.models.__all__
    for allowed, place in ((False, "torch.nn.Linear"), (True, "anomalib_ot.models.Nothing")):
        caplog.clear()
        with pytest.raises(UnknownModelError):
            get_model({"class_path": place})
        assert allowed == ("is not allowed" not in caplog.text)


def test_checkpoint_io_of_the_strategy_is_anomalibs_and_can_be_replaced(tmp_path):
    strategy = engine_after_export(Exported(**SMALL), default_root_dir=tmp_path).trainer.strategy
    assert type(strategy.checkpoint_io) is AnomalibCheckpointIO
    seen = []

    class Watching(AnomalibCheckpointIO):
        def load_checkpoint(self, path, map_location=None, weights_only=None):
            seen.append((path, map_location, weights_only))
            return {}

    strategy.checkpoint_io = Watching([])
    assert strategy.checkpoint_io.extra_safe_globals == []
    strategy.load_checkpoint("model.ckpt", weights_only=None)
    assert [path for path, *_ in seen] == ["model.ckpt"]


def test_anomalib_pre_processor_config_is_the_key_of_the_transform():
    checkpoint = {}
    AnomalibModule.on_save_checkpoint(WtFlow(**SMALL), checkpoint)
    assert {"anomalib_pre_processor_config", "anomalib_post_processor_config"} <= checkpoint.keys()


def test_transform_to_spec_refuses_what_a_checkpoint_cannot_store():
    assert transform_to_spec(None) is None
    assert transform_to_spec(v2.Compose([v2.Resize((8, 8))]))
    with pytest.raises(ValueError, match="Lambda"):
        transform_to_spec(v2.Lambda(lambda image: image))


def test_frame_of_export_has_the_model_that_was_given(tmp_path):
    found = []

    class Loaded(Exported):
        @classmethod
        def load_from_checkpoint(cls, *_args, **_kwargs):
            found.append(_given_to_export(inspect.currentframe()))
            return given

    given = Loaded(**SMALL)
    engine_after_export(given, ckpt_path="model.ckpt", default_root_dir=tmp_path)
    assert found == [given]
    assert _given_to_export(inspect.currentframe()) is None


def test_default_export_root_of_the_engine_is_a_path(tmp_path):
    model = Exported(**SMALL)
    engine = engine_after_export(model, default_root_dir=tmp_path)
    assert model.exported_to == Path(engine.trainer.default_root_dir)
    assert isinstance(model.exported_to, Path)


@pytest.mark.parametrize("level", ["image", "pixel"])
@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (3.0, 3.0), (float("nan"), float("nan"))])
@pytest.mark.parametrize("normalizes", [True, False])
def test_post_processor_shows_scores_on_the_scale_of_its_minimum_and_maximum(level, low, high, normalizes):
    processor = PostProcessor(enable_normalization=normalizes)
    for name, value in (("_image_threshold", 3.0), ("_pixel_threshold", 3.0)):
        getattr(processor, name).fill_(value)
    for each in ("image", "pixel"):
        getattr(processor, f"{each}_min").fill_(low)
        getattr(processor, f"{each}_max").fill_(high)
    raw = torch.tensor([1.5, 2.0, 3.0, 4.0, 4.5])
    shown = processor(InferenceBatch(pred_score=raw, anomaly_map=raw.view(5, 1, 1)))
    expected = shown.pred_score if level == "image" else shown.anomaly_map.flatten()
    scale = scale_of(SimpleNamespace(post_processor=processor), level)
    torch.testing.assert_close(scale.shown(raw), expected)
    assert scale.raw_threshold == 3.0
    assert scale.is_raw == (not normalizes or math.isnan(low))


def test_post_processor_computes_a_range_without_thresholds():
    processor = PostProcessor()
    scores, maps = torch.tensor([1.0, 3.0]), torch.rand(2, 4, 4)
    batch = ImageBatch(image=torch.rand(2, 3, 4, 4), pred_score=scores, anomaly_map=maps)
    processor._image_min_max_metric.update(batch)
    processor._pixel_min_max_metric.update(batch)
    processor.on_validation_epoch_end(None, None)
    assert (processor.image_min, processor.image_max) == (1.0, 3.0)
    assert processor.pixel_max == maps.max()
    assert processor._image_threshold.isnan()
    assert processor._pixel_threshold.isnan()
    assert set(processor._checkpoint_config_keys) == processor.checkpoint_config().keys()


def test_post_processor_takes_a_range_that_is_written_in_place():
    names = {name for name, _ in PostProcessor().named_buffers()}
    assert {"image_min", "image_max", "pixel_min", "pixel_max", "_image_threshold", "_pixel_threshold"} <= names


@pytest.fixture
def data(tmp_path):
    """A data module of four images, which is set up."""
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{index}.png")
    data = Folder("parts", "good", tmp_path, "bad", num_workers=0)
    data.setup(TrainerFn.FITTING)
    return data


def test_is_setup_keeps_the_split_of_a_data_module(data):
    assert data._is_setup is True
    before = data.test_data
    data.setup(TrainerFn.FITTING)
    assert data.test_data is before
    assert isinstance(before, AnomalibDataset)
    assert isinstance(before.samples, pd.DataFrame)
    assert "image_path" in before.samples


def test_settings_that_decide_the_split_are_known_by_their_endings(data):
    names = {*vars(data)}
    assert {
        "normal_dir",
        "abnormal_dir",
        "test_split_mode",
        "test_split_ratio",
        "val_split_mode",
        "val_split_ratio",
    } <= {*names}


def test_folders_of_the_engine_are_those_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect.signature(Engine).parameters["default_root_dir"].default == "results"
    engine = engine_after_export(Exported(**SMALL))
    folder = Path(engine.trainer.checkpoint_callback.dirpath)
    assert folder.parts[-2:] == ("weights", "lightning")


def test_logger_of_timms_builder_warns_of_unused_weights(tmp_path, caplog):
    network = timm.create_model("test_efficientnet", pretrained=False)
    timm.models.save_for_hf(network, tmp_path)
    backbone = f"local-dir:{tmp_path}"
    with caplog.at_level(logging.WARNING):
        timm.create_model(backbone, pretrained=True, features_only=True)
    assert [(each.name, each.getMessage()[:15]) for each in caplog.records] == [
        ("timm.models._builder", "Unexpected keys")
    ]
    caplog.clear()
    create_extractor(backbone, ["blocks.2"])
    assert not caplog.records


def test_uses_intermediates_tells_how_a_network_gives_its_maps():
    assert TimmFeatureExtractor("test_resnet", ["layer1"], pre_trained=False)._uses_intermediates is False
    assert TimmFeatureExtractor("test_vit", ["blocks.1"], pre_trained=False)._uses_intermediates is True


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.cpu, lambda module: module.to(torch.bfloat16)])
def test_apply_is_how_a_module_changes_type_and_device(change):
    called = []

    class Watching(nn.Linear):
        def _apply(self, fn, recurse=True):
            called.append(recurse)
            return super()._apply(fn, recurse)

    change(nn.Sequential(Watching(1, 1)))
    assert called


def test_setup_of_a_data_module_calls_its_three_steps_in_order():
    steps = []

    class Watching(AnomalibDataModule):
        def _setup(self, _stage=None):
            steps.append("_setup")

        def _create_test_split(self):
            steps.append("_create_test_split")

        def _create_val_split(self):
            steps.append("_create_val_split")

        def _update_augmentations(self):
            """Nothing, for lack of data sets."""

    Watching(1, 1, 0).setup(TrainerFn.FITTING)
    assert steps == ["_setup", "_create_test_split", "_create_val_split"]


def test_to_sync_and_should_unsync_are_what_compute_syncs_with():
    metric, found = MeanMetric(), []
    metric.update(1.0)
    metric.sync_context = lambda *_args, **settings: found.append(settings) or torch.no_grad()
    metric.compute()
    assert found[0]["should_sync"] is metric._to_sync
    assert found[0]["should_unsync"] is metric._should_unsync


def test_a_memory_bank_is_fitted_by_a_buffer():
    model = Foct(**SMALL)
    assert not model._is_fitted
    model._is_fitted = torch.tensor([True])
    assert "_is_fitted" in model.state_dict()


def test_export_transform_is_what_a_pre_processor_exports():
    processor = PreProcessor(v2.Normalize([0.0] * 3, [0.5] * 3))
    images = torch.ones(1, 3, 2, 2)
    processor.export_transform = None
    assert torch.equal(processor(images), images)
