"""Pictures as they come: of all kinds, cut off, mutated. A plain error, or the right result."""

import logging
import random
import re
import shutil
import warnings
from io import BytesIO
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import tifffile
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from PIL import Image, UnidentifiedImageError

from anomalib_ot import Assembly, Duo, FewShot, Foct, Pradot, WtFlow
from anomalib_ot.data import FullRange, FullRangePredictDataset, read_picture
from anomalib_ot.host.image_features import _check_readable

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
# What Pillow says of a file that is damaged, or too large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@pytest.fixture(scope="module")
def picture():
    """Few colours, so that a palette holds them all."""
    colours = np.random.default_rng(0).integers(0, 256, (16, 3), dtype=np.uint8)
    return Image.fromarray(colours[np.arange(48 * 64).reshape(48, 64) % 16])


@pytest.fixture(scope="module", params=MODELS)
def predict(request, tmp_path_factory):
    """Scores that a fitted model gives to a file or to all files of a folder, by name."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pictures")
    data = Assembly(root / "data", train_batch_size=4, n_train=8, n_validation=1, n_test=4)
    model = MODELS[request.param]()
    engine = Engine(default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=FewShot(data, 2) if request.param == "Foct" else data)

    def scores(path):
        batches = engine.predict(model, dataset=PredictDataset(path))
        return {
            Path(name).name: float(score)
            for batch in batches
            for name, score in zip(batch.image_path, batch.pred_score, strict=True)
        }

    return scores


def alike(picture, folder):
    """The same picture in files of many kinds."""
    red_green_blue = np.asarray(picture)
    picture.save(folder / "plain.png")
    picture.quantize(16).save(folder / "palette.png")
    picture.save(folder / "lossless.webp", lossless=True)
    picture.save(folder / "plain.bmp")
    picture.save(folder / "plain.tiff")
    picture.save(folder / "Prüfling Nr. 3 良品.png")
    shutil.copy(folder / "plain.png", folder / "a_png_named.jpg")
    Image.fromarray(np.dstack([red_green_blue, np.full((48, 64), 255, np.uint8)])).save(folder / "alpha.png")
    picture.save(folder / "animated.png", save_all=True, append_images=[Image.new("RGB", picture.size)])
    (folder / "link.png").symlink_to(folder / "plain.png")


def test_the_kind_of_file_does_not_matter(predict, picture, tmp_path):
    alike(picture, tmp_path)
    scores = predict(tmp_path)
    assert len(scores) == 10
    assert scores == pytest.approx(dict.fromkeys(scores, scores["plain.png"]), abs=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 5)])
def test_any_size_has_a_score(predict, picture, size, tmp_path):
    picture.resize(size).save(tmp_path / "odd.png")
    assert 0 <= predict(tmp_path / "odd.png")["odd.png"] <= 1


@pytest.mark.slow
def test_a_huge_picture_scores_as_it_does_made_small(predict, picture, tmp_path):
    picture.resize((8000, 6000), Image.Resampling.NEAREST).save(tmp_path / "huge.png")
    picture.resize((800, 600), Image.Resampling.NEAREST).save(tmp_path / "smaller.png")
    huge, smaller = (predict(tmp_path / name)[name] for name in ("huge.png", "smaller.png"))
    assert huge == pytest.approx(smaller, abs=0.05)


BAD = {
    "empty": b"",
    "text": b"not a picture",
    "signature alone": b"\x89PNG\r\n\x1a\n",
    "another format's signature": b"GIF89a",
    "zeros": bytes(5000),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_is_no_picture_is_an_error_that_names_it(predict, kind, tmp_path):
    (tmp_path / "bad.png").write_bytes(BAD[kind])
    with pytest.raises(UnidentifiedImageError, match=r"bad\.png"):
        predict(tmp_path / "bad.png")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_that_is_cut_off_is_an_error(predict, kind, share, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, kind)
    (tmp_path / "bad.png").write_bytes(file.getvalue()[: int(share * len(file.getvalue()))])
    # The host's reader does not name the file here; training with a cache does, see test_lightning_model.
    with pytest.raises(OSError, match=r"(?i)truncated"):
        predict(tmp_path / "bad.png")


def test_a_folder_with_a_picture_s_name_is_an_error_that_names_it(predict, picture, tmp_path):
    picture.save(tmp_path / "good.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.png"):
        predict(tmp_path)


def test_links_in_a_circle_are_not_followed_for_ever(predict, picture, tmp_path):
    picture.save(tmp_path / "good.png")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert [*predict(tmp_path)] == ["good.png"]


def test_a_damaged_training_picture_is_named_whatever_the_reader_raises(tmp_path, monkeypatch):
    path = tmp_path / "damaged.png"
    Image.new("RGB", (64, 64)).save(path)
    for error in (ValueError("tile cannot extend outside image"), Image.DecompressionBombError("too large")):
        monkeypatch.setattr(Image, "open", Mock(side_effect=error))
        with pytest.raises(ValueError, match=rf"training image .*damaged\.png cannot be read \({error}\)"):
            _check_readable(str(path))


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """Pictures of a camera of twelve bits."""
    root = tmp_path_factory.mktemp("camera")
    for folder, count in {"good": 8, "bad": 2}.items():
        (root / folder).mkdir()
        for number in range(count):
            values = np.random.default_rng(number).integers(300, 4096, (48, 64)).astype(np.uint16)
            Image.fromarray(values).save(root / folder / f"{number}.png")
    return root


@pytest.fixture(scope="module", params=MODELS)
def messages(request, camera, tmp_path_factory):
    """What is said while a model is fitted, tested and asked for predictions, with or without the full range."""

    def collect(caplog, wrap, predicted):
        torch.manual_seed(0)
        folders = {"normal_dir": "good", "abnormal_dir": "bad", "val_split_mode": "same_as_test"}
        data = wrap(Folder("camera", root=camera, **folders, num_workers=0, train_batch_size=4))
        model = MODELS[request.param]()
        root = tmp_path_factory.mktemp(request.param)
        engine = Engine(default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False)
        with caplog.at_level(logging.WARNING, "anomalib_ot"):
            engine.train(model, datamodule=FewShot(data, 2) if request.param == "Foct" else data)
            for _ in range(2):
                engine.predict(model, dataset=predicted(camera / "bad"))
        found = [record.getMessage() for record in caplog.records if "show little or nothing" in record.getMessage()]
        return {message.partition(" batch")[0].rpartition(" ")[2]: message for message in found}, len(found)

    return collect


def test_pictures_of_twelve_bits_are_named_wherever_anomalib_makes_them_white(messages, caplog):
    by_stage, count = messages(caplog, lambda data: data, PredictDataset)
    # Once in each stage of a run, of which prediction had two.
    assert by_stage.keys() == {"training", "validation", "test", "prediction"}
    assert count == 5
    for stage, message in by_stage.items():
        folder = "good" if stage == "training" else "(good|bad)"
        assert re.search(rf"camera\d+/{folder}/\d\.png \(white all over\)", message)
        assert "FullRange, or FullRangePredictDataset, with the value_range of the camera" in message
    assert re.match(r"1 of 1 images of a prediction batch", by_stage["prediction"])


def test_with_the_range_of_the_camera_all_is_well(messages, caplog):
    assert messages(
        caplog,
        lambda data: FullRange(data, (0, 4095)),
        lambda path: FullRangePredictDataset(path, value_range=(0, 4095)),
    ) == ({}, 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("trained", "limits", "now", "how"),
    [
        ("with value_range [0, 4095]", np.array([0, 4095]), None, "as if they had 8 bits"),
        ("with value_range [0, 4095]", (0, 4095), [(0, 65535)], "with value_range [0, 65535]"),
        ("in the range of their data type", None, [(0, 4095)], "with value_range [0, 4095]"),
        ("with value_range [0, 4095]", [0, 4095], [(0, 4095)], None),
    ],
    ids=["8 bits", "16 bits", "data type", "as trained"],
)
def test_a_run_says_if_the_training_read_otherwise(name, trained, limits, now, how, camera, tmp_path, caplog):
    folders = {"normal_dir": "good", "abnormal_dir": "bad", "val_split_mode": "same_as_test", "num_workers": 0}
    inner = Folder("camera", root=camera, **folders)
    data = FullRange(inner, None if limits is None else tuple(limits))
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    model = MODELS[name]()
    with caplog.at_level(logging.WARNING, "anomalib_ot"):
        engine.fit(model, datamodule=FewShot(data, 2) if name == "Foct" else data)

    def said():
        return [each.getMessage() for each in caplog.records if "but the model was trained on" in each.getMessage()]

    assert not said()
    path = engine.trainer.checkpoint_callback.best_model_path
    # Without code, which numbers of NumPy would need.
    loaded = type(model).load_from_checkpoint(path, weights_only=True)
    assert (str(loaded.reading), loaded.reading.is_deep) == (trained, True)
    engine.test(loaded, datamodule=inner if now is None else FullRange(inner, *now))
    engine.predict(
        loaded,
        dataset=PredictDataset(camera / "bad") if now is None else FullRangePredictDataset(camera / "bad", None, *now),
    )
    stages = ["test", "prediction"] if how else []
    assert said() == [
        f"This {stage} reads images with more than 8 bits per channel {how}, but the model was trained on images that "
        f"were read {trained}. Its threshold does not apply to these scores: read them alike."
        for stage in stages
    ]


class TestTheHostsReader:
    """What anomalib's own reader makes of pictures, which no model can change; see test_reading for ours."""

    def read(self, path):
        return read_image(path, as_tensor=True)

    def test_sixteen_bits_of_grey_become_white_above_255(self, tmp_path):
        values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
        for name in ("grey.png", "grey.tiff"):
            Image.fromarray(values).save(tmp_path / name)
            assert self.read(tmp_path / name)[0].tolist() == [[0, 1, 1, 1]]

    def test_sixteen_bits_of_a_colour_lose_their_lower_half(self, tmp_path):
        colours = np.array([[[0, 255, 256], [4095, 32768, 65535]]], dtype=np.uint16)
        cv2.imwrite(str(tmp_path / "colour.png"), colours[..., ::-1])
        tifffile.imwrite(tmp_path / "colour.tiff", colours, photometric="rgb")
        for name in ("colour.png", "colour.tiff"):
            assert (self.read(tmp_path / name) * 255).round().int().permute(1, 2, 0).tolist() == [
                [[0, 0, 1], [15, 128, 255]]
            ]

    def test_floating_point_numbers_are_taken_for_levels_of_eight_bits(self, tmp_path):
        Image.fromarray(np.array([[0, 0.9, 1.5, 300]], dtype=np.float32)).save(tmp_path / "float.tiff")
        assert (self.read(tmp_path / "float.tiff")[0] * 255).round().tolist() == [[0, 0, 1, 255]]

    def test_pictures_are_not_turned_as_a_camera_noted(self, picture, tmp_path):
        notes = Image.Exif()
        notes[0x0112] = 6  # turn by 90 degrees
        picture.save(tmp_path / "turned.png", exif=notes)
        assert self.read(tmp_path / "turned.png").shape == (3, 48, 64)

    def test_transparency_is_dropped_and_what_lies_under_it_shows(self, tmp_path):
        Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
        assert self.read(tmp_path / "clear.png")[:, 0, 0].tolist() == [1, 0, 0]

    def test_of_an_animation_the_first_picture_counts(self, tmp_path):
        Image.new("RGB", (2, 2), "white").save(
            tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (2, 2))]
        )
        assert self.read(tmp_path / "moving.gif").min() == 1

    def test_inks_become_colours(self, tmp_path):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "inks.tiff")
        assert self.read(tmp_path / "inks.tiff")[:, 0, 0].tolist() == [1, 0, 0]

    def test_a_bomb_is_refused(self, picture, tmp_path, monkeypatch):
        picture.save(tmp_path / "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(Image.DecompressionBombError, match="exceeds limit"):
            self.read(tmp_path / "bomb.png")


def mutated(generator, content):
    """Bytes with some of them changed, left out, put in or cut off, most often near the start."""
    content = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        place = int(generator.random() ** 3 * len(content))
        how = generator.choice(("change", "remove", "insert", "cut"))
        if how == "change" and place < len(content):
            content[place] = generator.randrange(256)
        elif how == "remove":
            del content[place : place + generator.randrange(1, 64)]
        elif how == "insert":
            content[place:place] = generator.randbytes(generator.randrange(1, 32))
        else:
            del content[place:]
    return bytes(content)


def encoded(kind):
    """A file of noise, of eight or 16 bits a channel."""
    noise = np.random.default_rng(0).integers(0, 65536, (32, 32, 3), dtype=np.uint16)
    name, _, bits = kind.partition(" ")
    file = BytesIO()
    if not bits:
        Image.fromarray((noise // 256).astype(np.uint8)).save(file, name)
    elif bits == "16 grey":
        Image.fromarray(noise[..., 0]).save(file, name)
    else:
        file.write(cv2.imencode(f".{name.lower()}", noise)[1].tobytes())
    return file.getvalue()


DEEP = ["PNG 16 grey", "TIFF 16 grey", "PNG 16 colour", "TIFF 16 colour"]


# Ours, which takes those of eight bits to the host's.
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", *DEEP])
def test_mutated_pictures_are_read_or_refused(kind, tmp_path):
    generator, refused, content = random.Random(kind), 0, encoded(kind)
    path = tmp_path / f"mutated.{kind.split()[0].lower()}"
    for _ in range(250):
        path.write_bytes(mutated(generator, content))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = read_picture(path)
        except UNREADABLE:
            refused += 1
        else:
            assert image.shape[0] == 3
            assert 0 <= float(image.min()) <= float(image.max()) <= 1
    # The checksums of a long PNG file leave hardly a change unnoticed.
    assert 0 < refused < 250 + kind.startswith("PNG 16")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", DEEP)
def test_a_picture_of_sixteen_bits_that_is_cut_off_is_an_error(kind, share, tmp_path):
    content = encoded(kind)
    (tmp_path / "bad.png").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UNREADABLE):
        read_picture(tmp_path / "bad.png")
