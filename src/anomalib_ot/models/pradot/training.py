"""Training of a Pradot without Lightning's trainer."""

from collections.abc import Callable, Iterable, Iterator

from anomalib_ot.features.extraction import FeatureMaps

from .torch_model import PradotModel


def fit_prototypes(
    model: PradotModel, in_order: Callable[[], Iterator[FeatureMaps]], epochs: Iterable[Iterable[FeatureMaps]]
) -> None:
    """Fit a new model to features of training images.

    Args:
        model: The model.
        in_order: Gives batches of feature maps (B, D, H, W) of each layer, in the order of the images.
        epochs: The batches of each epoch.
    """
    model.fit_whitening(in_order())
    model.initialise(next(in_order()))
    for epoch in epochs:
        for batch in epoch:
            model.update(batch)
    model.finish(lambda _: in_order())
    model.workspace.clear()
