"""The only door to the internals of anomalib, Lightning and timm.

What the models share of training, checkpoints and registration.
"""

from anomalib_ot.host.versions import require_versions

# Before anything that a wrong version would fail in.
require_versions()

# Executing anomalib's models registers ours, which must not happen while a module of this package is half imported.
import anomalib.models  # noqa: E402, F401
