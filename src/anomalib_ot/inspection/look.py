"""Looks at each image of a folder: unreadable, blank, saturated, duplicate, or unlike the others in size or mode."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from anomalib_ot.images.blank import WHITE, blank_images
from anomalib_ot.images.folder import images_in
from anomalib_ot.images.reading import ValueRange, naming_unreadable, read_values_and_depth

Kind = Literal["unreadable", "blank", "duplicate", "saturated", "size", "mode"]

LEFT_OUT = ("unreadable", "blank", "duplicate")
"""Kinds of findings whose images are left out. Images with the other findings are used."""
FEWEST_IMAGES = 10
"""Smallest number of usable images. Fewer cannot be divided into images to train on and images to compare with."""

# Share of the images that must be alike before the others are named: magnetic tiles, say, are all of different sizes.
_COMMON = 0.9
# Share of an image that is white beyond the median of the folder. Of bottles on a lit background, a third is white.
_WHITER = 0.1
# Side of a thumbnail in pixels, and the largest root mean square difference of duplicates in levels of 8 bits. Copies
# of the measured images, saved as JPEG with quality 50 or at half the size, differ by at most 0.82, different training
# images by at least 1.09.
_SIDE = 32
_SAME = 0.9
# Compression changes the luma (ITU-R BT.601) least.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Where parts are aligned and alike, thumbnails of all images are close. Duplicates are closer than this share of the
# distance that the closest pairs have, and these are that share of all pairs of some images.
_CLOSER = 0.25
_CLOSEST = 0.05
_SAMPLE = 256
# Thumbnails that are compared at a time, and images that are read at a time.
_BLOCK = 512
_BATCH, _WORKERS = 64, 4
_NAMED = 3
_CHECK = "the camera and the light"
_CHECK_DEEP = f"{_CHECK}, and set value_range to the black and white of the camera if these are not 0 and 65535"


@dataclass(frozen=True)
class Finding:
    """What is wrong with an image.

    Args:
        path: The image.
        kind: Kind of the finding.
        detail: A sentence about it.
    """

    path: Path
    kind: Kind
    detail: str

    @property
    def is_left_out(self) -> bool:
        """Whether the image is left out for it."""
        return self.kind in LEFT_OUT


@dataclass(frozen=True)
class Inspection:
    """What a look at the images of a folder has found.

    Args:
        images: The usable images in the order of their paths: all but those that are left out.
        findings: What was found, by kind and path: kinds whose images are left out come first.
        sizes: Number of usable images by width and height, in pixels.
        folders: Number of usable images by the folder that directly contains them.
        deep: Number of usable images with more than 8 bits per channel.
    """

    images: list[Path]
    findings: list[Finding]
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    folders: Counter[Path] = field(default_factory=Counter)
    deep: int = 0

    @property
    def left_out(self) -> list[Finding]:
        """The findings whose images are left out, one for each of these images."""
        return [each for each in self.findings if each.is_left_out]


@dataclass(frozen=True)
class _Look:
    path: Path
    size: tuple[int, int]
    mode: str
    is_deep: bool
    blank: str | None
    white: float
    digest: bytes
    thumbnail: NDArray[np.float16]


def inspect_images(folder: Path, value_range: ValueRange | None = None) -> Inspection:
    """Look at all images of a folder and of its subfolders.

    Unreadable images, blank ones and duplicates are left out. Of duplicates, the first in the order of the paths is
    kept. A duplicate has the same pixels as another image, is a copy of it in another format, compression or size, or
    is a second image of the same part in the same place. Other images are reported, and used: saturated ones, in which
    white takes a share that is 10 percentage points above the median of the folder, and those whose size or mode
    differs from that of at least 90 % of the images.

    A thumbnail of each image stays in memory, not the image. A file that vanishes meanwhile counts as unreadable.

    Args:
        folder: The folder.
        value_range: Values that map to black and white in images with more than 8 bits per channel.

    Returns:
        The usable images and the findings.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder has fewer than ``FEWEST_IMAGES`` usable images.

    Example:
        >>> inspect_images(Path("parts"))
        Traceback (most recent call last):
        FileNotFoundError: there is no folder parts
    """
    if not folder.is_dir():
        msg = f"there is no folder {folder}"
        raise FileNotFoundError(msg)
    paths = [*images_in(folder)]
    seen = [*_looks(paths, value_range)]
    findings = [each for each in seen if isinstance(each, Finding)]
    looks = [each for each in seen if isinstance(each, _Look)]
    findings += [
        Finding(each.path, "blank", f"The image is {each.blank}; check {_CHECK_DEEP if each.is_deep else _CHECK}.")
        for each in looks
        if each.blank
    ]
    looks = [each for each in looks if not each.blank]
    for find in (_same_pixels, _copies):
        duplicates = find(looks)
        findings += duplicates
        known = {each.path for each in duplicates}
        looks = [each for each in looks if each.path not in known]
    _require_enough(folder, len(paths), len(looks), findings)
    findings += [*_saturated(looks), *_unlike_in_size(looks), *_unlike_in_mode(looks)]
    order = get_args(Kind)
    return Inspection(
        images=[each.path for each in looks],
        findings=sorted(findings, key=lambda each: (order.index(each.kind), each.path)),
        sizes=Counter(each.size for each in looks),
        folders=Counter(each.path.parent for each in looks),
        deep=sum(each.is_deep for each in looks),
    )


def _looks(paths: Sequence[Path], value_range: ValueRange | None) -> Iterable[_Look | Finding]:
    with ThreadPoolExecutor(_WORKERS) as pool:
        # A batch at a time, so that an interruption waits for a few images only.
        for start in track(range(0, len(paths), _BATCH), "Looking at the images", transient=True):
            yield from pool.map(partial(_look, value_range=value_range), paths[start : start + _BATCH])


def _look(path: Path, value_range: ValueRange | None) -> _Look | Finding:
    try:
        with naming_unreadable(path), Image.open(path) as image:
            mode = image.mode
        values, is_deep = read_values_and_depth(path, value_range)
    except FileNotFoundError:
        return Finding(path, "unreadable", "The file vanished while the folder was read.")
    except ValueError as error:
        return Finding(path, "unreadable", f"{error}.")
    height, width, _ = values.shape
    pixels = blake2b(values.tobytes(), digest_size=16)
    pixels.update(f"{width}x{height}".encode())
    return _Look(
        path=path,
        size=(width, height),
        mode=mode,
        is_deep=is_deep,
        blank=blank_images(values.transpose(2, 0, 1)[None]).get(0),
        white=float(np.logical_and.reduce([values[..., each] >= WHITE for each in range(3)]).mean()),
        digest=pixels.digest(),
        thumbnail=_thumbnail(values),
    )


def _thumbnail(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Grey thumbnail (side²,) of an image (H, W, 3) in [0, 1], in levels of 8 bits."""
    small = Image.fromarray(values @ _LUMA).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return (255 * np.asarray(small)).astype(np.float16).ravel()


