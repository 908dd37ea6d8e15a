"""A look at a folder: what is left out, what is reported, and folders that cannot be used."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.inspection import look as module
from anomalib_ot.inspection.look import inspect_images

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def part(seed, size=(80, 60)):
    """An image of coarse noise, so that its thumbnail differs from that of any other."""
    coarse = np.random.default_rng(seed).integers(20, 230, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "day 2").mkdir()
    for index in range(12):
        part(index).save(tmp_path / ("day 2" if index % 3 == 0 else "") / f"{index:02}.png")
    return tmp_path


def found(folder):
    inspection = inspect_images(folder)
    return inspection, [(each.kind, each.path.name) for each in inspection.findings]


def test_a_clean_folder_has_no_findings(folder):
    inspection, findings = found(folder)
    assert findings == []
    assert inspection.images == sorted(folder.rglob("*.png"))
    assert inspection.sizes == {(80, 60): 12}
    assert inspection.folders == {folder: 8, folder / "day 2": 4}


def test_what_cannot_be_used_is_left_out_and_named(folder):
    (folder / "damaged.png").write_bytes((folder / "01.png").read_bytes()[:300])
    (folder / "notes.jpg").write_text("no image")
    Image.new("RGB", (80, 60), (90, 90, 90)).save(folder / "grey.png")
    Image.fromarray(np.asarray(part(1))).save(folder / "z same.bmp")
    part(2).save(folder / "z again.jpg", quality=75)
    part(2).resize((160, 120)).save(folder / "z larger.png")
    inspection, findings = found(folder)
    assert findings[:6] == [
        ("unreadable", "damaged.png"),
        ("unreadable", "notes.jpg"),
        ("blank", "grey.png"),
        ("duplicate", "z again.jpg"),
        ("duplicate", "z larger.png"),
        ("duplicate", "z same.bmp"),
    ]
    assert len(inspection.images) == 12
    assert inspection.left_out == inspection.findings
    details = {each.path.name: each.detail for each in inspection.findings}
    assert details["grey.png"] == "The image is of one colour; check the camera and the light."
    assert details["z same.bmp"] == f"It has the same pixels as {folder / '01.png'}."
    assert details["z again.jpg"] == f"It shows the same as {folder / '02.png'}."


def test_what_is_only_reported_is_used(folder):
    for index in range(12, 20):
        part(index).save(folder / f"{index}.png")
    bright = np.asarray(part(20)).copy()
    bright[:20] = 255
    Image.fromarray(bright).save(folder / "20.png")
    part(21, (90, 60)).save(folder / "21.png")
    part(22).convert("L").save(folder / "22.png")
    inspection, findings = found(folder)
    assert findings == [("saturated", "20.png"), ("size", "21.png"), ("mode", "22.png")]
    assert inspection.left_out == []
    assert len(inspection.images) == 23
    assert [each.detail for each in inspection.findings] == [
        "33% of its pixels are white; half of the images have at most 0%.",
        "It has 90 by 60 pixels; most images have 80 by 60.",
        "Its pixels have the mode L; those of most images have RGB.",
    ]


def test_images_of_many_sizes_are_not_named_one_by_one(tmp_path):
    for index in range(12):
        part(index, (80 + index, 60)).save(tmp_path / f"{index}.png")
    inspection, findings = found(tmp_path)
    assert findings == []
    assert len(inspection.sizes) == 12


@pytest.mark.parametrize("contrast", [1, 20])
def test_aligned_parts_that_look_alike_are_no_duplicates(tmp_path, contrast):
    """Their thumbnails may be as close as those of copies are elsewhere."""
    scene = np.asarray(part(0)).astype(float)
    for index in range(20):
        noise = np.random.default_rng(index).normal(0, contrast, scene.shape)
        Image.fromarray((scene + noise).round().clip(0, 255).astype(np.uint8)).save(tmp_path / f"{index}.png")
    assert found(tmp_path)[1] == []


def test_more_images_than_are_compared_at_a_time(folder, monkeypatch):
    for index in range(3):
        part(index).save(folder / f"z{index}.jpg", quality=80)
    expected = found(folder)
    monkeypatch.setattr(module, "_BLOCK", 4)
    monkeypatch.setattr(module, "_BATCH", 2)
    assert found(folder) == expected
    assert expected[1] == [("duplicate", "z0.jpg"), ("duplicate", "z1.jpg"), ("duplicate", "z2.jpg")]


def test_a_file_that_vanishes_is_a_finding(folder, monkeypatch):
    listed = module.images_in

    def images_in(folder):
        paths = listed(folder)
        (folder / "05.png").unlink()
        return paths

    monkeypatch.setattr(module, "images_in", images_in)
    inspection, findings = found(folder)
    assert findings == [("unreadable", "05.png")]
    assert "vanished" in inspection.findings[0].detail
    assert len(inspection.images) == 11


def test_a_folder_without_enough_images_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        inspect_images(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"there are no images in .*; give one with 10 good images or more"):
        inspect_images(tmp_path)
    for index in range(3):
        part(index).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match="3 usable images of 3, expected at least 10: add good images; Foct can"):
        inspect_images(tmp_path)


def test_a_folder_of_equal_images_is_refused(tmp_path):
    for index in range(20):
        part(0).save(tmp_path / f"{index:02}.png")
    with pytest.raises(ValueError, match=r"1 usable images of 20.*left out \(19 duplicate\), such as .*01.png: It has"):
        inspect_images(tmp_path)


def test_images_of_twelve_bits_are_counted_and_without_their_range_too_dark(folder, tmp_path):
    deep = tmp_path / "deep"
    deep.mkdir()
    for index, path in enumerate(sorted(folder.rglob("*.png"))):
        values = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(values if index == 0 else values.astype(np.uint16) * 16).save(deep / f"{index:02}.png")
    inspection = inspect_images(deep, (0, 4080))
    assert [(each.kind, each.path.name) for each in inspection.findings] == [("mode", "00.png")]
    assert (len(inspection.images), inspection.deep) == (12, 11)
    with pytest.raises(ValueError, match=r"11 blank.*and set value_range to the black and white of the camera"):
        inspect_images(deep)


def test_a_look_does_not_need_torch():
    command = "import sys; from anomalib_ot.inspection import inspect_images; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real images in ../shared/data")
@pytest.mark.parametrize("category", ["bottle", "solar_poly", "tray/breakfast_box"])
def test_no_training_image_is_left_out(category):
    folder = DATA / category / "train"
    inspection = inspect_images(folder)
    assert inspection.findings == []
    assert len(inspection.images) == len([*folder.rglob("*.*")])
