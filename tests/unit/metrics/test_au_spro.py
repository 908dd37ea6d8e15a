import json
from importlib import util
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, Evaluator
from anomalib.metrics.pro import connected_components_cpu
from lightning import LightningModule, Trainer
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import distributed, multiprocessing
from torch.nn.functional import interpolate

from anomalib_ot.data import MVTecLOCOAD
from anomalib_ot.metrics import AUSPRO, PROCurve
from anomalib_ot.metrics.au_spro import _bins

SHARED = Path(__file__).resolve().parents[4] / "shared"
TRAY = SHARED / "data" / "tray" / "breakfast_box"
ORACLES = SHARED / "oracles"
LOGICAL, STRUCTURAL = KINDS = ("logical_anomalies", "structural_anomalies")
SIZE = (24, 32)
# Pixel value: threshold, and whether it is a share of the defect's area.
CONFIG = {255: (1.0, True), 254: (37, False), 253: (0.45, True)}


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def write_category(root, masks, config=CONFIG, good=3, size=SIZE):
    """Write a category whose defects are {image: [(pixel value, mask), ...]}; returns the test images' paths."""
    names = [f"good/{number:03d}" for number in range(good)] + list(masks)
    for name in ("train/good/000", "validation/good/000", *(f"test/{name}" for name in names)):
        save(root / f"{name}.png", np.zeros((*size, 3)))
    for name, defects in masks.items():
        for number, (value, mask) in enumerate(defects):
            save(root / "ground_truth" / name / f"{number:03d}.png", value * mask)
    entries = [
        {"defect_name": str(v), "pixel_value": v, "saturation_threshold": t, "relative_saturation": r}
        for v, (t, r) in config.items()
    ]
    (root / "defects_config.json").write_text(json.dumps(entries))
    return [str(root / "test" / f"{name}.png") for name in names]


def blob(rng, size=SIZE):
    noise = gaussian_filter(rng.normal(size=size), 3)
    return noise > np.quantile(noise, rng.uniform(0.8, 0.97))


@pytest.fixture
def masks():
    """Two kinds of images with one or two defects each; some defects overlap."""
    rng = np.random.default_rng(0)
    values = list(CONFIG)
    return {
        f"{kind}/{number:03d}": [(values[rng.integers(3)], blob(rng)) for _ in range(1 + number % 2)]
        for kind in KINDS
        for number in range(4)
    }


@pytest.fixture
def paths(tmp_path, masks):
    return write_category(tmp_path / "box", masks)


@pytest.fixture
def maps(paths, masks):
    """Scores of both signs that 12 significant bits hold, higher on defects, with ties."""
    rng = np.random.default_rng(1)
    scores = [rng.normal(size=SIZE) - 0.5 for _ in paths]
    for number, defects in enumerate(masks.values()):
        scores[-len(masks) + number] += sum(mask for _, mask in defects)
    return torch.tensor(np.round(np.array(scores) * 64) / 64, dtype=torch.float32)


def batch(maps, paths):
    return ImageBatch(image=torch.zeros(len(maps), 3, *SIZE), anomaly_map=maps, image_path=list(paths))


def updated(maps, paths, **settings):
    metric = AUSPRO(**settings)
    metric.update(batch(maps, paths))
    return metric


def slow_au_spro(maps, masks, good, kind, limit):
    """By the definition, one threshold after the other."""
    defects, normal = [], [scores.ravel() for scores in maps[:good]]
    for scores, (name, regions) in zip(maps[good:], masks.items(), strict=True):
        if name.startswith(kind):
            normal.append(scores[~np.any([mask for _, mask in regions], axis=0)])
            for value, mask in regions:
                threshold, is_relative = CONFIG[value]
                area = int(threshold * mask.sum()) if is_relative else min(threshold, mask.sum())
                defects.append((scores[mask], area))
    normal = np.concatenate(normal)
    curve = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        overlaps = [min((scores >= threshold).sum() / area, 1) for scores, area in defects]
        curve.append((float((normal >= threshold).mean()), float(np.mean(overlaps))))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 >= limit:
            break
        end = min(x1, limit)
        area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0 or 1))) / 2
    return area / limit


@pytest.mark.parametrize("limit", [0.003, 0.05, 0.3, 1.0])
def test_slow_implementation(maps, paths, masks, limit):
    metric = updated(maps, paths, fpr_limit=limit)
    expected = [slow_au_spro(maps.numpy(), masks, 3, kind, limit) for kind in KINDS]
    assert [float(value) for value in metric.per_kind().values()] == pytest.approx(expected, abs=1e-6)
    assert float(metric.compute()) == pytest.approx(np.mean(expected), abs=1e-6)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)


