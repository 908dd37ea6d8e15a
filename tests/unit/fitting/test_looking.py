"""The look at the images of a folder, and a repeated one."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.files import delete_ours
from anomalib_ot.fitting import looking
from anomalib_ot.fitting.looking import FEATURES, Look, look_at
from anomalib_ot.inspection import Finding, Inspection
from anomalib_ot.selection import Candidate

CANDIDATE = Candidate("WtFlow at 64 px", "anomalib_ot.WtFlow", {}, (64, 64))


@pytest.fixture
def images(tmp_path):
    """Twenty images of noise, one of them strange, a copy and an image of another size."""
    folder = tmp_path / "parts"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(random.integers(90, 160, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(folder / "strange.png")
    Image.open(folder / "03.png").save(folder / "copy.png")
    Image.open(folder / "04.png").resize((80, 80)).rotate(90).save(folder / "large.png")
    return folder


@pytest.fixture
def look(images, backbone, tmp_path, monkeypatch):
    # For few images no graph of the backbone is made, which takes longer than the look.
    monkeypatch.setattr(looking, "SYNTHETIC", 0)
    return lambda keep=(): look_at(images, [CANDIDATE.on(backbone)], keep, tmp_path / "work", 0)


def test_a_repeated_look_finds_the_same_without_looking(look, tmp_path, monkeypatch, caplog):
    first, _ = look()
    assert [path.name for path in first.dropped] == ["strange.png"]
    assert first.left_out == 2
    delete_ours(tmp_path / "work" / FEATURES)
    for name in ("inspect_images", "find_suspects", "find_groups", "ImageExtractor"):
        monkeypatch.setattr(looking, name, None)
    with caplog.at_level(logging.INFO):
        second, none = look()
    assert none is None
    assert "The look at the images is skipped" in caplog.text
    assert (second.inspection, second.groups, second.dropped) == (first.inspection, first.groups, first.dropped)
    for one, other in zip(first.suspects, second.suspects, strict=True):
        assert (one.path, one.score, one.ratio) == (other.path, other.score, other.ratio)
        assert np.array_equal(one.anomaly_map, other.anomaly_map)
    kept, _ = look(["strange.png"])
    assert kept.dropped == []
    assert len(kept.used) == len(first.used) + 1


def test_a_changed_folder_is_looked_at_again(look, images, caplog):
    look()
    state = (images / "05.png").stat()
    os.utime(images / "05.png", ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    with caplog.at_level(logging.INFO):
        look()
    assert "The look at the images is repeated: images, settings or versions have changed" in caplog.text


def test_images_that_may_be_read_now_are_looked_at_again(look, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, _: path.name != "05.png")
        look()
    with caplog.at_level(logging.INFO):
        look()
    assert "The look at the images is repeated" in caplog.text


def test_an_interrupted_look_continues(look, monkeypatch, caplog):
    read = []

    def read_until(path, **options):
        read.append(path)
        if len(read) == 20:
            raise KeyboardInterrupt
        return read_values(path, **options)

    read_values = looking.read_reduced
    monkeypatch.setattr(looking, "read_reduced", read_until)
    with pytest.raises(KeyboardInterrupt):
        look()
    with caplog.at_level(logging.INFO):
        found, _ = look()
    assert "features of 16 of 22 images were extracted before" in caplog.text
    assert len(read) == 20 + 22 - 16
    assert [path.name for path in found.dropped] == ["strange.png"]


def test_what_is_dropped_is_not_used(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    findings = [Finding(tmp_path / "x.png", "blank", "It is white."), Finding(paths[0], "size", "Big.")]
    look = Look(Inspection(paths, findings), [], [paths[2]], [paths])
    assert look.used == [paths[0], paths[1], paths[3]]
    assert look.left_out == 2
