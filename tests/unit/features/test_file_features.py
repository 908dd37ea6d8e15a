"""Features of files that are extracted once, in a folder that survives an interruption."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from anomalib_ot.features import file_features
from anomalib_ot.features.file_features import FileFeatures
from anomalib_ot.features.image_extractor import ImageExtractor
from anomalib_ot.files import delete_ours

PATHS = [Path(f"{index}.png") for index in range(37)]


class Extractor(ImageExtractor):
    """The mean of an image, in two layers."""

    def __init__(self, layers=("a", "b")):
        self.backbone, self.image_size, self.layers = "resnet18", (8, 8), [*layers]

    def of_batch(self, images):
        means = torch.tensor([float(image.mean()) for image in images])
        return {layer: (means + place)[:, None, None, None].expand(-1, 2, 3, 3) for place, layer in enumerate("ab")}


@pytest.fixture
def files():
    """Makes files that are read once each, up to one that ends the reading."""

    def make(last=None):
        def read(path):
            made.asked.append(path)
            if path == last:
                raise KeyboardInterrupt
            return np.full((8, 8, 3), int(path.stem), np.float32)

        made = FileFeatures(Extractor(), read)
        made.asked = []
        return made

    return make


def values(dataset):
    assert dataset.features["a"].shape[1:] == (2, 3, 3)
    assert torch.equal(dataset.features["b"], dataset.features["a"] + 1)
    return dataset.features["a"][:, 0, 0, 0].tolist()


def test_what_is_remembered_is_not_read_again(files, tmp_path):
    made = files()
    assert values(made.remember(PATHS, tmp_path / "kept", 0)) == [*range(37)]
    assert values(made.of(PATHS[5:2:-1])) == [5, 4, 3]
    assert made.asked == PATHS
    assert values(made.of([PATHS[0], Path("99.png")])) == [0, 99]


def test_an_interrupted_extraction_continues_with_the_next_batch(files, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        files(PATHS[34]).remember(PATHS, tmp_path / "kept", 0)
    made = files()
    with caplog.at_level(logging.INFO):
        assert values(made.remember(PATHS, tmp_path / "kept", 0)) == [*range(37)]
    assert made.asked == PATHS[32:]
    assert "32 of 37 images were extracted before" in caplog.text
    again = files()
    assert values(again.remember(PATHS, tmp_path / "kept", 0)) == [*range(37)]
    assert again.asked == []


def empty_index(folder):
    (folder / "index.json").write_text("{")


def lose_a_layer(folder):
    (folder / "1.features").unlink()


def cut_a_layer(folder):
    (folder / "1.features").write_bytes(b"")


@pytest.mark.parametrize("damage", [empty_index, lose_a_layer, cut_a_layer])
def test_damaged_features_are_extracted_again(files, tmp_path, damage):
    files().remember(PATHS, tmp_path / "kept", 0)
    damage(tmp_path / "kept")
    made = files()
    assert values(made.remember(PATHS, tmp_path / "kept", 0)) == [*range(37)]
    assert made.asked == PATHS


def test_features_of_other_files_are_replaced(files, tmp_path):
    files().remember(PATHS, tmp_path / "kept", 0)
    assert values(files().remember(PATHS[3:9], tmp_path / "kept", 0)) == [*range(3, 9)]
    made = files()
    made.remember(PATHS[3:9], tmp_path / "kept", "changed")
    assert made.asked == PATHS[3:9]


def test_a_full_disk_costs_no_features(files, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError

    monkeypatch.setattr(file_features, "map_file", full)
    assert values(files().remember(PATHS, tmp_path / "kept", 0)) == [*range(37)]
    assert "There is no space for features" in caplog.text
    assert not (tmp_path / "kept").exists()


def test_files_of_others_stay(files, tmp_path):
    files().remember(PATHS, tmp_path / "kept", 0)
    (tmp_path / "kept/mine.txt").write_text("mine")
    delete_ours(tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine.txt"]


def test_files_of_others_are_neither_deleted_nor_replaced(files, tmp_path):
    (tmp_path / "kept").mkdir()
    for name in ("index.json", "mine.features"):
        (tmp_path / "kept" / name).write_text("mine")
    with pytest.raises(FileExistsError, match=r"index.json, which anomalib-ot did not write there"):
        files().remember(PATHS, tmp_path / "kept", 0)
    assert {path.read_text() for path in (tmp_path / "kept").iterdir()} == {"mine"}


def test_they_suit_a_backbone_a_size_and_some_of_their_layers(files):
    made = files()
    assert made.suits("resnet18", (8, 8), ["a"])
    assert not made.suits("resnet18", (8, 8), ["a", "c"])
    assert not made.suits("resnet18", (8, 9), ["a"])
    assert not made.suits("resnet34", (8, 8), ["a"])


def test_features_go_to_another_process_without_their_folder(files, tmp_path):
    dataset = files().remember(PATHS, tmp_path / "kept", 0)
    assert values(pickle.loads(pickle.dumps(dataset))) == [*range(37)]
