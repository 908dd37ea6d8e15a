"""Small good images."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """Twelve noisy images of a grey disc."""
    folder = tmp_path_factory.mktemp("good")
    random = np.random.default_rng(0)
    rows, columns = np.indices((72, 72)) - 36
    disc = rows**2 + columns**2 < 24**2
    for index in range(12):
        image = random.integers(200, 220, (72, 72), dtype=np.uint8)
        image[disc] = random.integers(60, 100, disc.sum(), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{index}.png")
    return sorted(folder.iterdir())
