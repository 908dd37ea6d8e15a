"""From pixels to whitened feature maps: backbones and their weights, extraction, storage, and the anomaly map."""

# Executing anomalib's models registers ours, which must not happen while a module of this package is half imported.
import anomalib.models  # noqa: F401
