"""Output folders: exports and predictions go to the folder of the run that trained the model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

# The default folder of the host's engine, and its folders of checkpoints and images within a run.
_DEFAULT_ROOT = Path("results")
_CHECKPOINTS = ("weights", "lightning")
_IMAGES = "images"
_OF_THIS_RUN = {"run_folder", "drawn_in"}


class RunFolder:
    """Part of a Lightning model whose exports and predictions go to the folder of the run that trained it.

    The host's engine exports a checkpoint to ``results/weights``, where the next model overwrites it. It writes
    predictions to a separate folder beside the runs. A folder that the user gives as ``export_root``,
    ``default_root_dir`` or a visualizer's ``output_dir`` takes precedence. The host's folder is used if the checkpoint
    is not in the folder of a run, or if that folder is not writable.

    Attributes:
        run_folder: Folder of the run that trained the model; None if it is not known.
        drawn_in: Folder in which the last run drew its images, if the user did not give one.
    """

    run_folder: Path | None = None
    drawn_in: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without the paths of this machine, which do not belong into an exported file."""
        state = cast("Any", super()).__getstate__()
        return {name: value for name, value in state.items() if name not in _OF_THIS_RUN}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "AnomalibModule":
        """Load a model as the base class does, and find the run that trained it."""
        model = cast("type[AnomalibModule]", super()).load_from_checkpoint(checkpoint_path, *args, **kwargs)
        cast("RunFolder", model).run_folder = _run_of(checkpoint_path)
        return model

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks of the host, preceded by one that sets the folder in which they draw."""
        return [_RunFinder(), *cast("Any", super()).configure_callbacks()]

    def images_folder(self, trainer: Trainer) -> Path:
        """The folder in which a prediction draws its images, or would if it drew any.

        Args:
            trainer: The trainer that predicts.
        """
        visualizer = _visualizer(trainer)
        if visualizer is not None and visualizer.output_dir is not None:
            return Path(visualizer.output_dir)
        return (self._own_root(trainer) or Path(trainer.default_root_dir)) / _IMAGES

    def own_export_root(self, given: str | Path) -> Path:
        """The folder of an export: that of the run instead of the engine's default.

        Args:
            given: The ``export_root``. The engine passes its default as a ``Path``, a user's value as a string.
        """
        model = cast("AnomalibModule", self)
        defaults = {_DEFAULT_ROOT}
        if model._trainer is not None and self._own_root(model.trainer):  # noqa: SLF001 - the public property raises without one
            defaults.add(Path(model.trainer.default_root_dir))
        is_default = isinstance(given, Path) and given in defaults
        return self.run_folder if is_default and _is_writable(self.run_folder) else Path(given)  # type: ignore[return-value]  # a writable folder is not None

    def _own_root(self, trainer: Trainer) -> Path | None:
        """The folder of the run if it replaces that of the trainer, else None."""
        if not _is_writable(self.run_folder):
            return None
        ours = (_DEFAULT_ROOT / cast("AnomalibModule", self).name).resolve()
        root = Path(trainer.default_root_dir).resolve()
        # A user's default_root_dir inside the default one contains the name of the model again.
        is_default = root.is_relative_to(ours) and ours.name not in root.relative_to(ours).parts
        return self.run_folder if is_default else None


class _RunFinder(Callback):
    """Finds the run of a model, and lets the visualizer draw there unless the user gave a folder."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        pl_module.run_folder = _run_of(Path(folder, "model.ckpt")) if folder else None

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        # The test of a resumed training, which has its own folder, uses the checkpoint that it resumed from.
        if trainer.ckpt_path and pl_module.run_folder != Path(trainer.default_root_dir):
            pl_module.run_folder = _run_of(trainer.ckpt_path)
        visualizer = _visualizer(trainer)
        if visualizer is not None and visualizer.output_dir in {None, pl_module.drawn_in}:
            # This callback, not the user, set the folder of an earlier run of the same model.
            visualizer.output_dir = None
            visualizer.output_dir = pl_module.drawn_in = pl_module.images_folder(trainer)

    on_predict_start = on_test_start


def _visualizer(trainer: Trainer) -> ImageVisualizer | None:
    """The visualizer of the trainer: the host removes it from the model alone if the checkpoint had none."""
    return next((each for each in cast("Any", trainer).callbacks if isinstance(each, ImageVisualizer)), None)


def _run_of(checkpoint: str | Path) -> Path | None:
    """Folder of the run that wrote a checkpoint; None if the path is not that of a checkpoint in a run."""
    folder = Path(checkpoint).parent.resolve()
    return folder.parents[1] if folder.parts[-2:] == _CHECKPOINTS else None


def _is_writable(folder: Path | None) -> bool:
    return folder is not None and folder.is_dir() and os.access(folder, os.W_OK)
