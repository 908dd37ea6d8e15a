"""The images of a folder as a stream."""

import os
import time
from collections.abc import Container, Iterator
from pathlib import Path

from anomalib_ot.settings import require

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of the files that torchvision, and thus anomalib, take for images, in lower case."""

_State = tuple[int, int]


def images_in(folder: Path) -> dict[Path, _State]:
    """The images of a folder and of its subfolders in the order of their paths, with size and time of change.

    Hidden files, which other programs use for unfinished files, are left out.
    """
    found = {}
    # Unlike rglob before Python 3.13, walk ignores a folder that vanishes meanwhile.
    for path in sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            try:
                found[path] = state_of(path)
            except FileNotFoundError:
                continue
    return found


def state_of(path: Path) -> _State:
    """Size and time of change of a file, which tell whether it is the same as before."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def require_apart(output: Path, images: Path) -> None:
    """Check that an output does not come into a folder of images, and would be read as one of them later.

    Raises:
        ValueError: If it does.
    """
    if output.resolve().is_relative_to(images.resolve()):
        msg = f"the output {output} is in the folder of the images, {images}, and would be read as images; move it"
        raise ValueError(msg)


def require_stream(folder: Path, watch: float | None = None) -> None:
    """Check the arguments of :func:`stream_of`.

    Args:
        folder: The folder. If it is watched, images may come later.
        watch: Seconds between two looks.

    Raises:
        ValueError: If the seconds are not positive.
        FileNotFoundError: If there is no such folder, or no image in it.
    """
    require(watch is None or watch > 0, "watch", "a positive number of seconds, or left out", watch)
    if not folder.is_dir():
        msg = f"there is no folder {folder}"
        raise FileNotFoundError(msg)
    if watch is None and not images_in(folder):
        msg = f"there are no images in {folder}; to wait for images, set watch"
        raise FileNotFoundError(msg)


def stream_of(folder: Path, watch: float | None = None, skipped: Container[Path] = ()) -> Iterator[list[Path]]:
    """Yield the images of a folder in the order of their paths, each once.

    Args:
        folder: The folder.
        watch: Seconds between two looks at a growing folder. An image is yielded when its file did not change between
            two looks. Without it, the images that are there are yielded at once.
        skipped: Images that could not be read, such as half-written ones. The caller adds to them; each is yielded
            again when its file has changed.

    Yields:
        The new images of each look; never ends if the folder is watched.
    """
    if watch is None:
        yield [*images_in(folder)]
        return
    earlier: dict[Path, _State] = {}
    done: dict[Path, _State] = {}
    while True:
        found = images_in(folder)
        ready = {
            path: state
            for path, state in found.items()
            if earlier.get(path) == state and (path not in done or (path in skipped and done[path] != state))
        }
        if ready:
            yield [*ready]
            done |= ready
        earlier = found
        time.sleep(watch)
