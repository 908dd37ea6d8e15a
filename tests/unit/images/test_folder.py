"""A folder as a stream: the order of its images, and files that are still being written."""

import os
from pathlib import Path

import pytest

from anomalib_ot.images import folder as module
from anomalib_ot.images.folder import images_in, stream_of


@pytest.fixture
def folder(tmp_path):
    for name in ("b/002.png", "a/003.JPG", "001.tiff", ".001.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def names(folder, paths):
    return [path.relative_to(folder).as_posix() for path in paths]


def test_images_come_once_in_the_order_of_their_paths(folder):
    assert [names(folder, paths) for paths in stream_of(folder)] == [["001.tiff", "a/003.JPG", "b/002.png"]]
    assert names(folder, images_in(folder)) == ["001.tiff", "a/003.JPG", "b/002.png"]


def test_a_folder_that_vanishes_meanwhile_is_left_out(folder, monkeypatch):
    listed = os.scandir

    def scandir(path):
        if Path(path) == folder / "b":
            raise FileNotFoundError(path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names(folder, images_in(folder)) == ["001.tiff", "a/003.JPG"]


def test_a_watched_image_comes_once_it_no_longer_changes(folder, monkeypatch):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            (folder / "004.png").write_bytes(b"half")
        if len(looks) == 3:
            (folder / "004.png").write_bytes(b"all of it")
        if len(looks) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", sleep)
    found = []
    with pytest.raises(KeyboardInterrupt):
        found.extend((len(looks), names(folder, paths)) for paths in stream_of(folder, watch=0.5))
    assert found == [(1, ["001.tiff", "a/003.JPG", "b/002.png"]), (4, ["004.png"])]
    assert set(looks) == {0.5}


def test_a_skipped_image_comes_again_when_its_file_has_changed(folder, monkeypatch):
    """A scored image that is overwritten does not."""
    looks, skipped, found = [], {folder / "001.tiff"}, []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 4:
            for name in ("001.tiff", "a/003.JPG"):
                (folder / name).write_bytes(b"all of it")
        if len(looks) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        found.extend((len(looks), names(folder, paths)) for paths in stream_of(folder, 0.5, skipped))
    assert found == [(1, ["001.tiff", "a/003.JPG", "b/002.png"]), (5, ["001.tiff"])]
