"""The models that are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule

from anomalib_ot.comparison.defaults import defaults_for
from anomalib_ot.features.backbone_defaults import default_image_size
from anomalib_ot.features.backbones import backbone_name
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.host.class_paths import class_of, create
from anomalib_ot.settings import require


@dataclass(frozen=True)
class Candidate:
    """A model at an image size on a backbone.

    Attributes:
        name: Its label, which does not count when candidates are compared.
        class_path: Class of the Lightning model.
        init_args: Its arguments, except for the backbone and what follows from it.
        image_size: Height and width in pixels.
        backbone: Name from :func:`~anomalib_ot.features.backbones.backbone_name`; empty until it is chosen, see
            :func:`on_backbones`.
    """

    name: str = field(compare=False)
    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] = (224, 224)
    backbone: str = ""

    @property
    def model(self) -> str:
        """Name of the model, without the image size."""
        return self.name.partition(" at ")[0]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Candidate":
        """A candidate from its values, which may have been converted to JSON and back."""
        return cls(**{**values, "image_size": tuple(values["image_size"])})

    def on(self, backbone: str | Path) -> "Candidate":
        """The same candidate on a backbone, as in :func:`~anomalib_ot.features.backbones.backbone_name`."""
        return replace(self, backbone=backbone_name(backbone))

    def config(self) -> dict[str, Any]:
        """``class_path`` and ``init_args`` with the backbone, and with the layers that suit it.

        Returns:
            The configuration, without the pre-processor, which defines the image size of anomalib's models.
        """
        given = {"backbone": self.backbone, **self.init_args}
        kind = class_of(AnomalibModule, {"class_path": self.class_path, "init_args": given})
        own = {name: each.value for name, each in defaults_for(kind, given, self.image_size).items()}
        return {"class_path": self.class_path, "init_args": {**given, **own}}

    def create(self, **init_args: Any) -> AnomalibModule:
        """A new Lightning model that resizes to the image size and normalises as the backbone needs.

        Args:
            **init_args: Further arguments of the class.
        """
        config = self.config()
        shared = {"pre_processor": resize_and_normalize(self.image_size, self.backbone), **init_args}
        return create(AnomalibModule, {**config, "init_args": {**config["init_args"], **shared}})

    def untrained(self) -> AnomalibModule:
        """A new Lightning model without the weights of the backbone, to be fitted on features."""
        return self.create(pre_trained=False, evaluator=False, visualizer=False)


_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Duo": ("anomalib_ot.Duo", {}),
    "Pradot": ("anomalib_ot.Pradot", {}),
    "WtFlow": ("anomalib_ot.WtFlow", {}),
    "PaDiM": ("anomalib.models.Padim", {}),
    # A larger coreset takes minutes on two cores.
    "PatchCore": ("anomalib.models.Patchcore", {"coreset_sampling_ratio": 0.01}),
}
_SIDES = (224, 336)


def _label(model: str, size: tuple[int, int]) -> str:
    height, width = size
    return f"{model} at {height} px" if height == width else f"{model} at {height} x {width} px"


CANDIDATES = tuple(
    Candidate(_label(name, (side, side)), class_path, init_args, (side, side))
    for side in _SIDES
    for name, (class_path, init_args) in _MODELS.items()
)
"""The candidates, without a backbone. The first is the default of ``anomalib-ot fit``, at its own image size."""


def on_backbones(candidates: Sequence[Candidate], backbones: Sequence[str | Path]) -> list[Candidate]:
    """The candidates on each of some backbones, those on the first backbone first.

    Args:
        candidates: The candidates, named by model and image size.
        backbones: The backbones, as in :func:`~anomalib_ot.features.backbones.backbone_name`, each once.

    Returns:
        The candidates at the image sizes that the backbones take, see
        :func:`~anomalib_ot.features.backbone_defaults.default_image_size`: of a network of one size, each model once.
        With several backbones, the names have that of the backbone too.

    Raises:
        ValueError: If there are no backbones, or one is repeated or unknown, or its configuration is damaged.
        FileNotFoundError: If a local folder lacks its configuration.
        BackboneError: If a configuration cannot be downloaded.
    """
    names = [backbone_name(each) for each in backbones]
    require(0 < len({*names}) == len(names), "backbones", "at least one, each once", names)
    labels = [Path(name.removeprefix("local-dir:")).name for name in names]
    # Folders of the same name.
    labels = labels if len({*labels}) == len(labels) else names
    found: dict[str, Candidate] = {}
    for backbone, label in zip(names, labels, strict=True):
        size_on = cache(partial(default_image_size, backbone))
        where = f" on {label}" if len(names) > 1 else ""
        for candidate in candidates:
            size = size_on(candidate.image_size)
            name = candidate.name if size == candidate.image_size else _label(candidate.model, size)
            own = replace(candidate, name=name + where, image_size=size, backbone=backbone)
            found.setdefault(own.name, own)
    return [*found.values()]
