"""Where results go: into the folder of the run that trained the model, not beside it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

# Where the host's engine puts results, unless it is told otherwise, and in a run its checkpoints and pictures.
_DEFAULT_ROOT = Path("results")
_CHECKPOINTS = ("weights", "lightning")
_PICTURES = "images"
_OF_THIS_RUN = {"run_folder", "drawn_in", "raw_scores"}


class RunFolder:
    """Part of a Lightning model whose exports and predictions go to the folder of the run that trained it.

    The host's engine exports a checkpoint to ``results/weights``, where the next model overwrites it, and predicts into
    a folder of its own beside the runs. A folder that is given, as ``export_root``, ``default_root_dir`` or a
    visualizer's ``output_dir``, is obeyed; so is the host's where the checkpoint does not lie in a run, or the run may
    not be written to.

    Attributes:
        run_folder: Folder of the run that trained the model; None where it is not known.
        drawn_in: Folder that the last run's pictures went to, where it was found and not given.
    """

    run_folder: Path | None = None
    drawn_in: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is of this machine and run, which is nobody's who gets an exported file."""
        state = cast("Any", super()).__getstate__()
        return {name: value for name, value in state.items() if name not in _OF_THIS_RUN}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "AnomalibModule":
        """Load a model, as the base does, and note which run it is of."""
        model = cast("type[AnomalibModule]", super()).load_from_checkpoint(checkpoint_path, *args, **kwargs)
        cast("RunFolder", model).run_folder = _run_of(checkpoint_path)
        return model

    def configure_callbacks(self) -> list[Callback]:
        """The host's, and before them, as they draw, one that finds the run's folder."""
        return [_RunFinder(), *cast("Any", super()).configure_callbacks()]

    def pictures_folder(self, trainer: Trainer) -> Path:
        """Where the pictures of a prediction go, or would if any were drawn.

        Args:
            trainer: The trainer that predicts.
        """
        visualizer = _visualizer(trainer)
        if visualizer is not None and visualizer.output_dir is not None:
            return Path(visualizer.output_dir)
        return (self._own_root(trainer) or Path(trainer.default_root_dir)) / _PICTURES

    def own_export_root(self, given: str | Path) -> Path:
        """Where an export goes: the run's folder in the place of the engine's default.

        Args:
            given: The ``export_root``. The engine gives its default as a ``Path``; what somebody types is a text.
        """
        model = cast("AnomalibModule", self)
        defaults = {_DEFAULT_ROOT}
        if model._trainer is not None and self._own_root(model.trainer):  # noqa: SLF001 - as above
            defaults.add(Path(model.trainer.default_root_dir))
        is_default = isinstance(given, Path) and given in defaults
        return self.run_folder if is_default and _is_writable(self.run_folder) else Path(given)  # type: ignore[return-value]  # a folder that is written to is there

    def _own_root(self, trainer: Trainer) -> Path | None:
        """The run's folder, where it takes the place of the trainer's; else None."""
        if not _is_writable(self.run_folder):
            return None
        ours = (_DEFAULT_ROOT / cast("AnomalibModule", self).name).resolve()
        root = Path(trainer.default_root_dir).resolve()
        # A default_root_dir within the default one has the model's name once more.
        is_default = root.is_relative_to(ours) and ours.name not in root.relative_to(ours).parts
        return self.run_folder if is_default else None


class _RunFinder(Callback):
    """Notes which run a model is of, and lets the visualizer draw there, unless somebody has said where."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        pl_module.run_folder = _run_of(Path(folder, "model.ckpt")) if folder else None

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        # A resumed training, in a folder of its own, is tested with the checkpoint that it came from.
        if trainer.ckpt_path and pl_module.run_folder != Path(trainer.default_root_dir):
            pl_module.run_folder = _run_of(trainer.ckpt_path)
        visualizer = _visualizer(trainer)
        if visualizer is not None and visualizer.output_dir in {None, pl_module.drawn_in}:
            # That of an earlier run of the same model was found here, not given.
            visualizer.output_dir = None
            visualizer.output_dir = pl_module.drawn_in = pl_module.pictures_folder(trainer)

    on_predict_start = on_test_start


def _visualizer(trainer: Trainer) -> ImageVisualizer | None:
    """What draws. Where the checkpoint had none, the host takes it from the model, but not from the trainer."""
    return next((each for each in cast("Any", trainer).callbacks if isinstance(each, ImageVisualizer)), None)


def _run_of(checkpoint: str | Path) -> Path | None:
    """Folder of the run that wrote a checkpoint, None where it does not lie as the engine leaves it."""
    folder = Path(checkpoint).parent.resolve()
    return folder.parents[1] if folder.parts[-2:] == _CHECKPOINTS else None


def _is_writable(folder: Path | None) -> bool:
    return folder is not None and folder.is_dir() and os.access(folder, os.W_OK)
