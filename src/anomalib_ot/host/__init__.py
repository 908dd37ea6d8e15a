"""The door to the host: what the models share of training, checkpoints and registration.

These modules use internals of anomalib and Lightning, for which there is no public way:

- ``registration``: ``anomalib.models.ALLOWED_MODULES`` and ``__all__``.
- ``feature_cache``: ``trainer.fit_loop._data_source``, to train on features instead of images.
- ``finishing``: ``trainer.fit_loop._can_stop_early``, ``trainer.fit_loop.epoch_loop._skip_next_val`` and
  ``trainer._signal_connector``, to finish and validate a model once, however its training ends.
- ``checkpoints``, ``held_out`` and ``run_folder``: ``LightningModule._trainer``, which may be missing, and
  ``strategy.checkpoint_io``.
- ``asked_post_processing``: the frame of ``Engine.export``, which drops the model that it is given.

Outside, ``features.backbones`` listens to the logger ``timm.models._builder``, and torch models override
``nn.Module._apply``.
"""

from anomalib_ot.host.versions import require_versions

# Before anything that a wrong version would fail in.
require_versions()

# Executing anomalib's models registers ours, which must not happen while a module of this package is half imported.
import anomalib.models  # noqa: E402, F401
