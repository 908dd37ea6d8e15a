"""The Lightning model: arguments, what a checkpoint decides of them, and training."""

from anomalib.models.components import AnomalibModule, MemoryBankMixin
from torch import cat, zeros

from anomalib_ot.host.checkpoint_rules import CheckpointRules
from anomalib_ot.host.gradient_free import GradientFree
from anomalib_ot.host.held_out import HoldsOut
from anomalib_ot.host.seeding import Seeded
from anomalib_ot.models.detector import Detector

from .settings import MeanDistanceSettings
from .torch_model import MeanDistanceModel


class MeanDistance(Detector, Seeded, HoldsOut, GradientFree, MemoryBankMixin, AnomalibModule):
    """Anomaly detection by the distance to the mean feature."""

    torch_model = MeanDistanceModel
    views = "mean_distance.views"
    checkpoint_rules = CheckpointRules(MeanDistanceSettings)
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
        self.settings = settings = MeanDistanceSettings.of(locals())
        # The host stores the arguments in checkpoints as they are here: names, not paths, and no None.
        backbone, layers, image_size = settings.backbone, settings.layers, settings.image_size
        super().__init__(**components)
        self._features = []

    def training_step(self, batch, *_):
        self._features.append(self.model(batch.image).detach())
        return zeros((), requires_grad=True, device=self.device)

    def fit(self):
        self.model.mean = cat(self._features).mean((0, 2, 3))
        self._features = []
