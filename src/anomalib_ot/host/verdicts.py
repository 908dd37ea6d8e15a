"""Verdicts of a prediction: a table of scores, thresholds and labels beside the drawn images."""

import csv
import logging
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from anomalib_ot.files import claim, require_ours, write_text
from anomalib_ot.prediction_table import COLUMNS, TABLE
from anomalib_ot.transport import Processes

from .calibration import HasPValues
from .run_folder import RunFolder
from .scale import LinearScale, Scale, scale_of

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

logger = logging.getLogger(__name__)


class Verdicts(RunFolder):
    """Part of a Lightning model whose predictions write a table of verdicts, ``predictions.csv``.

    The table lies beside the images that the host draws. It replaces an earlier table once it is complete. Each image
    has a row: its path, its score, the threshold on the same scale, its label (``anomalous`` or ``normal``), the raw
    score, and its p-value among good images. If no threshold is known, threshold and label are empty; so is the p-value
    if the post-processor has none. An image whose score is NaN is anomalous, and has no p-value. A line on standard
    output gives the path of the table and the number of anomalous images.

    Attributes:
        raw_scores: Scores (B,) of the last predicted batch, before the post-processor.
    """

    raw_scores: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without the scores of the last batch, which do not belong into an exported file."""
        state = super().__getstate__()
        state.pop("raw_scores", None)
        return state

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Score a batch, and keep the raw scores, as the post-processor clips them."""
        scored = cast("AnomalibModule", super()).predict_step(batch, batch_idx, dataloader_idx)
        self.raw_scores = cast("Any", scored).pred_score
        return scored

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks of the host, followed by one that writes the table after the post-processor has run."""
        return [*super().configure_callbacks(), _VerdictTable()]


class _VerdictTable(Callback):
    """Collects the rows of a prediction, a line of text for each image, and writes them at the end."""

    def __init__(self) -> None:
        self._folder = Path()
        self._rows = StringIO()
        self._count = 0
        self._anomalous = 0
        self._scale: Scale = LinearScale()
        self._why_none = ""

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Find the folder of the table, and refuse to replace a foreign file before anything is computed."""
        self._folder = pl_module.images_folder(trainer)
        require_ours(self._folder, TABLE)
        self._scale = scale_of(pl_module, "image")
        self._why_none = _why_no_threshold(pl_module.post_processor)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the rows of a batch."""
        del trainer, batch, batch_idx, dataloader_idx
        scores = outputs.pred_score.flatten()
        threshold = self._scale.threshold
        labels = [""] * len(scores)
        if threshold is not None:
            # NaN is not comparable, and must not be normal.
            is_anomalous = (~(scores <= threshold)).tolist()
            labels = ["anomalous" if each else "normal" for each in is_anomalous]
            self._anomalous += sum(is_anomalous)
        paths = outputs.image_path or [""] * len(scores)
        limit = self._limit()
        raw = pl_module.raw_scores.flatten()
        _warn_of_nan(paths, raw)
        places = _p_values(pl_module.post_processor, raw)
        writer = csv.writer(self._rows, lineterminator="\n")
        for path, score, label, *rest in zip(paths, _written(scores), labels, _written(raw), places, strict=True):
            writer.writerow((path, score, limit, label, *rest))
        self._count += len(scores)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the rows of all processes to the table, and print a summary."""
        del pl_module
        shares = Processes.all().each((self._rows.getvalue(), self._count, self._anomalous))
        rows, counts, anomalous = zip(*shares, strict=True)
        if not trainer.is_global_zero or not sum(counts):
            return
        path: Path | None = self._folder / TABLE
        try:
            claim(self._folder, TABLE)
            write_text(self._folder / TABLE, ",".join(COLUMNS) + "\n" + "".join(rows))
        except OSError as error:
            # A full disk must not cost the predictions.
            logger.warning("The verdicts could not be written to %s: %s", path, error)
            path = None
        where = f"{path}: " if path else ""
        # The result of the command, as the trainer prints the table of a test.
        print(_encodable(f"{where}{self._summary(sum(anomalous), sum(counts))}"))  # noqa: T201

    def _summary(self, anomalous: int, count: int) -> str:
        scores = "raw score" if self._scale.is_raw else "score"
        if self._scale.threshold is None:
            return f"{scores}s of {count} images without a verdict, as no threshold is known: {self._why_none}"
        return f"{anomalous} of {count} images are anomalous ({scores} above the threshold {self._limit()})"

    def _limit(self) -> str:
        """The threshold in the table; a normalised one is set by the user, and rounded from single precision."""
        threshold = self._scale.threshold
        if threshold is None:
            return ""
        return _written(Tensor([threshold]))[0] if self._scale.is_raw else str(round(threshold, 6))


def _why_no_threshold(post_processor: Any) -> str:
    """Why a post-processor has no threshold, if it has none."""
    if not isinstance(post_processor, PostProcessor):
        return "the model has no post-processor of anomalib"
    if not post_processor.enable_thresholding:
        return "thresholding is off"
    return "no scores of good images" if isinstance(post_processor, HasPValues) else "no validation images"


def _p_values(post_processor: Any, raw_scores: Tensor) -> list[str]:
    """P-values of raw image scores (N,), empty where they are not known."""
    is_number = ~raw_scores.isnan()
    known = post_processor.p_values(raw_scores[is_number]) if isinstance(post_processor, HasPValues) else None
    if known is None:
        return [""] * len(raw_scores)
    remaining = iter(known)
    return [f"{next(remaining):.6g}" if each else "" for each in is_number.tolist()]


def _warn_of_nan(paths: Sequence[str], raw_scores: Tensor) -> None:
    """Name the images whose score is NaN."""
    if bad := [str(path) for path, is_nan in zip(paths, raw_scores.isnan().tolist(), strict=True) if is_nan]:
        logger.warning(
            "The score of %d images is NaN, which counts as anomalous: %s. Check the images and the precision of the "
            "model.",
            len(bad),
            ", ".join(bad),
        )


def _encodable(text: str) -> str:
    """The text, with bytes of file names that are not UTF-8 written as numbers."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _written(values: Tensor) -> list[str]:
    """Numbers (N,) in the fewest digits that identify them in single precision."""
    return [str(each) for each in values.detach().cpu().float().numpy()]
