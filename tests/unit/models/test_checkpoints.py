"""Checkpoints that are cut off, of something else, or that would run code."""

import re
import struct
from pathlib import Path
from unittest.mock import Mock
from zipfile import ZipFile

import pytest
import torch
from anomalib.engine import Engine

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow

SHARED = {
    "backbone": "test_resnet",
    "layers": ["layer3"],
    "pre_trained": False,
    "image_size": (64, 64),
    "visualizer": False,
}
MODELS = {
    "Pradot": lambda: Pradot(prototypes_per_cell=1, whitened_channels=16, epochs=1, batch_size=4, **SHARED),
    "Foct": lambda: Foct(rotations=1, support_steps=1, **SHARED),
    "WtFlow": lambda: WtFlow(width=16, whitened_channels=16, training_steps=2, batch_size=4, **SHARED),
    "Duo": lambda: Duo(
        pradot={"prototypes_per_cell": 1, "whitened_channels": 16, "epochs": 1},
        wt_flow={"width": 16, "whitened_channels": 16, "training_steps": 2},
        batch_size=4,
        **SHARED,
    ),
}


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def checkpoints():
    """Checkpoints of the models that were trained already, as bytes."""
    return {}


@pytest.fixture
def trained(checkpoints, data, engine, checkpoint, tmp_path):
    """A checkpoint of a model, which the test may damage."""

    def train(name="Pradot"):
        if name not in checkpoints:
            runner = engine()
            runner.fit(MODELS[name](), datamodule=FewShot(data(), 2) if name == "Foct" else data())
            checkpoints[name] = Path(checkpoint(runner)).read_bytes()
        (tmp_path / "trained").mkdir()
        path = tmp_path / "trained" / "model.ckpt"
        path.write_bytes(checkpoints[name])
        return path

    return train


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_holds_tensors_and_settings_alone(trained, name):
    path = trained(name)
    assert not torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert isinstance(type(MODELS[name]()).load_from_checkpoint(path, weights_only=True), type(MODELS[name]()))


def broken(path, kind, folder):
    """A file that is no checkpoint of a model of ours."""
    target = folder / "broken.ckpt"
    if kind == "cut off":
        content = path.read_bytes()
        target.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        target.write_text("weights")
    elif kind == "weights":
        torch.save(torch.load(path, weights_only=True)["state_dict"], target)
    elif kind == "payload":
        torch.save({**torch.load(path, weights_only=True), "more": Payload(folder / "run")}, target)
    elif kind == "module":
        torch.save({"model": torch.nn.Linear(1, 1)}, target)
    return target


BROKEN = {
    "cut off": "is not a complete checkpoint",
    "text": "is not a complete checkpoint",
    "weights": "is not a checkpoint of a trained model",
    "payload": "could run any code",
    "module": "could run any code",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(trained, data, tmp_path, kind):
    path = broken(trained(), kind, tmp_path)
    with pytest.raises(ValueError, match=rf"{path.name}.* {BROKEN[kind]}"):
        Pradot.load_from_checkpoint(path)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=rf"{path.name}.* {BROKEN[kind]}"):
        engine.test(MODELS["Pradot"](), datamodule=data(), ckpt_path=path)
    assert not (tmp_path / "run").exists()


def flipped(path):
    """The checkpoint with each 97th byte of its last part another, where its table of contents is."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) - 1000, len(content) - 40, 97):
        content[place] ^= 0xFF
    path.write_bytes(content)


DAMAGE = {
    "bytes": ("is damaged", flipped),
    "no tensors": ("is not a checkpoint", lambda content: content.update(state_dict=[1])),
    "half a tensor": ("is not a checkpoint", lambda content: content["state_dict"].update({"model.weights": None})),
    "no settings": ("is not a checkpoint", lambda content: content.update(hyper_parameters=0.5)),
    "another version": ("cannot be loaded, as .* do not fit the model", lambda content: content.pop("pradot")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(trained, kind):
    reason, damage = DAMAGE[kind]
    path = trained()
    if damage is flipped:
        flipped(path)
    else:
        content = torch.load(path, weights_only=True)
        damage(content)
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"{path.name} {reason}"):
        Pradot.load_from_checkpoint(path)


def test_a_checkpoint_with_two_thresholds_is_refused(trained):
    path = trained()
    content = torch.load(path, weights_only=True)
    content["state_dict"]["post_processor._image_threshold"] = torch.zeros(2)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"post_processor\._image_threshold is of shape \(2,\), not \(\)"):
        Pradot.load_from_checkpoint(path)


def test_a_checkpoint_that_lacks_weights_of_the_training_is_refused_by_name(trained):
    path = trained("WtFlow")
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["state_dict"] if name.startswith("trained."))
    del content["state_dict"][name]
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"it lacks {re.escape(name)}"):
        WtFlow.load_from_checkpoint(path)


def test_a_checkpoint_whose_offsets_lead_out_of_it_is_refused_by_name(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "model.ckpt")
    monkeypatch.setattr(ZipFile, "testzip", Mock(side_effect=OSError(22, "Invalid argument")))
    with pytest.raises(ValueError, match=r"model\.ckpt is damaged"):
        Pradot.load_from_checkpoint(tmp_path / "model.ckpt")


def test_an_archive_behind_something_else_is_refused_by_name(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    with ZipFile(tmp_path / "model.ckpt", "a") as archive:
        archive.writestr("notes.txt", "weights")
    with pytest.raises(ValueError, match=r"model\.ckpt is damaged"):
        Pradot.load_from_checkpoint(tmp_path / "model.ckpt")


def test_a_part_of_an_archive_on_several_disks_is_refused_by_name(tmp_path):
    path = tmp_path / "model.ckpt"
    with ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "weights")
    content = path.read_bytes()
    # Of the locator: signature, first disk, offset, number of disks.
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 2)
    path.write_bytes(content[:-22] + locator + content[-22:])
    with pytest.raises(ValueError, match=r"model\.ckpt is damaged"):
        Pradot.load_from_checkpoint(path)


def test_the_trainer_names_a_checkpoint_with_damaged_tensors(trained, data, tmp_path):
    path = trained()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        engine.test(MODELS["Pradot"](), datamodule=data(), ckpt_path=path)


def test_a_backbone_that_is_gone_is_not_the_checkpoint_s_fault(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        Pradot.load_from_checkpoint(trained(), backbone=f"local-dir:{tmp_path / 'nowhere'}")


def test_code_runs_with_the_users_word_alone(trained, tmp_path):
    path = broken(trained(), "payload", tmp_path)
    assert isinstance(Pradot.load_from_checkpoint(path, weights_only=False), Pradot)
    assert (tmp_path / "run").exists()