def test_curve(maps, paths):
    metric = updated(maps, paths, fpr_limit=1.0)
    for kind, area in metric.per_kind().items():
        fpr, spro = metric.curve(kind)
        assert (fpr[0], spro[0], fpr[-1], spro[-1]) == (0, 0, 1, 1)
        assert (fpr.diff() >= 0).all()
        assert (spro.diff() >= 0).all()
        assert float(torch.trapezoid(spro, fpr)) == pytest.approx(float(area), abs=1e-6)


@pytest.mark.skipif(not (TRAY.is_dir() and ORACLES.is_dir()), reason=f"there is no {TRAY} or no {ORACLES}")
@pytest.mark.parametrize("limit", ["0.01", "0.05", "0.1", "0.3", "1.0"])
def test_oracle(tray_maps, limit):
    expected = json.loads((ORACLES / "loco_tray_expected.json").read_text())["localization"]["auc_spro"]
    metric = AUSPRO(fpr_limit=float(limit))
    for name, scores in tray_maps.items():
        metric.update(batch(torch.from_numpy(scores)[None], [TRAY / "test" / f"{name}.png"]))
    found = {**metric.per_kind(), "mean": metric.compute()}
    assert found.keys() == expected.keys()
    for kind, value in found.items():
        assert float(value) == pytest.approx(expected[kind][limit], abs=1e-4), kind


@pytest.fixture(scope="module")
def tray_maps():
    spec = util.spec_from_file_location("loco_maps", ORACLES / "loco_maps.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.maps(str(TRAY)))


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_aupro_where_each_region_saturates_at_its_area(tmp_path, limit):
    rng = np.random.default_rng(2)
    merged = torch.tensor(np.array([blob(rng, (64, 64)) | blob(rng, (64, 64)) for _ in range(6)]))
    scores = torch.tensor(np.array([gaussian_filter(rng.normal(size=(64, 64)), 2) for _ in range(6)]))
    scores = (scores + 0.05 * merged).float()
    regions = connected_components_cpu(merged[:, None].float())[:, 0].numpy()
    masks = {
        f"{LOGICAL}/{number:03d}": [(255, labels == label) for label in np.unique(labels)[1:]]
        for number, labels in enumerate(regions)
    }
    assert sum(map(len, masks.values())) > 12
    paths = write_category(tmp_path / "box", masks, good=0, size=(64, 64))
    theirs = AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=limit)
    theirs.update(ImageBatch(image=torch.zeros(6, 3, 64, 64), anomaly_map=scores, gt_mask=merged))
    expected = float(theirs.compute())
    assert float(updated(scores, paths, fpr_limit=limit).per_kind()[LOGICAL]) == pytest.approx(expected, abs=2e-4)
    curve = PROCurve(limit, points=2001)
    curve.update(scores, merged)
    assert float(curve.area()) == pytest.approx(expected, abs=2e-4)
    fpr, pro = curve.compute()
    assert (fpr[0], fpr[-1], len(fpr)) == (0, pytest.approx(limit), 2001)
    assert float(torch.trapezoid(pro, fpr)) / limit == pytest.approx(expected, abs=1e-3)
    expected_fpr, expected_pro = (values.numpy() for values in theirs.compute_pro(torch.from_numpy(regions), scores))
    assert np.abs(np.interp(fpr, expected_fpr, expected_pro) - pro.numpy()).max() < 5e-3


def test_pro_curve_jumps_at_rate_zero():
    masks = torch.zeros(1, 4, 4)
    masks[0, 0, :2] = masks[0, 3, 3] = 1
    scores = 2 * masks
    scores[0, 3, 3] = -1
    curve = PROCurve(1.0, points=3)
    curve.update(scores, masks)
    assert [values.tolist() for values in curve.compute()] == [[0, 0.5, 1], [0.5, 0.5, 1]]
    assert float(curve.area()) == 0.5


def test_twelve_significant_bits_of_scores_count():
    masks = torch.tensor([[[1, 0]]])
    for step, area in ((1 / 2048, 1), (1 / 4096, 0.5)):
        curve = PROCurve(1.0, points=2)
        curve.update(torch.tensor([[[1 + step, 1]]]), masks)
        assert float(curve.area()) == area


