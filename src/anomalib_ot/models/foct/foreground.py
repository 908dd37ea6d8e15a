"""Which cells of an image show the product, and which the background."""

import logging
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .settings import FoctSettings, Prompt

logger = logging.getLogger(__name__)

# A smaller share of the cells is no foreground; if all but a smaller share are foreground, there is no background.
_LEAST = 0.01
_EMBEDDINGS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_DOWNLOAD = "https://github.com/facebookresearch/segment-anything#model-checkpoints"


class Foreground(ABC):
    """Finds the foreground of the images of a support set."""

    def load(self) -> None:  # noqa: B027 - most load nothing
        """Load weights, if any are needed, so that missing ones are reported early."""

    @abstractmethod
    def masks(self, images: Tensor, features: Tensor) -> Tensor:
        """Find the foreground.

        Args:
            images: (K, 3, h, w), RGB in [0, 1].
            features: Their features, (K, C, H, W).

        Returns:
            (K, H, W), boolean.
        """

    def __call__(self, images: Tensor, features: Tensor) -> Tensor:
        """Find the foreground. If nearly all or no cells are found, all count as foreground, and a log reports it.

        Args:
            images: (K, 3, h, w), RGB in [0, 1].
            features: Their features, (K, C, H, W).

        Returns:
            (K, H, W), boolean.

        Raises:
            ValueError: If the masks do not have the size of the features.
        """
        masks = self.masks(images, features)
        expected = (features.shape[0], *features.shape[-2:])
        if tuple(masks.shape) != expected:
            msg = f"the foreground masks have the shape {tuple(masks.shape)}, but the features need {expected}"
            raise ValueError(msg)
        share = masks.float().mean((-2, -1))
        unclear = (share < _LEAST) | (share > 1 - _LEAST)
        if unclear.any():
            logger.warning(
                "No foreground found in %d of %d support images; there, all cells count as foreground.",
                int(unclear.sum()),
                len(masks),
            )
        return masks | unclear[:, None, None]


class Everything(Foreground):
    """Marks every cell as foreground."""

    def __call__(self, images: Tensor, features: Tensor) -> Tensor:
        """All true, without the log of :meth:`Foreground.__call__`."""
        return self.masks(images, features)

    def masks(self, images: Tensor, features: Tensor) -> Tensor:
        """All true; see :meth:`Foreground.masks`."""
        del images
        return torch.ones(features[:, 0].shape, dtype=torch.bool, device=features.device)


class PrincipalComponent(Foreground):
    """Splits the cells at Otsu's threshold of their first principal component, which needs no further weights.

    Features mostly vary in the direction that separates product and background. The side with less of the images'
    border is the foreground.
    """

    def masks(self, images: Tensor, features: Tensor) -> Tensor:
        """One principal component for all images; see :meth:`Foreground.masks`."""
        del images
        cells = features.movedim(1, -1)
        flat = cells.flatten(0, -2)
        centred = flat - flat.mean(0)
        direction = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -1]
        component = (centred @ direction).unflatten(0, cells.shape[:-1])
        values = component.float().flatten().cpu().numpy()
        if np.ptp(values) == 0:
            return torch.zeros_like(component, dtype=torch.bool)
        split = float(threshold_otsu(values))
        # Otsu's threshold is a bin of the lower class. The middle between the means of both classes is farther from
        # each.
        masks = component > (values[values <= split].mean() + values[values > split].mean()) / 2
        border = torch.cat([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], dim=1)
        return ~masks if border.float().mean() > masks.float().mean() else masks


class SegmentAnything(Foreground):
    """Segments the product with SAM (Kirillov et al., 2023, arXiv 2304.02643) and one prompt at the centre.

    SAM is in memory only while it is needed. A fitted model runs and is saved without it.

    Args:
        checkpoint: File of SAM's weights, ViT-B, L or H.
        prompt: ``box``, the image without a margin of a twentieth, or ``point``, its centre.
    """

    def __init__(self, checkpoint: Path | str | None, prompt: Prompt = "box") -> None:
        self.checkpoint = checkpoint
        self.prompt = prompt
        self._predictor: Any = None

    def load(self) -> None:
        """Load SAM.

        Raises:
            ModuleNotFoundError: If segment-anything is not installed.
            FileNotFoundError: If the checkpoint does not exist.
            ValueError: If the checkpoint is not one of SAM.
        """
        if find_spec("segment_anything") is None:
            msg = 'segment-anything is not installed; run: pip install "anomalib-ot[sam]"'
            raise ModuleNotFoundError(msg)
        if self.checkpoint is None or not Path(self.checkpoint).is_file():
            msg = f"foreground='sam' needs a checkpoint, not {self.checkpoint}; download one: {_DOWNLOAD}"
            raise FileNotFoundError(msg)
        self._predictor = _load_predictor(Path(self.checkpoint))

    def masks(self, images: Tensor, features: Tensor) -> Tensor:
        """The mask with SAM's highest confidence for each image; see :meth:`Foreground.masks`."""
        height, width = images.shape[-2:]
        if self.prompt == "box":
            margin = np.array([width, height, width, height]) / 20
            prompt: dict[str, Any] = {"box": np.array([0, 0, width, height]) + margin * [1, 1, -1, -1]}
        else:
            prompt = {"point_coords": np.array([[width / 2, height / 2]]), "point_labels": np.array([1])}
        found = []
        if self._predictor is None:
            self.load()
        self._predictor.model.to(images.device)
        for image in images:
            pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
            self._predictor.set_image(pixels)
            masks, trust, _ = self._predictor.predict(**prompt, multimask_output=True)
            found.append(torch.from_numpy(masks[int(trust.argmax())]))
        self._predictor = None
        pixels = torch.stack(found)[:, None].float()
        height, width = features.shape[-2:]
        return F.adaptive_avg_pool2d(pixels, (height, width))[:, 0].to(features.device) > 0.5  # noqa: PLR2004


def create_foreground(settings: FoctSettings) -> Foreground:
    """Create the foreground finder that the settings name."""
    if settings.foreground == "sam":
        return SegmentAnything(settings.sam_checkpoint, settings.sam_prompt)
    return PrincipalComponent() if settings.foreground == "pca" else Everything()


def _load_predictor(checkpoint: Path) -> Any:
    """SAM's predictor, with the architecture that matches the checkpoint's tensors."""
    from segment_anything import SamPredictor, sam_model_registry  # noqa: PLC0415 - optional

    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
        channels = weights["image_encoder.pos_embed"].shape[-1]
    except Exception as error:
        msg = f"{checkpoint} is not a checkpoint of SAM; download one of ViT-B, L or H: {_DOWNLOAD}"
        raise ValueError(msg) from error
    architecture = _EMBEDDINGS.get(channels)
    if architecture is None:
        known = ", ".join(f"{name} ({size})" for size, name in _EMBEDDINGS.items())
        msg = f"{checkpoint} has {channels} channels, expected those of {known}; download one: {_DOWNLOAD}"
        raise ValueError(msg)
    model = sam_model_registry[architecture]()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        msg = f"{checkpoint} does not fit SAM's {architecture}: {error}"
        raise ValueError(msg) from error
    return SamPredictor(model.eval())
