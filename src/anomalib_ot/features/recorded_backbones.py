"""Records of backbones in checkpoints, so that loading one needs neither the backbone's folder nor a connection."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timm.models import load_model_config_from_hf, parse_model_name

from .backbones import backbone_name


def record_backbone(backbone: str | Path) -> dict[str, Any]:
    """Record the architecture of a backbone.

    Args:
        backbone: A backbone that :func:`~anomalib_ot.features.backbones.create_extractor` accepts.

    Returns:
        Plain data with ``name``, the backbone, and ``config``, the network's configuration from its folder or
        repository; None for a network in timm's registry.
    """
    backbone = backbone_name(backbone)
    source, name = parse_model_name(backbone)
    config = None
    if source == "local-dir":
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    elif source == "hf-hub":
        weights, architecture, arguments = load_model_config_from_hf(name)
        config = {"architecture": architecture, "pretrained_cfg": weights, "model_args": arguments or {}}
    return {"name": backbone, "config": config}


@contextmanager
def recorded_backbone(record: dict[str, Any]) -> Iterator[str]:
    """Make a recorded backbone available, without weights.

    Args:
        record: Result of :func:`record_backbone`.

    Yields:
        A backbone for ``pre_trained=False``, valid within the context only.
    """
    if record["config"] is None:
        yield record["name"]
        return
    with TemporaryDirectory(prefix="backbone-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(record["config"]), encoding="utf-8")
        yield f"local-dir:{folder}"
