"""The interface of views. Each model declares its views in its package ``views``, in two dictionaries.

``PICTURE_VIEWS`` contains the views of an image, ``MODEL_VIEWS`` those of the model. Both map names to :class:`View`.
The Lightning model names the package in its class attribute ``views``, so that training does not import Matplotlib.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from anomalib.models.components import AnomalibModule
from matplotlib.figure import Figure

from .data import Data, Items, paths_of
from .pictures import Picture, pictures_of


class Subject:
    """A fitted model, and the images of its views.

    Args:
        model: A fitted model of this package.
        data: The images.
        seed: Seed of random choices.
        pixel: Pixel that a view explains, from the left and from the top of the model's input; by default the highest
            pixel of the map.
    """

    def __init__(
        self, model: AnomalibModule, data: Data, seed: int = 0, pixel: tuple[float, float] | None = None
    ) -> None:
        self.model = model.eval()
        # Typed as Any, because the views of a model depend on its class.
        self.torch_model: Any = model.model
        self.data = data
        self.seed = seed
        self.pixel = pixel
        self._found: dict[Callable[[Subject], Any], Any] = {}

    def prepared(self, items: Items) -> Iterator[Picture]:
        """Prepare images for the model, one by one."""
        # Iteration over a data set of torch does not end by itself.
        return pictures_of(self.model, (items[index] for index in range(len(items))))

    def once(self, find: "Callable[[Subject], Any]") -> Any:
        """The result of a function for this subject. It is computed once and shared by all views.

        Args:
            find: A module-level function, not one that is created for the call.

        Returns:
            Its result.
        """
        if find not in self._found:
            self._found[find] = find(self)
        return self._found[find]

    @cached_property
    def training_paths(self) -> set[str]:
        """Paths of the training images."""
        return {*paths_of(self.data.training)}


@dataclass(frozen=True)
class View:
    """A kind of figure.

    Args:
        about: Description of the view for new users.
        draw: Returns the figures by file name. For an image, it takes the subject and the image. For the model, it
            takes the subject, the shown images, and the folder, where it may write other files.
        missing: Returns the reason why the view cannot be drawn; empty if it can.
    """

    about: str
    draw: Callable[..., dict[str, Figure]]
    missing: Callable[[Subject], str] = lambda _: ""


def no_training(subject: Subject) -> str:
    """The reason if the training images are missing; otherwise empty."""
    return "" if subject.data.training else "the training images are unknown; give the data module as data"
