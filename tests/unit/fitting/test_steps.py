"""The record of finished steps, and the time of one."""

import logging
import re
import time
from io import StringIO

import pytest
from rich.console import Console

from anomalib_ot.fitting import steps
from anomalib_ot.fitting.steps import STEPS, Steps, elapsed_time


def test_a_finished_step_is_skipped_and_said_so(tmp_path, caplog):
    assert Steps(tmp_path / "work").found("the export", {"a": 1}) is None
    Steps(tmp_path / "work").finish("the export", {"a": 1}, [1, "two"])
    with caplog.at_level(logging.INFO):
        assert Steps(tmp_path / "work").found("the export", {"a": 1}) == [1, "two"]
    assert "The export is skipped: it is finished, and nothing has changed since." in caplog.text


def test_a_step_is_repeated_if_something_has_changed(tmp_path, monkeypatch, caplog):
    Steps(tmp_path).finish("the export", {"a": 1}, 1)
    with caplog.at_level(logging.INFO):
        assert Steps(tmp_path).found("the export", {"a": 2}) is None
    assert "The export is repeated" in caplog.text
    monkeypatch.setattr(steps, "installed_versions", lambda: {"torch": "0"})
    assert Steps(tmp_path).found("the export", {"a": 1}) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"the export": 1}', '{"the export": {"seen": ""}}'])
def test_a_damaged_file_repeats_the_steps(tmp_path, caplog, text):
    (tmp_path / STEPS).write_text(text)
    assert Steps(tmp_path).found("the export", {}) is None
    assert "cannot be read" in caplog.text


def test_a_step_whose_file_is_missing_is_repeated(tmp_path, caplog):
    file = tmp_path / "model.bin"
    file.touch()
    Steps(tmp_path).finish("the export", {}, 1, [file])
    assert Steps(tmp_path).found("the export", {}) == 1
    file.unlink()
    with caplog.at_level(logging.INFO):
        assert Steps(tmp_path).found("the export", {}) is None
    assert f"The export is repeated: {file} is missing." in caplog.text


def test_the_time_of_a_step_is_shown_on_a_terminal_alone(monkeypatch, capsys):
    shown = StringIO()
    monkeypatch.setattr(steps, "Console", lambda **_: Console(file=shown, force_terminal=True))
    with elapsed_time("Training Duo"):
        time.sleep(0.3)
    assert "Training Duo 0:00:00" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    monkeypatch.undo()
    with elapsed_time("Training Duo"):
        pass
    assert capsys.readouterr() == ("", "")
