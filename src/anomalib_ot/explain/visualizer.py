"""A visualizer for anomalib's own command that also explains the most anomalous images."""

import heapq
import logging
from collections.abc import Sequence
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer

from anomalib_ot.files import claim
from anomalib_ot.settings import require

if TYPE_CHECKING:
    from anomalib_ot.drawing.data import Data
    from anomalib_ot.drawing.pictures import Picture

logger = logging.getLogger(__name__)


class ExplainingVisualizer(ImageVisualizer):
    """Draw anomalib's figure of each prediction, and the views of the most anomalous images.

    The views are written to the folder ``explain`` beside anomalib's ``images``, or beside ``output_dir`` (within it if
    that is the working directory), in the layout of ``anomalib-ot explain``. An online model is explained in its state
    at the end of the run. Where possible, views that cannot be drawn or written are refused before the run.

    Args:
        count: Number of images, those with the highest scores; None for all.
        views: Names of the views, as for ``anomalib-ot explain``; by default all that can be drawn.
        formats: Formats of the figures: png, svg and pdf.
        seed: Seed of random choices.
        **settings: Settings of anomalib's ``ImageVisualizer``.

    Raises:
        ValueError: If ``count`` is below 1, a format is unknown, or the model does not have a view or cannot draw it.
        FileExistsError: If ``explain`` contains a foreign file of a name that is needed, or the given ``output_dir``
            contains one of the name of an anomalib figure, such as the image itself.

    Example:
        >>> from anomalib_ot import Pradot
        >>> model = Pradot("resnet18", ["layer3"], pre_trained=False, visualizer=ExplainingVisualizer(count=5))
    """

    def __init__(
        self,
        count: int | None = 5,
        views: Sequence[str] | None = None,
        formats: Sequence[str] = ("png",),
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        from anomalib_ot.drawing.figures import require_formats  # noqa: PLC0415 - imported only to draw

        require(count is None or count >= 1, "count", "at least 1, or None", count)
        require_formats(formats)
        self._shares_its_folder = self.output_dir is not None
        self.count = count
        self.views = views
        self.formats = formats
        self.seed = seed
        # (score, minus the index, image). Among equal scores the first image is kept.
        self._highest: list[tuple[float, int, Picture]] = []
        self._numbers = count_from()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse unknown views and an output folder with foreign files before the run."""
        from .explanation import require_place  # noqa: PLC0415
        from .views import views_of  # noqa: PLC0415

        del stage
        views_of(type(pl_module), self.views)
        require_place(type(pl_module), self._folder(trainer))

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Discard the images of the previous run, and refuse requested views that cannot be drawn."""
        from anomalib_ot.drawing.views import Subject  # noqa: PLC0415

        from .explanation import lacking_views, require_place  # noqa: PLC0415

        # By now, this is the folder of the run that wrote the checkpoint.
        require_place(type(pl_module), self._folder(trainer))
        self._highest = []
        self._numbers = count_from()
        if self.views is not None:
            lacking_views(Subject(pl_module, _data(trainer)), self.views)

    on_predict_start = on_test_start

    def on_test_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw anomalib's figures, and record the most anomalous images."""
        from anomalib_ot.drawing.pictures import prepared_pictures  # noqa: PLC0415

        from .evidence import image_scores  # noqa: PLC0415

        if self._shares_its_folder:
            self._claim_places(trainer, batch.image_path)
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        for picture in prepared_pictures(pl_module, batch):
            # The scores of the batch are clipped to [0, 1], so that many may be equal.
            (score,) = image_scores(pl_module, [picture]).values()
            heapq.heappush(self._highest, (score, -next(self._numbers), picture))
            if self.count is not None and len(self._highest) > self.count:
                heapq.heappop(self._highest)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the views."""
        from .explanation import normal_scores, summary, write_views  # noqa: PLC0415
        from .views import ScoredSubject  # noqa: PLC0415

        pictures = [(picture, "highest score") for _, _, picture in sorted(self._highest, reverse=True)]
        self._highest = []
        if not pictures:
            return
        data = _data(trainer)
        subject = ScoredSubject(pl_module, data, normal_scores(pl_module, data), self.seed)
        output = self._folder(trainer)
        checkpoint = str(trainer.ckpt_path or "")
        page, explained = write_views(subject, pictures, output, self.views, self.formats, checkpoint)
        for each in explained:
            logger.info("%s", summary(each))
        logger.info("Views of the most anomalous images: %s", page)

    on_predict_end = on_test_end

    def _claim_places(self, trainer: Any, paths: Sequence[str]) -> None:
        """Refuse to overwrite foreign files in a given folder. anomalib names its figures after the images."""
        data = getattr(trainer, "datamodule", None)
        name, category = getattr(data, "name", None), getattr(data, "category", None)
        places = [generate_output_filename(path, str(self.output_dir), name, category, mkdir=False) for path in paths]
        for folder in {place.parent for place in places}:
            claim(folder, *(place.name for place in places if place.parent == folder))

    def _folder(self, trainer: Any) -> Path:
        """Folder of the views."""
        images = Path(trainer.default_root_dir, "images") if self.output_dir is None else Path(self.output_dir)
        return images.parent / "explain"


def _data(trainer: Any) -> "Data":
    from anomalib_ot.drawing.data import Data  # noqa: PLC0415

    from .data import data_of  # noqa: PLC0415

    module = getattr(trainer, "datamodule", None)
    return data_of(module) if module else Data("images", (), why_none="no data module, so no held-out images")
