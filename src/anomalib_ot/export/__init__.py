"""Checked export to torch, ONNX and OpenVINO."""

# Executing anomalib's models registers ours, which must not happen while a module of this package is half imported.
import anomalib.models  # noqa: F401
