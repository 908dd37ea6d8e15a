import pytest

from anomalib_ot.offline import offline_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A backbone with ImageNet weights that needs no download."""
    return offline_backbone(tmp_path_factory.mktemp("backbones"))
