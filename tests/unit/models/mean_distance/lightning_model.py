"""The Lightning model: arguments, what a checkpoint decides of them, and training."""

from anomalib import LearningType
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from torch import cat, zeros

from anomalib_ot.export.checked import CheckedExport
from anomalib_ot.features.backbones import backbone_name
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.host.checkpoint_rules import CheckpointRules
from anomalib_ot.host.checkpoints import SafeCheckpoints
from anomalib_ot.host.gradient_free import GradientFree
from anomalib_ot.host.held_out import HoldsOut
from anomalib_ot.host.seeding import Seeded, own_seed
from anomalib_ot.host.verdicts import Verdicts

from .settings import MeanDistanceSettings
from .torch_model import MeanDistanceModel


class MeanDistance(
    CheckedExport, Verdicts, SafeCheckpoints, Seeded, HoldsOut, GradientFree, MemoryBankMixin, AnomalibModule
):
    """Anomaly detection by the distance to the mean feature."""

    views = "mean_distance.views"
    checkpoint_rules = CheckpointRules(MeanDistanceSettings)
    learning_type = LearningType.ONE_CLASS
    trainer_arguments = {"max_epochs": 1, "num_sanity_val_steps": 0}  # noqa: RUF012 - as anomalib's models have it

    def __init__(
        self,
        backbone=MeanDistanceSettings.backbone,
        layers=MeanDistanceSettings.layers,
        pre_trained=MeanDistanceSettings.pre_trained,
        image_size=MeanDistanceSettings.image_size,
        smoothing=MeanDistanceSettings.smoothing,
        seed=MeanDistanceSettings.seed,
        **components,
    ):
        backbone = backbone_name(backbone)
        settings = MeanDistanceSettings.of(locals())
        layers, image_size = settings.layers, settings.image_size
        # The host stores the arguments in checkpoints as they are here.
        components.setdefault("pre_processor", self.configure_pre_processor(image_size, backbone))
        super().__init__(**components)
        self.record_backbone(backbone)
        self.settings = settings
        with own_seed(settings.seed):
            self.model = MeanDistanceModel(settings)
        self._features = []

    @staticmethod
    def configure_pre_processor(image_size=None, backbone="resnet18"):
        return resize_and_normalize(image_size or MeanDistanceSettings.usual_image_size, backbone)

    def training_step(self, batch, *_):
        self._features.append(self.model(batch.image).detach())
        return zeros((), requires_grad=True, device=self.device)

    def fit(self):
        self.model.mean = cat(self._features).mean((0, 2, 3))
        self._features = []
