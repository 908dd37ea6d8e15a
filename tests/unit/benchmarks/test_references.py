"""The reference detectors, compared with slow implementations in numpy and with anomalib's AnomalyDINO."""

import numpy as np
import pytest
import torch
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from sklearn.decomposition import PCA

from benchmarks import references
from benchmarks.references import NearestCell, Subspace, top_mean


@pytest.fixture
def training():
    # Four strong directions among eight, so that the subspace is a proper one.
    scale = torch.tensor([5.0, 4.0, 3.0, 2.0, 0.1, 0.1, 0.1, 0.1])
    return torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(0)) * scale[:, None, None] + 1


@pytest.fixture
def queries():
    return 2 * torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(1))


def cells(features):
    return [features[n, :, i, j].double().numpy() for n, i, j in np.ndindex(len(features), 4, 5)]


def nearest(training, queries):
    distances = []
    for query in cells(queries):
        cosines = [np.dot(query, cell) / np.sqrt(np.dot(query, query) * np.dot(cell, cell)) for cell in cells(training)]
        distances.append(1 - max(cosines))
    return np.reshape(distances, (len(queries), 4, 5))


@pytest.mark.parametrize("block", [7, 1000])
def test_nearest_cell_is_the_smallest_cosine_distance_of_all_pairs(training, queries, block, monkeypatch):
    monkeypatch.setattr(references, "_BLOCK", block)
    found = NearestCell(training)(queries)
    assert np.allclose(found, nearest(training, queries), atol=1e-6)
    assert torch.allclose(NearestCell(training)(training), torch.zeros(3, 4, 5), atol=1e-6)


@pytest.mark.parametrize("variance", [0.5, 0.99, 0.9999])
def test_subspace_residual_is_the_error_of_a_reconstruction_from_principal_components(training, queries, variance):
    pca = PCA(variance, svd_solver="full").fit(np.stack(cells(training)))
    given = np.stack(cells(queries))
    errors = np.square(given - pca.inverse_transform(pca.transform(given))).sum(1)
    subspace = Subspace(training, variance)
    assert subspace.directions.shape == (8, pca.n_components_)
    assert np.allclose(subspace(queries), errors.reshape(2, 4, 5), rtol=1e-5)


def test_subspace_of_all_variance_leaves_no_residual(training, queries):
    assert torch.allclose(Subspace(training, 1.0)(queries), torch.zeros(2, 4, 5), atol=1e-9)


def test_constant_channels_do_not_change_the_subspace(training, queries):
    constant = torch.ones(1, 1, 4, 5)
    more = [torch.cat([each, constant.expand(len(each), -1, -1, -1)], dim=1) for each in (training, queries)]
    assert torch.allclose(Subspace(more[0])(more[1]), Subspace(training)(queries), rtol=1e-5)


def test_image_score_is_the_mean_of_the_highest_share():
    maps = torch.arange(400.0).view(2, 10, 20)
    assert top_mean(maps).tolist() == [198.5, 398.5]
    assert top_mean(maps[:, :2, :3]).tolist() == [22.0, 222.0]


@pytest.mark.parametrize("side", [5, 14, 28])
def test_image_score_is_that_of_anomalib(side):
    maps = torch.rand(2, side, side, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_mean(maps), AnomalyDINOModel.mean_top1p(maps.flatten(1))[:, 0])