def test_increasing_transformation_changes_nothing(maps, paths):
    expected = updated(maps, paths).per_kind()
    assert updated(8 * maps, paths).per_kind() == expected
    for kind, value in updated((maps / 3).exp(), paths).per_kind().items():
        assert float(value) == pytest.approx(float(expected[kind]), abs=2e-3)
    assert float(updated(-maps, paths).compute()) < float(updated(maps, paths).compute()) / 2


def test_batches_and_order_change_nothing(maps, paths):
    expected = updated(maps, paths)
    shuffled = AUSPRO()
    for part in torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).split(4):
        shuffled.update(batch(maps[part], [paths[i] for i in part]))
    for kind in KINDS:
        assert all(torch.equal(*pair) for pair in zip(shuffled.curve(kind), expected.curve(kind), strict=True))
    assert shuffled.compute() == expected.compute()


def share(rank, folder, maps, paths):
    # The threads of this process do not exist in a forked one.
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    # Unequal shares, and only the second process sees structural anomalies.
    part = [slice(0, 5), slice(5, None)][rank]
    metric = updated(maps[part], paths[part])
    before = metric.overlap.clone()
    result = [metric.curve(LOGICAL), metric.per_kind(), metric.compute(), metric.curve(STRUCTURAL)]
    assert torch.equal(metric.overlap, before)
    torch.save(result, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path, maps, paths):
    # Spawned processes would import anomalib again.
    multiprocessing.start_processes(share, (tmp_path, maps, paths), nprocs=2, start_method="fork")
    alone = updated(maps, paths)
    for rank in range(2):
        logical, per_kind, mean, structural = torch.load(tmp_path / f"{rank}.pt")
        assert per_kind == alone.per_kind()
        assert mean == alone.compute()
        for ours, kind in ((logical, LOGICAL), (structural, STRUCTURAL)):
            assert all(torch.equal(*pair) for pair in zip(ours, alone.curve(kind), strict=True))


def test_maps_are_resized_to_the_files(maps, paths):
    small = interpolate(maps[:, None], scale_factor=0.5, mode="area")[:, 0]
    large = interpolate(small[:, None], SIZE, mode="bilinear", align_corners=False)[:, 0]
    assert updated(small, paths).per_kind() == updated(large, paths).per_kind()
    # All pixels of normal images, and those of anomalous ones outside their defects.
    metric = updated(small, paths)
    assert int(metric.defect_free[-1].sum()) == 3 * SIZE[0] * SIZE[1]


def test_states_do_not_grow(maps, paths):
    metric = updated(maps, paths)
    states = [getattr(metric, name) for name in metric._defaults]
    before = [(state.shape, state.dtype) for state in states]
    assert sum(state.numel() * state.element_size() for state in states) == 40 * 2**20
    for _ in range(3):
        metric.update(batch(maps, paths))
    states = [getattr(metric, name) for name in metric._defaults]
    assert [(state.shape, state.dtype) for state in states] == before
    assert metric.state_dict() == {}


def test_a_curve_takes_no_more_than_one_kind_needs():
    metric = PROCurve()
    states = [getattr(metric, name) for name in metric._defaults]
    assert sum(state.numel() * state.element_size() for state in states) == 24 * 2**20


def test_reset(maps, paths):
    metric = updated(maps, paths)
    metric.reset()
    metric.update(batch(maps.flip(0), paths))
    assert metric.per_kind() == updated(maps.flip(0), paths).per_kind()


class Stored(LightningModule):
    """Takes its maps from a table."""

    def __init__(self, metrics, maps):
        super().__init__()
        self.evaluator = Evaluator(test_metrics=metrics)
        self.maps = maps

    def configure_callbacks(self):
        return [self.evaluator]

    def test_step(self, batch):
        batch.anomaly_map = torch.stack([self.maps[path] for path in batch.image_path])
        return batch


