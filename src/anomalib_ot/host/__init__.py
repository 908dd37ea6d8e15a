"""The door to the host: what the models share of training, checkpoints and registration.

Modules of this package use internals of anomalib and Lightning that have no public interface. One test for each in
``tests/unit/host/test_host_internals.py`` fails if a new release changes it.

Lightning:

- ``trainer.fit_loop._data_source``: epochs run over cached features instead of images (``feature_cache``).
- ``PL_GLOBAL_SEED``, an environment variable: the user's seed (``seeding``).
- ``trainer.fit_loop._can_stop_early``: whether ``should_stop`` ends the training now (``finishing``).
- ``trainer.fit_loop.epoch_loop._skip_next_val`` and ``trainer.fit_loop.epoch_loop.val_loop``: validation runs once,
  after the model is finished (``finishing``).
- ``trainer._signal_connector``: SIGTERM ends the training after the model is finished (``finishing``).
- ``trainer._val_check_time_interval``: whether the user set when to validate (``finishing``).
- ``LightningModule._trainer``: None without a trainer, where the public property raises (``checkpoints``, ``held_out``,
  ``run_folder``).

anomalib:

- ``anomalib.models.ALLOWED_MODULES`` and ``__all__``: models are found by class path (``registration``).
- ``strategy.checkpoint_io``, an ``AnomalibCheckpointIO``: files are checked before the trainer loads them
  (``checkpoints``).
- ``anomalib_pre_processor_config``, a key of checkpoints (``checkpoints``), and ``transform_to_spec``, which raises
  ``ValueError`` for a transform that a checkpoint cannot store (``checkpoint_record``).
- ``MemoryBankMixin._is_fitted``: a new training of Foct starts without its support set (``models.foct``).
- The frame of ``Engine.export``, which replaces the given model by one from the checkpoint (``asked_post_processing``).
- ``PostProcessor.image_min``, ``image_max`` and their like for pixels: the scale of scores (``scale``, ``held_out``).
- ``AnomalibDataModule._is_setup``: a second set-up keeps the split (``checkpoints``, ``held_out``).
- Names that end in ``_dir``, ``_split_mode`` and ``_split_ratio``: settings that decide the split (``splits``).
- ``results``, ``weights/lightning`` and ``images``: folders of the engine (``run_folder``).

Packages below this one, and ``export`` above it, use internals too, as they cannot import this package or do not need
it:

- ``features.backbones``: ``timm.models._builder``, the logger that warns of unused weights.
- ``features.map_extractor``: ``TimmFeatureExtractor._uses_intermediates`` and ``_run_intermediates``.
- ``features.single_precision`` and torch models: ``nn.Module._apply``.
- ``data``: ``_setup``, ``_create_test_split`` and ``_create_val_split`` of ``AnomalibDataModule``.
- ``metrics``: ``_to_sync`` and ``_should_unsync`` of torchmetrics.
- ``decide``: ``_image_threshold``, ``_pixel_threshold``, ``_image_min_max_metric``, ``_pixel_min_max_metric`` and
  ``_checkpoint_config_keys`` of ``PostProcessor``, whose other metrics stay unused.
- ``export``: ``PreProcessor.export_transform``.
"""

from anomalib_ot.host.versions import require_versions

# Before an import fails because of a wrong version.
require_versions()

# Executing anomalib's models registers ours, which must not happen while a module of this package is half imported.
import anomalib.models  # noqa: E402, F401
