"""The exported files of a trained model, and their speed on this machine."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_ot.comparison.measurement import median_seconds
from anomalib_ot.data.full_range import reading_of_images
from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.edge.inferencer import EdgeInferencer
from anomalib_ot.edge.inputs import pixels_of
from anomalib_ot.export.checked import CheckedExport
from anomalib_ot.export.exporters import export_openvino, graph_size, write_onnx
from anomalib_ot.export.tolerance import ExportError
from anomalib_ot.host.class_paths import class_of, create
from anomalib_ot.images.folder import state_of
from anomalib_ot.logs import errors_alone

from .calibration import Calibration
from .steps import Steps

logger = logging.getLogger(__name__)

SUFFIXES = (".bin", ".xml", ".calibration.json", ".parity.json")
"""Of the files of an export, after its name."""
MODEL = "model"
INT8 = "model_int8"
# An INT8 file is kept if it is faster by this factor.
_PAYS = 1.2
_REPEATS = 10
_STEP = "the export"


@dataclass(frozen=True)
class Exported:
    """An exported file, or why there is none.

    Args:
        path: The ``.xml`` file; None if it is not kept.
        ms_per_image: Median milliseconds of an image on this machine, from its pixels to its verdict; None if the
            export failed.
        mib: Size of its files in MiB.
        why_not: Why it is not kept; otherwise empty.
    """

    path: Path | None
    ms_per_image: float | None = None
    mib: float | None = None
    why_not: str = ""

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Exported":
        """An exported file from the values of :attr:`plain`."""
        return cls(**{**plain, "path": Path(plain["path"]) if plain["path"] else None})

    @property
    def plain(self) -> dict[str, Any]:
        """The exported file as plain values."""
        return {**vars(self), "path": str(self.path) if self.path else None}


def exported_once(
    config: dict[str, Any], folder: Path, checkpoint: Path, images: Sequence[Path], steps: Steps
) -> tuple[Calibration, tuple[Exported, Exported]]:
    """Export a trained model to OpenVINO, unless this was done before.

    There is an INT8 file if it passes the check and is faster.

    Args:
        config: The configuration of the training.
        folder: Folder of the export.
        checkpoint: The checkpoint.
        images: The images that it was trained on. The files are checked on its validation images, on which INT8 is
            calibrated too, and timed on the first of the images.
        steps: The finished steps.

    Returns:
        What the threshold promises, the file in float32, and the one in INT8.

    Raises:
        ModuleNotFoundError: If OpenVINO is not installed.
        ExportError: If the float32 file differs from the model.
        RuntimeError: If the model has no threshold.
    """
    states = {str(path): [*state_of(path)] for path in (checkpoint, *images)}
    if found := steps.found(_STEP, states):
        exact, int8 = map(Exported.from_plain, found["exported"])
        return Calibration.from_plain(found["calibration"]), (exact, int8)
    module, processor, data = _trained(config, checkpoint)
    logger.info("Exporting to OpenVINO.")
    with (
        TemporaryDirectory() as scratch,
        (folder / "export.log").open("w", encoding="utf-8", errors="backslashreplace") as log,
        _talking_to(log),
    ):
        size = graph_size(module)
        onnx = write_onnx(module, scratch, MODEL, size, **_onnx_options(module))
        export = partial(export_openvino, module, folder, input_size=size, datamodule=data, onnx=onnx)
        exact = _timed(export(name=MODEL), images[0])
        int8 = _int8(partial(export, name=INT8, compression=CompressionType.INT8_PTQ), images[0], exact)
    calibration = Calibration.of(processor, [*map(Path, data.train_data.samples.image_path)])
    exported = exact, int8
    plain = {"exported": [each.plain for each in exported], "calibration": calibration.plain}
    steps.finish(_STEP, states, plain, files_of(exported))
    return calibration, exported


def _trained(
    config: dict[str, Any], checkpoint: Path
) -> tuple[AnomalibModule, ConformalPostProcessor, AnomalibDataModule]:
    """The trained model, its post-processor, and its data module, which is set up.

    Raises:
        RuntimeError: If the model has no threshold.
    """
    kind, processor = class_of(AnomalibModule, config["model"]), ConformalPostProcessor()
    module = kind.load_from_checkpoint(checkpoint, post_processor=processor, map_location="cpu").eval()
    if not processor.is_calibrated("image"):
        msg = f"{kind.__name__} gives these images scores that set no threshold; choose another model with --model"
        raise RuntimeError(msg)
    data = create(AnomalibDataModule, config["data"])
    data.setup(TrainerFn.FITTING)
    # Checkpoints of anomalib's models do not record it.
    module.reading = reading_of_images(data.train_data)
    return module, processor, data


@contextmanager
def _talking_to(log: TextIO) -> Iterator[None]:
    """Write what the exporters and NNCF print to a file: hundreds of lines, most of them to standard output."""
    with errors_alone("nncf"), redirect_stdout(log):
        yield


def files_of(exported: Sequence[Exported]) -> list[Path]:
    """All files of the exports that are kept."""
    return [
        path
        for each in exported
        if each.path is not None
        for path in (each.path.with_name(f"{each.path.stem}{suffix}") for suffix in SUFFIXES)
        if path.is_file()
    ]


def _int8(export: Callable[[], Path], image: Path, exact: Exported) -> Exported:
    if find_spec("nncf") is None:
        return Exported(None, why_not='nncf is not installed; run: pip install "anomalib-ot[openvino]"')
    try:
        path = export()
    except ExportError as error:
        return Exported(None, why_not="; ".join(error.broken) or str(error))
    except Exception as error:  # noqa: BLE001 - the file is optional, and NNCF fails in many ways
        logger.warning("There is no INT8 file: %r", error)
        return Exported(None, why_not=f"the quantization failed: {error}")
    made = _timed(path, image)
    assert made.ms_per_image is not None and exact.ms_per_image is not None  # noqa: S101, PT018 - both were timed
    if exact.ms_per_image < _PAYS * made.ms_per_image:
        ratio = exact.ms_per_image / made.ms_per_image
        return Exported(None, made.ms_per_image, made.mib, f"it is only {ratio:.2f} times as fast")
    return made


def _onnx_options(module: AnomalibModule) -> dict[str, Any]:
    """Models of anomalib are exported for one image at a time: the graphs of some fail with a dynamic batch."""
    return {} if isinstance(module, CheckedExport) else {"dynamic_axes": {}}


def _timed(path: Path, image: Path) -> Exported:
    inferencer = EdgeInferencer(path)
    pixels = pixels_of(image, inferencer.reading.value_range)
    seconds = median_seconds(lambda: inferencer.predict(pixels), _REPEATS)
    size = sum(path.with_suffix(suffix).stat().st_size for suffix in (".bin", ".xml"))
    return Exported(path, 1000 * seconds, size / 2**20)