@pytest.mark.parametrize("batch_size", [1, 5])
def test_evaluator(tmp_path, maps, paths, batch_size):
    metrics = [AUSPRO(), AUSPRO(fpr_limit=0.3, prefix="wide_")]
    model = Stored(metrics, dict(zip(paths, maps, strict=True)))
    datamodule = MVTecLOCOAD(tmp_path, "box", eval_batch_size=batch_size, num_workers=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    result = trainer.test(model, datamodule=datamodule, verbose=False)[0]
    expected = {"AUSPRO": updated(maps, paths), "wide_AUSPRO": updated(maps, paths, fpr_limit=0.3)}
    assert result == {name: pytest.approx(float(metric.compute())) for name, metric in expected.items()}
    # The trainer has reset the metric in inference mode.
    metrics[0].update(batch(maps, paths))
    assert metrics[0].compute() == expected["AUSPRO"].compute()


def test_strictness():
    incomplete = ImageBatch(image=torch.zeros(1, 3, *SIZE))
    with pytest.raises(ValueError, match="anomaly_map"):
        AUSPRO().update(incomplete)
    metric = AUSPRO(strict=False)
    metric.update(incomplete)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute() is None


def test_mean_is_over_the_kinds_with_defects(maps, paths):
    metric = updated(maps[:7], paths[:7])
    areas = metric.per_kind()
    assert areas[STRUCTURAL].isnan()
    assert metric.compute() == areas[LOGICAL] == updated(maps, paths).per_kind()[LOGICAL]
    assert metric.compute() == updated(maps[:7], paths[:7], kinds=[LOGICAL]).compute()
    with pytest.raises(ValueError, match="there is no curve of structural_anomalies: call update with its defects"):
        metric.curve(STRUCTURAL)


def test_without_defects_it_is_not_a_number(maps, paths):
    metric = updated(maps[:3], paths[:3])
    with pytest.warns(UserWarning, match="there is no defect, or no defect-free pixel: AU-sPRO is undefined"):
        assert metric.compute().isnan()
    curve = PROCurve()
    curve.update(torch.rand(1, 4, 4), torch.zeros(1, 4, 4))
    assert curve.area().isnan()
    assert curve.compute()[1].isnan().all()
    assert [len(values) for values in curve.compute()] == [301, 301]


def test_without_defect_free_pixels_it_is_not_a_number():
    curve = PROCurve()
    curve.update(torch.rand(1, 4, 4), torch.ones(1, 4, 4))
    assert curve.area().isnan()


def test_a_saturation_area_may_be_a_fraction():
    metric = AUSPRO(kinds=[LOGICAL])
    metric._count(torch.tensor([4.0, 3.0, 2.0, 1.0]), [torch.tensor([0, 1, 2])], [1.6], 0)
    fpr, spro = metric.curve(LOGICAL)
    torch.testing.assert_close(spro, torch.tensor([0, 0.625, 1, 1], dtype=torch.float64), atol=1e-9, rtol=0)
    assert fpr.tolist() == [0, 0, 0, 1]


def test_bins_are_ordered():
    scores = torch.tensor([-3e38, -2.0, -1.0, -1e-30, -0.0, 0.0, 1e-45, 1e-30, 1.0, 1.0001, 1.001, 2.0, 3e38])
    bins = _bins(scores)
    assert (bins >= 0).all()
    assert (bins < 2**20).all()
    assert bins.diff().sign().tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1]
    scores = torch.randn(10000, generator=torch.Generator().manual_seed(0)).sort().values
    assert (_bins(scores).diff() >= 0).all()
    # Both signs are rounded towards zero.
    assert (_bins(scores) + _bins(-scores) == 2**20 - 1).all()


@pytest.mark.parametrize("score", [torch.nan, torch.inf, -torch.inf])
def test_scores_must_be_finite(maps, paths, score):
    maps[5, 2, 3] = score
    with pytest.raises(ValueError, match="the scores must be finite: an anomaly map contains NaN or infinity"):
        updated(maps, paths)


def test_each_map_needs_its_file(maps, paths):
    # As from a data module of another make; anomalib's own batch checks itself.
    with pytest.raises(ValueError, match="shorter"):
        AUSPRO().update(SimpleNamespace(anomaly_map=maps, image_path=paths[:-1]))


def test_unknown_kind(maps, paths):
    with pytest.raises(ValueError, match=r"'structural_anomalies' is neither 'good' nor one of the kinds \['logical"):
        updated(maps, paths, kinds=[LOGICAL])
    with pytest.raises(ValueError, match="'scratch' is neither"):
        updated(maps, paths).curve("scratch")


def test_invalid_settings():
    for limit in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="fpr_limit must be above 0 and at most 1, not "):
            AUSPRO(fpr_limit=limit)
    for kinds in ([], ["scratch", "scratch"], ["good", "scratch"]):
        with pytest.raises(ValueError, match="kinds must name different folders of anomalous images"):
            AUSPRO(kinds=kinds)
    with pytest.raises(ValueError, match="points must be at least 2, not 1"):
        PROCurve(points=1)
    with pytest.raises(ValueError, match=r"maps \(1, 4, 4\) and masks \(1, 4, 5\) must have the same shape"):
        PROCurve().update(torch.rand(1, 4, 4), torch.zeros(1, 4, 5))
