"""Verdicts of a prediction: a table of scores, thresholds and labels beside the pictures."""

import csv
import logging
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from anomalib_ot.files import claim, require_ours, write_text
from anomalib_ot.transport import Processes

from .run_folder import RunFolder

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

logger = logging.getLogger(__name__)

TABLE = "predictions.csv"
"""Name of the table, in the folder of the pictures."""

_COLUMNS = ("path", "score", "threshold", "label", "score_raw")


class Verdicts(RunFolder):
    """Part of a Lightning model whose predictions leave a table of verdicts, ``predictions.csv``.

    The table lies beside the pictures that the host draws, and takes the place of an earlier one once it is whole. A
    picture has a row: its path, its score and the threshold on the same scale, its label, ``anomalous`` or ``normal``,
    and the raw score. Where no threshold is known, threshold and label are empty. A line on standard output says where
    it is and how many pictures are anomalous.

    Attributes:
        raw_scores: Scores (B,) of the last batch that was predicted, before the post-processor.
    """

    raw_scores: Tensor | None = None

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Score a batch, and keep the scores as they are: the post-processor clips them."""
        scored = cast("AnomalibModule", super()).predict_step(batch, batch_idx, dataloader_idx)
        self.raw_scores = cast("Any", scored).pred_score
        return scored

    def configure_callbacks(self) -> list[Callback]:
        """The host's, and after the post-processor what writes the table."""
        return [*super().configure_callbacks(), _VerdictTable()]


class _Scale(NamedTuple):
    """What scores are compared with.

    Attributes:
        threshold: Scores above it are anomalous; None where it is not known.
        is_raw: Whether scores are as the model makes them, or normalised.
        why_none: Why there is no threshold, in words.
    """

    threshold: Tensor | None
    is_raw: bool
    why_none: str = ""


def _scale(post_processor: Any) -> _Scale:
    """What the scores of a model with this post-processor are compared with."""
    if not isinstance(post_processor, PostProcessor):
        return _Scale(None, is_raw=True, why_none="there is no post-processor of anomalib's")
    has_range = not (post_processor.image_min.isnan() or post_processor.image_max.isnan())
    is_raw = not (post_processor.enable_normalization and has_range)
    if not post_processor.enable_thresholding:
        return _Scale(None, is_raw, "thresholding is switched off")
    if post_processor.image_threshold.isnan():
        return _Scale(None, is_raw, "none was learned, for lack of validation pictures")
    # The host would compare raw scores with the threshold of normalised ones.
    return _Scale(post_processor.image_threshold if is_raw else post_processor.normalized_image_threshold, is_raw)


class _VerdictTable(Callback):
    """Collects the rows of a prediction, a line of text for each picture, and writes them when it ends."""

    def __init__(self) -> None:
        self._folder = Path()
        self._rows = StringIO()
        self._count = 0
        self._anomalous = 0
        self._scale = _Scale(None, is_raw=True)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Find the table's place, and refuse one that is taken before anything is computed."""
        self._folder = pl_module.pictures_folder(trainer)
        require_ours(self._folder, TABLE)
        self._scale = _scale(pl_module.post_processor)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the verdicts of a batch."""
        del trainer, batch, batch_idx, dataloader_idx
        scores = outputs.pred_score.flatten()
        threshold = self._scale.threshold
        labels = [""] * len(scores)
        if threshold is not None:
            is_anomalous = (scores > threshold.to(scores.device)).tolist()
            labels = ["anomalous" if each else "normal" for each in is_anomalous]
            self._anomalous += sum(is_anomalous)
        paths = outputs.image_path or [""] * len(scores)
        limit = self._limit()
        raw = _written(pl_module.raw_scores.flatten())
        writer = csv.writer(self._rows, lineterminator="\n")
        for path, score, label, raw_score in zip(paths, _written(scores), labels, raw, strict=True):
            writer.writerow((path, score, limit, label, raw_score))
        self._count += len(scores)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Put the rows of all processes into a file, and say what they come to."""
        del pl_module
        shares = Processes.all().each((self._rows.getvalue(), self._count, self._anomalous))
        rows, counts, anomalous = zip(*shares, strict=True)
        if not trainer.is_global_zero or not sum(counts):
            return
        path: Path | None = self._folder / TABLE
        try:
            claim(self._folder, TABLE)
            write_text(self._folder / TABLE, _encodable(",".join(_COLUMNS) + "\n" + "".join(rows)))
        except OSError as error:
            # What was predicted is worth more than the table.
            logger.warning("The verdicts could not be written to %s: %s", path, error)
            path = None
        where = f"{path}: " if path else ""
        # The answer to the command, as the trainer prints the table of a test.
        print(_encodable(f"{where}{self._summary(sum(anomalous), sum(counts))}"))  # noqa: T201

    def _summary(self, anomalous: int, count: int) -> str:
        scores = "raw score" if self._scale.is_raw else "score"
        if self._scale.threshold is None:
            return f"{scores}s of {count} pictures without a verdict, as no threshold is known: {self._scale.why_none}"
        return f"{anomalous} of {count} pictures are anomalous ({scores} above the threshold {self._limit()})"

    def _limit(self) -> str:
        """The threshold in words; that of the normalised scale is a user's own number, in single precision."""
        threshold = self._scale.threshold
        if threshold is None:
            return ""
        return _written(threshold.flatten())[0] if self._scale.is_raw else str(round(float(threshold), 6))


def _encodable(text: str) -> str:
    """The text, in which bytes of file names that are not UTF-8 are written as numbers."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _written(values: Tensor) -> list[str]:
    """Numbers (N,) in the fewest digits that tell them from all others of single precision."""
    return [str(each) for each in values.detach().cpu().float().numpy()]
