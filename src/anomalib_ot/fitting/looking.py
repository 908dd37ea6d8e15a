"""The look at the images before a training: which are used, and which may be bad."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from anomalib_ot.features.backbone_defaults import default_layers
from anomalib_ot.features.backbone_sources import weights_state
from anomalib_ot.features.backbones import layers_of_backbone
from anomalib_ot.features.file_features import FileFeatures
from anomalib_ot.features.image_extractor import ImageExtractor
from anomalib_ot.images.folder import images_in
from anomalib_ot.images.reading import ValueRange
from anomalib_ot.inspection.contamination import Suspect, find_groups, find_suspects
from anomalib_ot.inspection.look import Finding, Inspection, inspect_images
from anomalib_ot.selection import Candidate
from anomalib_ot.selection.choosing import layers_needed
from anomalib_ot.selection.trial_features import SYNTHETIC
from anomalib_ot.synthetic.images import read_reduced

from .steps import Steps

logger = logging.getLogger(__name__)

FEATURES = "features"
_STEP = "the look at the images"
# Stride of the features that show which images are unlike the others.
_STRIDE = 16
# Up to this number of images, the features that the trials need are extracted with them. Those of more images would
# take gigabytes, and the trials need those of a hundred.
_FEW = 1000


@dataclass(frozen=True)
class Look:
    """What a look at the images has found.

    Args:
        inspection: Findings on single images.
        suspects: Images that are unlike the others, the most unusual ones first.
        dropped: Those of them that are left out.
        groups: Groups of images that look like different products; one group if they do not.
    """

    inspection: Inspection
    suspects: list[Suspect]
    dropped: list[Path]
    groups: list[list[Path]]

    @cached_property
    def used(self) -> list[Path]:
        """Images that the model learns from, those included that a model holds out to set its threshold."""
        dropped = {*self.dropped}
        return [path for path in self.inspection.images if path not in dropped]

    @property
    def left_out(self) -> int:
        """Number of images that are left out."""
        return len(self.inspection.left_out) + len(self.dropped)


def look_at(
    images: Path,
    candidates: Sequence[Candidate],
    keep: Sequence[str],
    work: Path,
    seed: int,
    value_range: ValueRange | None = None,
) -> tuple[Look, FileFeatures | None]:
    """Look at the images of a folder, and find those that may be bad.

    Args:
        images: The folder.
        candidates: Candidates of the trials. The features are those of the first one's backbone at its image size.
        keep: Images that are used even if they look bad, by their paths below the folder; ``all`` keeps all of them.
        work: Folder that keeps what is found, so that a repeated call continues.
        seed: Seed of the folds.
        value_range: Values that map to black and white in images with more than 8 bits per channel.

    Returns:
        What is found, and the features; None if they were not extracted, as the folder is as before.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder has too few usable images.
    """
    first = candidates[0]
    seen = {
        # A permission to read changes neither size nor time.
        "images": {str(path): [*state, os.access(path, os.R_OK)] for path, state in images_in(images).items()},
        "backbone": [first.backbone, weights_state(first.backbone), [*first.image_size]],
        "seed": seed,
        "value_range": value_range,
    }
    steps = Steps(work)
    files = None
    found = steps.found(_STEP, seen)
    if found is None:
        logger.info("Looking at the images of %s.", images)
        inspection = inspect_images(images, value_range)
        files, maps = _features(inspection.images, candidates, work, seen, value_range)
        suspects = find_suspects(inspection.images, maps, seed=seed)
        found = _plain(inspection, suspects, find_groups(inspection.images, maps))
        steps.finish(_STEP, seen, found)
    elif (work / FEATURES).is_dir():
        # Those of unfinished trials.
        files, _ = _features([*map(Path, found["images"])], candidates, work, seen, value_range)
    look = _look(found, images, keep)
    for finding in look.inspection.left_out:
        logger.warning("Left out %s: %s", finding.path, finding.detail)
    for path in look.dropped:
        logger.warning("Left out %s: it looks unlike the other images and may be bad. To use it, set keep.", path)
    logger.info("%d images are used.", len(look.used))
    return look, files


def _features(
    paths: Sequence[Path], candidates: Sequence[Candidate], work: Path, seen: Any, value_range: ValueRange | None
) -> tuple[FileFeatures, Tensor]:
    """Features of the images, and the maps (N, D, H, W) that show which are unlike the others."""
    first = candidates[0]
    layer = default_layers(layers_of_backbone(first.backbone), [_STRIDE])[0]
    layers = {layer}
    if len(paths) <= _FEW:
        same = [each for each in candidates if (each.backbone, each.image_size) == (first.backbone, first.image_size)]
        layers |= {*layers_needed(same)}
    extractor = ImageExtractor(first.backbone, first.image_size, sorted(layers), len(paths) + SYNTHETIC)
    files = FileFeatures(extractor, partial(read_reduced, value_range=value_range))
    return files, files.remember(paths, work / FEATURES, seen).features[layer]


def _plain(inspection: Inspection, suspects: Sequence[Suspect], groups: Sequence[Sequence[Path]]) -> dict[str, Any]:
    """What is found as plain values."""
    return {
        "images": [*map(str, inspection.images)],
        "findings": [[str(each.path), each.kind, each.detail] for each in inspection.findings],
        "sizes": [[*size, count] for size, count in inspection.sizes.items()],
        "deep": inspection.deep,
        "folders": [[str(folder), count] for folder, count in inspection.folders.items()],
        "suspects": [[str(each.path), each.score, each.ratio, each.anomaly_map.tolist()] for each in suspects],
        "groups": [[*map(str, group)] for group in groups],
    }


def _look(plain: dict[str, Any], images: Path, keep: Sequence[str]) -> Look:
    """What was found, from plain values. The suspects to keep are not dropped; they may be none."""
    inspection = Inspection(
        images=[*map(Path, plain["images"])],
        findings=[Finding(Path(path), kind, detail) for path, kind, detail in plain["findings"]],
        sizes=Counter({(width, height): count for width, height, count in plain["sizes"]}),
        folders=Counter({Path(folder): count for folder, count in plain["folders"]}),
        deep=plain["deep"],
    )
    suspects = [
        Suspect(Path(path), score, ratio, np.array(values, np.float32))
        for path, score, ratio, values in plain["suspects"]
    ]
    kept = {images / name for name in keep}
    dropped = [] if "all" in keep else [each.path for each in suspects if each.path not in kept]
    return Look(inspection, suspects, dropped, [[*map(Path, group)] for group in plain["groups"]])
