import os
import re

import pytest
import torch
from anomalib.data import Folder
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from anomalib_ot import FewShot
from anomalib_ot.data import FullRange, GoodPictures
from anomalib_ot.host.held_out import take_split
from anomalib_ot.host.splits import count_held_out, joined, split_of, trained_but_held_out, use_split


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for name, count in (("good", 20), ("bad", 4)):
        (folder / name).mkdir()
        for index in range(count):
            Image.new("RGB", (8, 8)).save(folder / name / f"{index}.png")
    return folder


def folder(root, seed=None, **arguments):
    return Folder("parts", "good", root, "bad", num_workers=0, seed=seed, **arguments)


def ready(data):
    data.setup(TrainerFn.FITTING)
    return data


def paths(data):
    return [set(getattr(data, part).samples.image_path) for part in ("train_data", "val_data", "test_data")]


KINDS = {
    "Folder": folder,
    "FewShot": lambda root, seed: FewShot(folder(root, seed), 4),
    "FullRange": lambda root, seed: FullRange(folder(root, seed)),
    "both": lambda root, seed: FewShot(FullRange(folder(root, seed)), 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_split_of_the_training_is_restored(root, kind):
    trained, later = (ready(KINDS[kind](root, seed)) for seed in (1, 2))
    split = split_of(trained)
    assert paths(later) != paths(trained)
    before = trained_but_held_out(later, split)
    assert use_split(later, split) == before
    assert paths(later) == paths(trained)
    assert trained_but_held_out(later, split) == 0
    assert count_held_out(later) == len(set.union(*paths(trained)[1:]))
    assert later.test_data.task == trained.test_data.task


def test_an_equal_split_is_not_changed(root):
    data = ready(folder(root, 1))
    assert use_split(ready(folder(root, 1)), split_of(data)) == 0
    later = ready(folder(root, 1))
    samples = later.test_data.samples
    use_split(later, split_of(data))
    assert later.test_data.samples is samples


def test_images_of_other_settings_are_counted_but_not_moved(root):
    split = split_of(ready(folder(root, 1)))
    later = ready(folder(root, 1, normal_test_dir="good"))
    assert use_split(later, split) == 0
    assert trained_but_held_out(later, split) == len(split["trained"])


def test_the_folder_may_move_and_grow(root, tmp_path):
    trained = ready(folder(root, 1))
    moved = tmp_path / "elsewhere"
    for name in ("good", "bad"):
        (moved / name).mkdir(parents=True)
        for picture in (root / name).iterdir():
            (moved / name / picture.name).write_bytes(picture.read_bytes())
    Image.new("RGB", (8, 8)).save(moved / "good" / "new.png")
    later = ready(folder(moved, 2))
    split = split_of(trained)
    use_split(later, split)
    assert trained_but_held_out(later, split) == 0
    assert len(set.union(*paths(later))) == 25
    assert {path.replace(str(moved), str(root)) for path in set.union(*paths(later)[1:])} >= paths(trained)[2]


def test_a_continued_training_records_the_images_of_both(root):
    first, second = (split_of(ready(folder(root, seed))) for seed in (1, 2))
    assert set(joined(first, second)["trained"].tolist()) == {
        *first["trained"].tolist(),
        *second["trained"].tolist(),
    }
    assert joined(first, None) is first
    assert torch.equal(joined(None, second)["trained"], second["trained"])


def copied(source, target, size=(8, 8)):
    """Copies of the images in another folder, of a size."""
    for name in ("good", "bad"):
        (target / name).mkdir(parents=True)
        for picture in (source / name).iterdir():
            Image.new("RGB", size).save(target / name / picture.name)
    return target


def test_other_images_of_the_same_names_were_not_trained_on(root, tmp_path):
    split = split_of(ready(folder(root, 1)))
    others = ready(folder(copied(root, tmp_path / "others", (90, 90)), 2))
    assert trained_but_held_out(others, split) == 0


@pytest.mark.parametrize("way", ["link", "dots"])
def test_a_root_may_be_spelled_in_another_way(root, tmp_path, way):
    named = tmp_path / "link"
    if way == "link":
        named.symlink_to(root)
    else:
        named = root / ".." / root.name
    moved = ready(folder(copied(root, tmp_path / "moved"), 1))
    ours, theirs = split_of(ready(folder(named, 1))), split_of(moved)
    assert torch.equal(ours["trained"].sort().values, theirs["trained"].sort().values)


def test_a_file_whose_name_is_not_utf_8_is_in_the_split(root, tmp_path):
    target = copied(root, tmp_path / "parts")
    (target / "good" / "0.png").rename(target / "good" / os.fsdecode(b"caf\xe9.png"))
    assert len(split_of(ready(folder(target, 1)))["trained"]) > 0


def test_images_of_a_good_folder_that_were_all_trained_on_are_counted(root, caplog):
    trained, later = (ready(GoodPictures(root, "good", held_out=count)) for count in (0, 2))
    assert not take_split(later, split_of(trained))
    assert "trained on 2 of the 2 held-out images of good_pictures" in caplog.text
    assert "-" not in re.findall(r"\S+ of the 2", caplog.text)[0]
    assert "Hold images out when training" in caplog.text
