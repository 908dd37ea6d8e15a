"""The models of the demonstration and the timings, with the same backbone, image size and metrics."""

from collections.abc import Callable
from typing import Any

from anomalib.metrics import AUPRO, AUROC, Evaluator
from anomalib.models import Padim, Patchcore
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor

from anomalib_ot import Duo, Foct, Pradot, WtFlow

IMAGE_SIZE = (224, 224)
LAYERS = ("blocks.2", "blocks.4")


def parts(backbone: str) -> dict[str, Any]:
    """Arguments that all models share: the backbone, its normalisation, the image size and the metrics."""
    return {
        "backbone": backbone,
        "pre_processor": pre_processor(backbone),
        "evaluator": Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
                AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            ],
        ),
        "visualizer": False,
    }


def pre_processor(backbone: str) -> PreProcessor:
    """Resize to ``IMAGE_SIZE`` and normalise for the backbone."""
    return Pradot.configure_pre_processor(IMAGE_SIZE, backbone)


def models(backbone: str, prototypes_per_cell: tuple[int, int] = (4, 16)) -> dict[str, Callable[[], AnomalibModule]]:
    """Functions that create the models, by name, on layers of EfficientNet-Lite0.

    Args:
        backbone: The backbone of all models.
        prototypes_per_cell: Pradot's prototypes on the finer and on the coarser layer. The 16 on both layers and the
            batches of 64 of the paper take four times as long.
    """
    return {
        "Pradot": lambda: Pradot(
            layers=LAYERS, prototypes_per_cell=prototypes_per_cell, batch_size=32, **parts(backbone)
        ),
        "WtFlow": lambda: WtFlow(layers=LAYERS[1:], **parts(backbone)),
        "Duo": lambda: Duo(layers=LAYERS, **parts(backbone)),
        "Foct": lambda: Foct(layers=LAYERS, **parts(backbone)),
        "PatchCore": lambda: Patchcore(layers=LAYERS, coreset_sampling_ratio=0.1, **parts(backbone)),
        "PaDiM": lambda: Padim(layers=["blocks.1", *LAYERS], n_features=100, **parts(backbone)),
    }
