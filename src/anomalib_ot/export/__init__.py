"""Checked export to torch, ONNX and OpenVINO.

A model of this package exports through the methods of :class:`~anomalib_ot.export.checked.CheckedExport`. They call the
functions of :mod:`anomalib_ot.export.exporters`, which write, check and publish the files.
"""

# First: it executes anomalib's models and so registers ours, which must not happen in the middle of a module here.
import anomalib_ot.host  # noqa: F401
