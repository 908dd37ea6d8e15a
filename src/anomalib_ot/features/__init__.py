"""Features of images: backbones and their weights, extraction, storage, whitening, and the anomaly map."""

# Importing anomalib's models registers ours, which must not happen while a module of this package is partly imported.
import anomalib.models  # noqa: F401