def _same_pixels(looks: Sequence[_Look]) -> list[Finding]:
    first: dict[bytes, Path] = {}
    return [
        Finding(each.path, "duplicate", f"It has the same pixels as {kept}.")
        for each in looks
        if (kept := first.setdefault(each.digest, each.path)) != each.path
    ]


def _copies(looks: Sequence[_Look]) -> list[Finding]:
    """Images that are close to an earlier one that is none of these itself."""
    if not looks:
        return []
    thumbnails = np.stack([each.thumbnail for each in looks])
    sample = thumbnails[:: -(-len(looks) // _SAMPLE)].astype(np.float32)
    # Without what all have in common, squares are small and their differences exact.
    centre = sample.mean(0)
    among = _distances(sample - centre, sample - centre)[np.triu_indices(len(sample), 1)]
    # Without those of copies, of which there may be many.
    apart = among[among >= _SAME] if (among >= _SAME).any() else among
    limit = min(_SAME, _CLOSER * float(np.quantile(apart, _CLOSEST))) if apart.size else 0.0
    copies: dict[int, int] = {}
    for start in range(0, len(looks), _BLOCK):
        block = thumbnails[start : start + _BLOCK] - centre
        close = [
            _distances(block, thumbnails[begin : begin + _BLOCK] - centre) < limit
            for begin in range(0, start + 1, _BLOCK)
        ]
        for row, earlier in np.argwhere(np.hstack(close)).tolist():
            later = start + row
            if earlier < later and earlier not in copies:
                copies.setdefault(later, earlier)
    return [
        Finding(looks[later].path, "duplicate", f"It shows the same as {looks[earlier].path}.")
        for later, earlier in copies.items()
    ]


def _distances(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Root mean square differences (N, M) of rows (N, P) and (M, P)."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    root: NDArray[np.float32] = np.sqrt(squares.clip(0) / first.shape[1])
    return root


def _saturated(looks: Sequence[_Look]) -> list[Finding]:
    usual = float(np.median([each.white for each in looks]))
    return [
        Finding(
            each.path,
            "saturated",
            f"{each.white:.0%} of its pixels are white; half of the images have at most {usual:.0%}.",
        )
        for each in looks
        if each.white > usual + _WHITER
    ]


def _unlike_in_size(looks: Sequence[_Look]) -> list[Finding]:
    common = _common([each.size for each in looks])
    return [
        Finding(each.path, "size", "It has {} by {} pixels; most images have {} by {}.".format(*each.size, *common))
        for each in looks
        if common and each.size != common
    ]


def _unlike_in_mode(looks: Sequence[_Look]) -> list[Finding]:
    common = _common([each.mode for each in looks])
    return [
        Finding(each.path, "mode", f"Its pixels have the mode {each.mode}; those of most images have {common}.")
        for each in looks
        if common and each.mode != common
    ]


def _common(values: Sequence[Any]) -> Any:
    """The value that nearly all have, None if there is none."""
    value, count = Counter(values).most_common(1)[0]
    return value if count >= _COMMON * len(values) else None


def _require_enough(folder: Path, found: int, usable: int, findings: Sequence[Finding]) -> None:
    if usable >= FEWEST_IMAGES:
        return
    if not found:
        msg = f"there are no images in {folder} and its subfolders; give one with {FEWEST_IMAGES} good images or more"
        raise ValueError(msg)
    few_shot = "; Foct can be trained on one to four" if usable else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(each.kind for each in findings).items())
    named = "; ".join(f"{each.path}: {each.detail}" for each in findings[:_NAMED])
    why = f" The others are left out ({kinds}), such as {named}" if findings else ""
    msg = (
        f"{folder} has {usable} usable images of {found}, expected at least {FEWEST_IMAGES}: "
        f"add good images{few_shot}.{why}"
    )
    raise ValueError(msg)
