import errno
import json
from pathlib import Path

import pytest

from anomalib_ot.files import MARKER, claim, replacing, require_ours, write_text


def fill(folder, *names):
    with replacing(folder) as partial:
        for name in names:
            (partial / name).touch()


def names(folder):
    """All that a folder holds, but the markers."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != MARKER)


def test_a_folder_takes_the_place_of_the_earlier_one(tmp_path):
    fill(tmp_path / "a" / "b", "old")
    fill(tmp_path / "a" / "b", "new")
    assert names(tmp_path) == ["a", "a/b", "a/b/new"]


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "b").mkdir()
    fill(tmp_path / "b", "new")
    assert names(tmp_path) == ["b", "b/new"]


@pytest.mark.parametrize("foreign", ["weights/model.ckpt", "notes.txt", "old/inside"])
def test_what_others_wrote_stays(tmp_path, foreign):
    fill(tmp_path / "b", "old")
    (tmp_path / "b" / "old").unlink()
    path = tmp_path / "b" / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("work of days")
    with pytest.raises(FileExistsError, match=rf"b holds {Path(foreign).parts[0]}, which anomalib-ot did not write"):
        fill(tmp_path / "b", "new")
    assert path.read_text() == "work of days"


def test_a_folder_by_the_name_of_the_marker_stays(tmp_path):
    inside = tmp_path / "b" / MARKER / "inside.txt"
    inside.parent.mkdir(parents=True)
    inside.write_text("work of days")
    with pytest.raises(FileExistsError, match=rf"b holds {MARKER}, which anomalib-ot did not write"):
        fill(tmp_path / "b", "new")
    with pytest.raises(FileExistsError, match=rf"b holds {MARKER}, which anomalib-ot did not write"):
        claim(tmp_path / "b", "page")
    assert inside.read_text() == "work of days"


def test_what_others_write_meanwhile_stays_too(tmp_path):
    fill(tmp_path / "b", "old")

    def write():
        with replacing(tmp_path / "b") as folder:
            (folder / "new").touch()
            (tmp_path / "b" / "notes.txt").write_text("work of days")

    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write()
    assert names(tmp_path) == ["b", "b/notes.txt", "b/old"]


@pytest.mark.parametrize("marker", ["", "[", "3", '["old"]x', '[["old"]]', '{"files": "old"}'])
def test_a_marker_that_says_nothing_protects_all(tmp_path, marker):
    fill(tmp_path / "b", "old")
    (tmp_path / "b" / MARKER).write_text(marker)
    with pytest.raises(FileExistsError, match="b holds old"):
        fill(tmp_path / "b", "new")


def test_a_marker_leads_to_no_other_folder(tmp_path):
    fill(tmp_path / "b", "old")
    (tmp_path / "other").touch()
    (tmp_path / "b" / MARKER).write_text(json.dumps(["old", "../other", str(tmp_path / "other")]))
    fill(tmp_path / "b", "new")
    assert names(tmp_path) == ["b", "b/new", "other"]


def test_a_file_in_the_place_of_a_folder_stays(tmp_path):
    (tmp_path / "b").write_text("work of days")
    with pytest.raises(FileExistsError, match="b is not a folder"):
        fill(tmp_path / "b", "new")
    assert (tmp_path / "b").read_text() == "work of days"


def test_a_link_leads_to_the_folder_that_is_replaced(tmp_path):
    fill(tmp_path / "far", "old")
    (tmp_path / "b").symlink_to(tmp_path / "far")
    fill(tmp_path / "b", "new")
    assert (tmp_path / "b").is_symlink()
    assert names(tmp_path / "far") == ["new"]


def test_after_an_error_the_earlier_folder_stays_alone(tmp_path):
    fill(tmp_path / "b", "old")

    def write():
        with replacing(tmp_path / "b") as folder:
            (folder / "new").touch()
            msg = "half way"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="half way"):
        write()
    assert names(tmp_path) == ["b", "b/old"]


def test_the_earlier_folder_is_whole_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    fill(tmp_path / "b", "one", "two")
    rename, seen = Path.rename, []

    def watched(path, target):
        seen.append(names(tmp_path / "b"))
        if "new" in names(path):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    with pytest.raises(OSError, match="Input/output error"):
        fill(tmp_path / "b", "new")
    # Whole before it is moved away, absent meanwhile, and whole again.
    assert seen == [["one", "two"], [], []]
    assert names(tmp_path) == ["b", "b/one", "b/two"]


def test_only_files_that_were_claimed_are_replaced(tmp_path):
    (tmp_path / "page.html").write_text("of others")
    with pytest.raises(FileExistsError, match=r"holds page\.html"):
        claim(tmp_path, "index.html", "page.html")
    claim(tmp_path, "index.html")
    (tmp_path / "index.html").write_text("ours")
    claim(tmp_path, "index.html")
    claim(tmp_path, "more.html")
    require_ours(tmp_path, "index.html", "more.html")
    with pytest.raises(FileExistsError, match=r"holds page\.html"):
        require_ours(tmp_path)
    assert names(tmp_path) == ["index.html", "page.html"]


def test_a_text_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = write_text(tmp_path / "page.html", "one")

    def full(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_name_that_is_no_text_can_be_written(tmp_path):
    assert write_text(tmp_path / "a.txt", "caf\udce9.png").read_text(encoding="utf-8") == r"caf\udce9.png"
