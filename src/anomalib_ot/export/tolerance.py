"""Limits by which an exported model may differ from the model in torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Share of the maps' range by which single precision may move a threshold.
_ROUNDING = 1e-5


class ExportError(RuntimeError):
    """The exported model differs from the model in torch.

    Args:
        message: The message.
        broken: Descriptions of the broken limits.
    """

    def __init__(self, message: str, broken: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.broken = tuple(broken)


@dataclass(frozen=True)
class SameValues:
    """Tolerance for exports that must give the same maps and scores.

    Args:
        largest_difference: Limit for maps and for scores, as a share of the range of torch's maps.
    """

    largest_difference: float

    def broken_by(self, measured: Mapping[str, Any], reference: Mapping[str, float | None]) -> list[str]:
        """Describe what is out of tolerance.

        Args:
            measured: Result of :func:`~anomalib_ot.export.parity.compare` for the exported model.
            reference: Unused.

        Returns:
            A description of each broken limit.
        """
        del reference
        return _changed_labels(measured, self.largest_difference) + [
            f"the largest {name.replace('_', ' ')} is {measured[name]:.1e} of the maps' range, more than "
            f"{self.largest_difference}"
            for name in ("map_difference", "score_difference", "verdict_difference")
            # NaN is out of tolerance too.
            if not measured.get(name, 0.0) <= self.largest_difference
        ]


@dataclass(frozen=True)
class SameOrder:
    """Tolerance for exports that must rank anomalies about the same, with any values.

    A label or a pixel of a mask may differ from torch's as far as the largest difference of maps and scores explains.

    Args:
        auroc_fall: Largest fall of the image and the pixel AUROC, if they can be computed.
        rank_correlation: Smallest rank correlation of the maps' pixels, if neither can be computed.
    """

    auroc_fall: float = 0.002
    rank_correlation: float = 0.99

    def broken_by(self, measured: Mapping[str, Any], reference: Mapping[str, float | None]) -> list[str]:
        """Describe what is out of tolerance.

        Args:
            measured: Result of :func:`~anomalib_ot.export.parity.compare` for the exported model.
            reference: Its result for the model in torch.

        Returns:
            A description of each broken limit.
        """
        changed = _changed_labels(measured, max(measured["map_difference"], measured["score_difference"]) + _ROUNDING)
        falls = {name: before - measured[name] for name, before in reference.items() if before is not None}
        if not falls and not (measured["rank_correlation"] or 0) >= self.rank_correlation:
            low = (
                f"the maps' rank correlation is {measured['rank_correlation'] or 0:.4f}, below {self.rank_correlation}"
            )
            return [*changed, low]
        return changed + [
            f"the {name.replace('_', ' ')} falls by {fall:.4f}, more than {self.auroc_fall}"
            for name, fall in falls.items()
            if fall > self.auroc_fall
        ]


def _changed_labels(measured: Mapping[str, Any], limit: float) -> list[str]:
    """Describe labels and masks that differ from torch's farther from the threshold than a share of the maps' range."""
    names = {
        "label_difference": "labels of {changed_labels} images",
        "mask_difference": "{changed_pixels} pixels of masks",
    }
    return [
        f"{what.format_map(measured)} differ, up to {measured[name]:.1e} of the maps' range from the threshold, more "
        f"than {limit:.1e}"
        for name, what in names.items()
        if not measured.get(name, 0.0) <= limit
    ]
