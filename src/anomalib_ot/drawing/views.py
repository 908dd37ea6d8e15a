"""What a view is. Each model declares its own views in its package ``views``, as two tables by name.

``PICTURE_VIEWS`` has the views of a picture, ``MODEL_VIEWS`` those of the model. Both map names to :class:`View`.
The Lightning model names the package in its class attribute ``views``, so that training imports no Matplotlib.
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
    """A fitted model, and the pictures that its views are drawn from.

    Args:
        model: A fitted model of ours.
        data: The pictures.
        seed: Seed of what is drawn at random.
        pixel: Pixel of a picture that a view explains, from the left and from the top, as the model sees it; by default
            the highest of its map.
    """

    def __init__(
        self, model: AnomalibModule, data: Data, seed: int = 0, pixel: tuple[float, float] | None = None
    ) -> None:
        self.model = model.eval()
        # The views of a model know its class.
        self.torch_model: Any = model.model
        self.data = data
        self.seed = seed
        self.pixel = pixel
        self._found: dict[Callable[[Subject], Any], Any] = {}

    def prepared(self, items: Items) -> Iterator[Picture]:
        """Pictures as the model sees them, one by one."""
        # A data set of torch has no iterator that ends.
        return pictures_of(self.model, (items[index] for index in range(len(items))))

    def once(self, find: "Callable[[Subject], Any]") -> Any:
        """What a function finds for this subject; it is computed once and shared by all views.

        Args:
            find: A function of a module, not one that is made for the call.

        Returns:
            Its result.
        """
        if find not in self._found:
            self._found[find] = find(self)
        return self._found[find]

    @cached_property
    def training_paths(self) -> set[str]:
        """Files of the training pictures."""
        return {*paths_of(self.data.training)}


@dataclass(frozen=True)
class View:
    """A kind of figure.

    Args:
        about: What it shows, for someone who sees it for the first time.
        draw: Draws it, by the name of its files. A view of a picture takes the subject and the picture; one of a model
            the subject, the pictures that are shown and the folder, for what is no figure.
        missing: Says what it lacks to be drawn; empty if nothing.
    """

    about: str
    draw: Callable[..., dict[str, Figure]]
    missing: Callable[[Subject], str] = lambda _: ""


def no_training(subject: Subject) -> str:
    """Says that the training pictures are missing; empty if they are not."""
    return "" if subject.data.training else "the training pictures are not known; give the data module as data"
