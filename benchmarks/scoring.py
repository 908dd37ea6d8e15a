"""What scoring costs beside the backbone alone, one picture at a time, in torch and in OpenVINO.

Run as ``python -m benchmarks.scoring``. Pradot's four parts (two layers, two α) are fitted on the embedded category.
The backbone alone is the same network up to the same layers, in the same form.
"""

from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import openvino
import torch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from jsonargparse import auto_cli

from anomalib_ot import Assembly
from anomalib_ot.comparison import measure, median_seconds
from anomalib_ot.components.extraction import extract_by_parts
from anomalib_ot.offline import offline_backbone

from .side_by_side import IMAGE_SIZE, models

FLOAT = {"INFERENCE_PRECISION_HINT": "f32"}


def main(per_cell: tuple[int, int] = (4, 16), images: int = 60, threads: int = 2, seed: int = 0) -> None:
    """Print milliseconds for a picture and their ratio.

    Args:
        per_cell: Prototypes a cell on the finer and on the coarser layer, before compression.
        images: Pictures to fit on.
        threads: Threads of torch.
        seed: Seed of everything random.
    """
    torch.set_num_threads(threads)
    folder = Path(mkdtemp())
    build = models(offline_backbone(), per_cell)["Pradot"]
    model, _ = measure(build, Assembly(folder, n_train=images), seed)
    network = model.model.eval()
    print(f"{network.count} prototypes after compression, {threads} threads, seed {seed}")
    image = torch.rand(1, 3, *IMAGE_SIZE)
    with torch.inference_mode():
        report(
            "torch",
            median_seconds(lambda: extract_by_parts(network.feature_extractor, image)),
            median_seconds(lambda: network(image)),
        )
    exported = Engine(logger=False, default_root_dir=folder).export(
        model, ExportType.OPENVINO, export_root=folder, input_size=IMAGE_SIZE
    )
    whole = openvino.compile_model(exported, "CPU", FLOAT)
    alone = openvino.compile_model(openvino.convert_model(network.feature_extractor, example_input=image), "CPU", FLOAT)
    array = image.numpy().astype(np.float32)
    report("OpenVINO", median_seconds(lambda: alone(array)), median_seconds(lambda: whole(array)))


def report(form: str, backbone: float, whole: float) -> None:
    """Print a line of the table."""
    print(f"{form:9} backbone {1000 * backbone:5.1f} ms, whole {1000 * whole:5.1f} ms, ratio {whole / backbone:.2f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
