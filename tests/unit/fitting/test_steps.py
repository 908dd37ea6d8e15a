"""The record of finished steps."""

import logging

import pytest

from anomalib_ot.fitting import steps
from anomalib_ot.fitting.steps import STEPS, Steps


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
