"""The models that are compared."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule

from anomalib_ot.comparison.defaults import defaults_for
from anomalib_ot.features.backbones import backbone_name
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.host.class_paths import class_of, create


@dataclass(frozen=True)
class Candidate:
    """A model at an image size.

    Attributes:
        name: Its label.
        class_path: Class of the Lightning model.
        init_args: Its arguments, except for the backbone and what follows from it.
        image_size: Height and width in pixels.
    """

    name: str
    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] = (224, 224)

    @property
    def model(self) -> str:
        """Name of the model, without the image size."""
        return self.name.partition(" at ")[0]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Candidate":
        """A candidate from the values of :meth:`to_dict`, which may have been converted to JSON and back."""
        return cls(**{**values, "image_size": tuple(values["image_size"])})

    def to_dict(self) -> dict[str, Any]:
        """The candidate as plain values."""
        return asdict(self)

    def config(self, backbone: str | Path) -> dict[str, Any]:
        """``class_path`` and ``init_args`` with a backbone, and with the layers that suit it.

        Args:
            backbone: As in :func:`~anomalib_ot.features.backbones.backbone_name`.

        Returns:
            The configuration, without the pre-processor, which defines the image size of anomalib's models.
        """
        given = {"backbone": backbone_name(backbone), **self.init_args}
        kind = class_of(AnomalibModule, {"class_path": self.class_path, "init_args": given})
        own = {name: each.value for name, each in defaults_for(kind, given, self.image_size).items()}
        return {"class_path": self.class_path, "init_args": {**given, **own}}

    def create(self, backbone: str | Path, **init_args: Any) -> AnomalibModule:
        """A new Lightning model that resizes to the image size and normalises as the backbone needs.

        Args:
            backbone: As for :meth:`config`.
            **init_args: Further arguments of the class.
        """
        config = self.config(backbone)
        shared = {"pre_processor": resize_and_normalize(self.image_size, backbone), **init_args}
        return create(AnomalibModule, {**config, "init_args": {**config["init_args"], **shared}})

    def untrained(self, backbone: str | Path) -> AnomalibModule:
        """A new Lightning model without the weights of the backbone, to be fitted on features."""
        return self.create(backbone, pre_trained=False, evaluator=False, visualizer=False)


_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Duo": ("anomalib_ot.Duo", {}),
    "Pradot": ("anomalib_ot.Pradot", {}),
    "WtFlow": ("anomalib_ot.WtFlow", {}),
    "PaDiM": ("anomalib.models.Padim", {}),
    # A larger coreset takes minutes on two cores.
    "PatchCore": ("anomalib.models.Patchcore", {"coreset_sampling_ratio": 0.01}),
}
_SIDES = (224, 336)

CANDIDATES = tuple(
    Candidate(f"{name} at {side} px", class_path, init_args, (side, side))
    for side in _SIDES
    for name, (class_path, init_args) in _MODELS.items()
)
"""The candidates. The first is the default of ``anomalib-ot fit``, at its own image size."""
