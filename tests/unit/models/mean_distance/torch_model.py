"""The torch model: features, what is learned of them, and scores."""

from anomalib.data import InferenceBatch
from torch import nn, zeros

from anomalib_ot.features.anomaly_map import AnomalyMapGenerator
from anomalib_ot.features.backbones import prepare_extractor
from anomalib_ot.features.extraction import extract_by_parts, full_precision


class MeanDistanceModel(nn.Module):
    """Scores each cell by the distance of its features to their mean over the training images."""

    def __init__(self, settings):
        super().__init__()
        self.tiler = None
        (self.layer,) = settings.layer_names
        self.feature_extractor = prepare_extractor(settings.backbone, [self.layer], settings.pre_trained)
        self.anomaly_map_generator = AnomalyMapGenerator(settings.smoothing)
        # What is learned is a buffer, so that checkpoints hold it.
        self.register_buffer("mean", zeros(self.feature_extractor.out_dims[0]))

    def extract(self, images):
        return extract_by_parts(self.feature_extractor, images)[self.layer].float()

    def contributions(self, images):
        features = self.extract(images)
        with full_precision(features):
            distances = (features - self.mean[:, None, None]).square().mean(1, keepdim=True).sqrt()
        return {self.layer: self.anomaly_map_generator([distances], images.shape[-2:])}

    def forward(self, images):
        if self.training:
            return self.extract(images)
        anomaly_map = self.contributions(images)[self.layer]
        return InferenceBatch(pred_score=anomaly_map.flatten(1).amax(1), anomaly_map=anomaly_map)
