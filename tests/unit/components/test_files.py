import pytest

from anomalib_ot.components.files import replacing, write_text


def test_a_folder_takes_the_place_of_the_earlier_one(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "old").touch()
    with replacing(tmp_path / "a" / "b") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "new"]


def test_after_an_error_the_earlier_folder_stays_alone(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").touch()

    def write():
        with replacing(tmp_path / "b") as folder:
            (folder / "new").touch()
            msg = "half way"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="half way"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "old"]


def test_a_text_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    path = write_text(tmp_path / "page.html", "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "two \ud800")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
