"""Classes and their settings by name."""

from argparse import ArgumentError

import pytest
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule

from anomalib_ot.host.class_paths import class_of, create

ASSEMBLY = {"class_path": "Assembly", "init_args": {"n_train": 1}}


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        (AnomalibModule, {"class_path": "Pradot", "init_args": {"smoothing": None}}, "Pradot must have a smoothing"),
        (
            AnomalibDataModule,
            {"class_path": "FewShot", "init_args": {"datamodule": {**ASSEMBLY, "init_args": {"seed": None}}}},
            "Assembly must have a seed, not null; leave it out for its default",
        ),
    ],
)
@pytest.mark.parametrize("function", [create, class_of])
def test_null_is_refused_where_it_has_no_meaning(function, kind, config, reason):
    with pytest.raises(ArgumentError, match=reason):
        function(kind, config)


class Untyped(AnomalibDataModule):
    """Has arguments without types."""

    def __init__(self, seed=1, size: "int | None" = 2):
        """Accept anything."""


def test_null_is_accepted_for_an_argument_without_a_known_type():
    config = {"class_path": f"{__name__}.Untyped", "init_args": {"seed": None, "size": None}}
    assert class_of(AnomalibDataModule, config).__name__ == "Untyped"


def test_null_is_accepted_where_it_has_a_meaning():
    config = {"class_path": "Assembly", "init_args": {"augmentations": None, "val_split_ratio": 0.5}}
    assert class_of(AnomalibDataModule, config).__name__ == "Assembly"
