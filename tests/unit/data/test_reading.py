"""Pictures of every mode that Pillow and anomalib's reader know, with eight bits a channel or more."""

import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
from anomalib.data.utils import read_image
from PIL import Image

from anomalib_ot.data import read_picture

# Modes that a file can be of, and the kinds of files that hold them.
EIGHT_BITS = {
    "1": ("png", "tiff", "bmp"),
    "L": ("png", "tiff", "bmp", "jpg"),
    "LA": ("png", "tiff"),
    "La": (),
    "P": ("png", "tiff"),
    "PA": ("tiff",),
    "RGB": ("png", "tiff", "bmp", "jpg", "webp", "ppm"),
    "RGBA": ("png", "tiff", "webp"),
    "RGBa": (),
    "RGBX": (),
    "CMYK": ("tiff", "jpg"),
    "YCbCr": ("tiff",),
    "LAB": ("tiff",),
    "HSV": (),
}
DEEP = {"I", "I;16", "I;16B", "I;16L", "I;16N", "F"}
VALUES = np.array([[0, 255, 256], [4095, 32768, 65535]], dtype=np.uint16)
# Blue, green and red, as OpenCV writes them.
COLOURS = np.dstack([VALUES // 4, VALUES // 2, VALUES])


def turned():
    """What a camera writes that was held upright; Pillow empties it as it saves it."""
    notes = Image.Exif()
    notes[0x0112] = 6
    return notes


def test_there_are_no_other_modes():
    assert {*Image.MODES} == {*EIGHT_BITS, *DEEP}


@pytest.mark.parametrize(("mode", "kind"), [(mode, kind) for mode, kinds in EIGHT_BITS.items() for kind in kinds])
def test_of_eight_bits_all_is_as_anomalib_reads_it(mode, kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    path = tmp_path / f"picture.{kind}"
    if mode in {"1", "P"}:
        Image.fromarray(noise[..., 0]).convert(mode).save(path)
    else:
        Image.frombytes(mode, (12, 12), noise.tobytes()).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    assert torch.equal(read_picture(path), read_image(path, as_tensor=True))
    assert torch.equal(read_picture(path, (0, 4095)), read_image(path, as_tensor=True))


def png(colour_type, values):
    """A PNG file of 16 bits, of a kind that no library here writes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


GREY = {
    "grey.png": lambda path: Image.fromarray(VALUES).save(path),
    "grey and transparent.png": lambda path: path.write_bytes(png(4, np.dstack([VALUES, VALUES[::-1]]))),
    "grey.tiff": lambda path: Image.fromarray(VALUES).save(path),
    "packed.tiff": lambda path: Image.fromarray(VALUES).save(path, compression="tiff_lzw"),
    "high byte first.tiff": lambda path: tifffile.imwrite(path, VALUES, byteorder=">"),
    "grey.pgm": lambda path: cv2.imwrite(str(path), VALUES),
}
COLOUR = {
    "colour.png": lambda path: cv2.imwrite(str(path), COLOURS),
    "transparent.png": lambda path: cv2.imwrite(str(path), np.dstack([COLOURS, VALUES])),
    "colour.tiff": lambda path: tifffile.imwrite(path, COLOURS[..., ::-1], photometric="rgb"),
    "transparent.tiff": lambda path: tifffile.imwrite(
        path, np.dstack([COLOURS[..., ::-1], VALUES]), photometric="rgb", extrasamples=["unassalpha"]
    ),
}


@pytest.mark.parametrize("kind", GREY | COLOUR)
def test_sixteen_bits_are_read_by_their_full_range_or_that_of_the_camera(kind, tmp_path):
    path = tmp_path / kind
    (GREY | COLOUR)[kind](path)
    values = np.stack([VALUES] * 3) if kind in GREY else COLOURS[..., ::-1].transpose(2, 0, 1)
    read = read_picture(path)
    assert read.dtype == torch.float32
    np.testing.assert_allclose(read, values / 65535, atol=1e-6)
    np.testing.assert_allclose(read_picture(path, (0, 4095)), (values / 4095).clip(0, 1), atol=1e-6)
    np.testing.assert_allclose(read_picture(path, (255, 32768)), ((values - 255.0) / 32513).clip(0, 1), atol=1e-6)


def test_what_a_file_says_of_its_range_counts(tmp_path):
    (tmp_path / "twelve.pgm").write_bytes(b"P5\n3 1\n4095\n" + np.array([0, 2048, 4095], ">u2").tobytes())
    assert read_picture(tmp_path / "twelve.pgm")[0].tolist() == [[0, pytest.approx(2048 / 4095, abs=1e-4), 1]]


@pytest.mark.parametrize("kind", ["float.tiff", "float.pfm"])
def test_floating_point_numbers_from_0_to_1_need_no_range(kind, tmp_path):
    numbers = np.array([[0, 0.25, 1]], dtype=np.float32)
    (tmp_path / "float.pfm").write_bytes(b"Pf\n3 1\n-1.0\n" + numbers.tobytes())
    Image.fromarray(numbers).save(tmp_path / "float.tiff")
    assert read_picture(tmp_path / kind).tolist() == [numbers.tolist()] * 3


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (np.array([[-3, 0.5, 255]], np.float32), r"contains numbers from -3 to 255"),
        (np.array([[np.nan, 0.5]], np.float32), r"contains numbers from nan"),
        (np.array([[0, 70000]], np.int32), r"contains 32-bit integers"),
        (np.array([[-500, 500]], np.int16), r"contains 32-bit integers"),
    ],
)
def test_numbers_that_do_not_say_what_is_white_are_refused_by_name(values, why, tmp_path):
    path = tmp_path / "numbers.tiff"
    tifffile.imwrite(path, values)
    with pytest.raises(ValueError, match=rf"numbers\.tiff {why}.* set value_range"):
        read_picture(path)


def test_with_a_range_they_are_read(tmp_path):
    for name, values in {
        "float": np.array([[-3, 0.5, 255]], np.float32),
        "int": np.array([[-500, 500]], np.int16),
    }.items():
        tifffile.imwrite(tmp_path / name, values)
    assert read_picture(tmp_path / "float", (-3, 4))[0].tolist() == [[0, 0.5, 1]]
    assert read_picture(tmp_path / "int", (-500, 500))[0].tolist() == [[0, 1]]


def test_colours_that_no_reader_here_gets_right_are_refused(tmp_path):
    planes = COLOURS.transpose(2, 0, 1).copy()
    tifffile.imwrite(tmp_path / "planes.tiff", planes, photometric="rgb", planarconfig="separate")
    with pytest.raises(ValueError, match=r"colours of .*planes\.tiff cannot be read at their full depth"):
        read_picture(tmp_path / "planes.tiff")


@pytest.mark.parametrize(
    ("kind", "values", "settings", "is_turned"),
    [
        ("png", VALUES, {}, False),
        ("png", VALUES.astype(np.uint8), {}, False),
        # Pillow turns TIFF files, but for grey ones that it only maps into the memory.
        ("tiff", VALUES, {}, False),
        ("tiff", VALUES.astype(np.uint8), {}, False),
        ("tiff", VALUES, {"compression": "tiff_lzw"}, True),
        ("tiff", VALUES.astype(np.uint8), {"compression": "tiff_lzw"}, True),
        ("tiff", VALUES.astype(np.float32) / 65535, {}, True),
    ],
)
def test_pictures_are_turned_where_anomalib_turns_them(kind, values, settings, is_turned, tmp_path):
    path = tmp_path / f"turned.{kind}"
    Image.fromarray(values).save(path, exif=turned(), **settings)
    read = read_picture(path)
    assert read.shape == read_image(path, as_tensor=True).shape == ((3, 3, 2) if is_turned else (3, 2, 3))


@pytest.mark.parametrize(("kind", "is_turned"), [("png", False), ("tiff", True)])
def test_so_are_colours_of_sixteen_bits(kind, is_turned, tmp_path):
    path = tmp_path / f"turned.{kind}"
    if kind == "png":
        cv2.imwrite(str(path), COLOURS)
        content, notes = path.read_bytes(), turned().tobytes()[6:]
        chunk = struct.pack(">I", len(notes)) + b"eXIf" + notes + struct.pack(">I", zlib.crc32(b"eXIf" + notes))
        # After the header, which ends at byte 33.
        path.write_bytes(content[:33] + chunk + content[33:])
        with Image.open(path) as image:
            assert image.getexif()[0x0112] == 6
    else:
        tifffile.imwrite(path, COLOURS[..., ::-1], photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    read = read_picture(path)
    assert read.shape == read_image(path, as_tensor=True).shape == ((3, 3, 2) if is_turned else (3, 2, 3))
    red = np.rot90(VALUES, -1) if is_turned else VALUES
    np.testing.assert_allclose(read[0], red / 65535, atol=1e-6)


@pytest.mark.parametrize("value_range", [(0, 0), (4095, 0), (0, float("inf")), (float("nan"), 1)])
def test_a_range_that_is_none_is_refused(value_range, tmp_path):
    Image.fromarray(VALUES).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"value_range must be two finite numbers, the lower one first, not"):
        read_picture(tmp_path / "grey.png", value_range)


def test_a_picture_that_is_cut_off_or_none_is_named(tmp_path):
    path = tmp_path / "part.png"
    for content in (np.full((64, 64), 300, np.uint16), np.full((64, 64), 30, np.uint8)):
        Image.fromarray(content).save(path)
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(ValueError, match=r"cannot read .*part\.png: "):
            read_picture(path)
    # The last two have errors of their own in Pillow: a width that is no number, and an unknown kind of pixels.
    unknown = b"DDS " + struct.pack("<I", 124) + bytes(120)
    for content in (b"no picture", b"P6 x 64 255 ", unknown):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*part\.png: "):
            read_picture(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_picture(tmp_path / "gone.png")


def test_a_picture_is_made_small_as_pillow_does_it_in_floating_point_and_stays_within_one(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    noise[:40] = 255
    Image.fromarray(noise).save(tmp_path / "picture.png")
    read = read_picture(tmp_path / "picture.png", size=(24, 32))
    channels = [Image.fromarray(channel.astype(np.float32) / 255) for channel in noise.transpose(2, 0, 1)]
    small = [np.asarray(channel.resize((32, 24), Image.Resampling.BILINEAR)) for channel in channels]
    np.testing.assert_allclose(read, small, atol=1e-6)
    assert float(read.max()) <= 1
