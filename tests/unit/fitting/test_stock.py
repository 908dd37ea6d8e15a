"""The configuration of a training, and its training by the stock command."""

import re
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from rich.console import Console

from anomalib_ot.data import FullRange
from anomalib_ot.fitting import stock
from anomalib_ot.host.class_paths import create
from anomalib_ot.images.reading import Reading
from anomalib_ot.selection import Candidate

BACKBONE = "test_resnet"
WT_FLOW = Candidate(
    "WtFlow at 96 px", "anomalib_ot.WtFlow", {"pre_trained": False, "layers": ["layer2"]}, (96, 96), BACKBONE
)
PADIM = Candidate(
    "PaDiM at 96 px", "anomalib.models.Padim", {"pre_trained": False, "n_features": 8}, (96, 96), BACKBONE
)


@pytest.mark.parametrize(
    ("candidate", "held_out", "seed"), [(WT_FLOW, 0, 3), (PADIM, None, None)], ids=["WtFlow", "PaDiM"]
)
def test_the_configuration_makes_the_model_and_its_data(candidate, held_out, seed):
    images = Path("/data/parts")
    config = stock.configuration(candidate, images, [images / "b/2.png", images / "1.png"], 0.05, 3)
    config = yaml.safe_load(yaml.safe_dump(config))
    model = create(AnomalibModule, config["model"])
    assert model.input_size == (96, 96)
    assert model.post_processor.false_alarm_rate == 0.05
    data = create(AnomalibDataModule, config["data"])
    assert (data.held_out, data.seed, data.name) == (held_out, 3, "parts")
    assert data.left_out == ("1.png", "b/2.png")
    assert config["model"]["init_args"].get("seed") == seed
    assert stock.images_of(config) == "/data/parts"


def test_images_of_many_bits_are_read_at_their_full_range():
    reading = Reading(is_full_range=True, value_range=(0.0, 4095.0))
    config = stock.configuration(WT_FLOW, Path("/data/parts"), [], 0.05, 3, reading)
    config = yaml.safe_load(yaml.safe_dump(config))
    data = create(AnomalibDataModule, config["data"])
    assert isinstance(data, FullRange)
    assert (data.value_range, data.datamodule.seed, data.name) == ((0, 4095), 3, "parts")
    assert stock.images_of(config) == "/data/parts"


@pytest.fixture
def host(monkeypatch):
    """Stands for the stock command: ``writes`` a checkpoint, and ``ends`` with a status."""
    calls = []

    def run(command, stdout, **_):
        arguments = command[3:]
        calls.append(arguments)
        folder = Path(arguments[arguments.index("--default_root_dir") + 1]) / f"v{len(calls)}" / "weights/lightning"
        folder.mkdir(parents=True)
        if host.writes:
            (folder / "model.ckpt").write_text(str(len(calls)))
        stdout.write("one\ntwo\n")
        return SimpleNamespace(returncode=host.ends)

    monkeypatch.setattr(stock.subprocess, "run", run)
    host = SimpleNamespace(calls=calls, ends=0, writes=True)
    return host


def test_a_finished_training_is_not_repeated_and_an_interrupted_one_is(host, tmp_path):
    config, images = {"model": {"class_path": "A"}}, [tmp_path / "1.png"]
    images[0].write_text("image")
    host.ends, host.writes = 1, False
    with pytest.raises(RuntimeError, match=r"status 1; its log is .*train.log, which ends with: one\ntwo"):
        stock.train(config, "A", images, tmp_path)
    host.ends, host.writes = 0, True
    path, checkpoint = stock.train(config, "A", images, tmp_path)
    assert checkpoint.read_text() == "2"
    assert yaml.safe_load(path.read_text()) == config
    assert stock.train(config, "A", images, tmp_path) == (path, checkpoint)
    assert len(host.calls) == 2
    other, _ = stock.train({"model": {"class_path": "B"}}, "B", images, tmp_path)
    assert other.parent != path.parent
    # Deleted by the user.
    checkpoint.unlink()
    assert stock.train(config, "A", images, tmp_path)[1].is_file()
    assert len(host.calls) == 4
    # Another image of the same name.
    images[0].write_text("other")
    stock.train(config, "A", images, tmp_path)
    assert len(host.calls) == 5


def test_a_training_without_a_checkpoint_names_its_log(host, tmp_path):
    host.writes = False
    with pytest.raises(RuntimeError, match=r"no checkpoint in .* its log is"):
        stock.train({"model": {}}, "A", [], tmp_path)


def test_the_time_of_a_step_is_shown_on_a_terminal_alone(monkeypatch, capsys):
    shown = StringIO()
    monkeypatch.setattr(stock, "Console", lambda **_: Console(file=shown, force_terminal=True))
    with stock._elapsed_time("Training Duo"):
        time.sleep(0.3)
    assert "Training Duo 0:00:00" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    monkeypatch.undo()
    with stock._elapsed_time("Training Duo"):
        pass
    assert capsys.readouterr() == ("", "")
