"""The base of the Lightning models: what their constructors and their parts for scoring have in common."""

from pathlib import Path
from typing import Any, ClassVar

from anomalib import LearningType
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.export.checked import CheckedExport
from anomalib_ot.features.backbone_defaults import default_image_size
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.host.checkpoints import SafeCheckpoints
from anomalib_ot.host.seeding import own_seed
from anomalib_ot.host.verdicts import Verdicts


class Detector(CheckedExport, Verdicts, SafeCheckpoints):
    """First base of a Lightning model of this package; the last one is anomalib's ``AnomalibModule``.

    The constructor of a model sets ``settings`` and calls this one, which creates the torch model. The host stores the
    arguments of a model's constructor in checkpoints, as they are when the constructor of the base is called, and must
    find no others: the settings are therefore no argument here.

    Args:
        pre_processor: Pre-processor; True for the default, False for none.
        post_processor: Post-processor; True for the default, False for none.
        evaluator: Evaluator; True for the default, False for none.
        visualizer: Visualizer; True for the default, False for none.

    Attributes:
        torch_model: Class of the torch model, which takes the settings, and optionally the feature extractor of another
            model.
        views: Name of the package of the model's views.
        model: The torch model.
    """

    torch_model: ClassVar[type[nn.Module]]
    views: ClassVar[str]
    model: nn.Module

    def __init__(
        self,
        pre_processor: nn.Module | bool = True,
        post_processor: ConformalPostProcessor | PostProcessor | nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        backbone = str(self.settings.backbone)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(self.settings.image_size, backbone)
        super().__init__(  # type: ignore[call-arg]  # the host's model follows in the order of bases
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.record_backbone(backbone)
        with own_seed(self.settings.seed):
            self.model = self.torch_model(self.settings)

    @property
    def learning_type(self) -> LearningType:
        """One-class, as the models learn from normal images. anomalib does not fit a model of the type few-shot."""
        return LearningType.ONE_CLASS

    def configure_post_processor(self) -> ConformalPostProcessor:
        """A threshold that promises a rate of false alarms, from good images alone."""
        return ConformalPostProcessor()

    @classmethod
    def configure_pre_processor(
        cls, image_size: tuple[int, int] | None = None, backbone: str | Path | None = None
    ) -> PreProcessor:
        """Resize and normalise with the backbone's own mean and standard deviation.

        Args:
            image_size: Height and width, in pixels. By default the model's usual size, where the backbone accepts it.
            backbone: Backbone whose data configuration to use; by default the model's.

        Returns:
            The pre-processor.
        """
        settings: Any = cls.checkpoint_rules.settings
        backbone = backbone or settings.backbone
        return resize_and_normalize(image_size or default_image_size(backbone, settings.usual_image_size), backbone)
