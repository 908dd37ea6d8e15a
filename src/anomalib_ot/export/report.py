"""The check of an exported file, and its report.

The report ``NAME.parity.json`` lies beside the file. It has these fields:

``model``, ``format``, ``compression``
    The model's class, the file's format, and the compression of an OpenVINO file.
``batch_size``, ``default_precision``
    Of a graph: images per call, null for a dynamic batch; and the precision that OpenVINO uses by default, which is
    bfloat16 on processors that have it.
``input_size``, ``bytes``
    Height and width of the images, and the size of each file.
``pictures``
    Source and number of the images: the validation set of the data module, or noise.
``tolerance``
    The limits of the check.
``torch``
    Image and pixel AUROC of the model in torch, null without both normal and anomalous images.
``float32``, ``default``
    The same of the exported file in float32, which the check uses, and of a graph at OpenVINO's default precision.
    Also the largest difference of maps and of scores, as a share of the range of torch's maps on these images or in the
    model's validation, whichever is wider; and the rank correlation of the maps' pixels. ``changed_labels`` and
    ``changed_pixels`` are the numbers of images and of pixels whose labels and masks differ from torch's, with their
    largest distance from the threshold, as a share of the same range. For a model whose post-processor is calibrated,
    also the number of images for which the file with its decision and torch decide otherwise, and their largest
    distance.
``versions``
    Versions of the packages.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule

from anomalib_ot.decide.decision import Decision
from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.features.extraction import FLOAT32
from anomalib_ot.images.reading import EIGHT_BITS

from .graphs import GraphRunner
from .normalization import Normalization
from .parity import Runner, compare
from .staging import REPORT
from .tolerance import ExportError, SameOrder, SameValues
from .trial_images import TrialImages

logger = logging.getLogger(__name__)

_PACKAGES = ("anomalib-ot", "anomalib", "torch", "openvino", "nncf")
_WAY_OUT = (
    "Export with less compression (FP16, or none), give a data module with more validation images, or an input_size "
    "of the size that the model resizes to."
)


def check_graph(
    module: AnomalibModule,
    path: Path,
    tolerance: SameValues | SameOrder,
    images: TrialImages,
    details: Mapping[str, Any],
) -> None:
    """Check an ONNX or OpenVINO file in OpenVINO, in float32 and at the default precision.

    Args:
        module: The module that was exported.
        path: The ``.onnx`` or ``.xml`` file.
        tolerance: Limits for the file in float32.
        images: Images to run it on.
        details: Further fields of the report.

    Raises:
        ExportError: If the file is out of tolerance.
    """
    scale = Normalization(module.post_processor)
    graphs = {
        name: GraphRunner(path, precision, scale.clipped, scale.operation)
        for name, precision in (("float32", FLOAT32), ("default", {}))
    }
    properties = {"batch_size": graphs["float32"].batch_size, "default_precision": graphs["default"].precision}
    check(module, path, graphs, tolerance, images, {**details, **properties})


def check(
    module: AnomalibModule,
    path: Path,
    runners: Mapping[str, Runner],
    tolerance: SameValues | SameOrder,
    images: TrialImages,
    details: Mapping[str, Any],
) -> None:
    """Compare an exported file with the module in torch, and write the report and the decision beside it.

    Args:
        module: The module that was exported.
        path: The file.
        runners: What runs the file, by precision; see :func:`~anomalib_ot.export.parity.compare`.
        tolerance: Limits for the runner ``float32``.
        images: Images to run it on.
        details: Further fields of the report.

    Raises:
        ExportError: If the file is out of tolerance. No report is written.
    """
    module.eval()
    # Before the report, which lists all files.
    decision = _write_decision(module, path)
    reference, measured = compare(module, runners, images, details.get("batch_size"), decision)
    broken = tolerance.broken_by(measured["float32"], reference)
    if broken:
        msg = (
            f"the exported {path.name} differs from the model in torch on {len(images)} images ({images.source}): "
            f"{'; '.join(broken)}. No file was left. {_WAY_OUT}"
        )
        raise ExportError(msg, broken)
    report = {
        "model": type(module).__name__,
        **details,
        "input_size": images.size,
        "bytes": {each.name: each.stat().st_size for each in sorted(path.parent.iterdir())},
        "pictures": {"source": images.source, "count": len(images)},
        "tolerance": asdict(tolerance),
        "torch": reference,
        **measured,
        "versions": {name: version(name) for name in _PACKAGES if find_spec(name.replace("-", "_"))},
    }
    _report_of(path).write_text(json.dumps(report, indent=1))


def log_result(path: Path) -> None:
    """Log the result of a check in one line.

    Args:
        path: The exported file, with its report beside it.
    """
    report = json.loads(_report_of(path).read_text())
    logger.info(
        "Checked the export %s: maps differ from torch's by at most %.1e of their range, scores by %.1e, on %d "
        "images (%s); %d labels and %d pixels of masks differ. The report is %s.",
        path,
        report["float32"]["map_difference"],
        report["float32"]["score_difference"],
        report["pictures"]["count"],
        report["pictures"]["source"],
        report["float32"]["changed_labels"],
        report["float32"]["changed_pixels"],
        _report_of(path),
    )


def _write_decision(module: AnomalibModule, path: Path) -> Decision | None:
    """Write ``NAME.calibration.json`` beside a file, and read it as a user does; None without calibration scores."""
    processor = module.post_processor
    decision = processor.decision(type(module).__name__) if isinstance(processor, ConformalPostProcessor) else None
    if decision is None:
        return None
    # Models of anomalib do not record it.
    replace(decision, reading=getattr(module, "reading", EIGHT_BITS)).write(path)
    return Decision.load(path)


def _report_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}{REPORT}")
