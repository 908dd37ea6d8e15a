"""On a CUDA device everything does what it does on a processor, up to rounding; not run where there is none."""

import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.deploy import ExportType

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow
from anomalib_ot.comparison import Plan
from anomalib_ot.comparison import compare as compare_models
from anomalib_ot.explain import ExplainingVisualizer
from anomalib_ot.models.foct import FoctModel, FoctSettings
from anomalib_ot.transport import (
    FusedCost,
    Navigator,
    Workspace,
    WorstCoupling,
    fit_navigator,
    grid_coordinates,
    sinkhorn,
    solve,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS = {"kept": 2**31, "without similarities": 200_000, "recomputed": 20_000}
SMALL = {"layers": ["layer2"], "pre_trained": False, "image_size": (64, 64), "evaluator": False}
FEW = {
    Pradot: {"epochs": 1},
    WtFlow: {"training_steps": 2},
    Duo: {"pradot": {"epochs": 1}, "wt_flow": {"training_steps": 2}},
    Foct: {"rotations": 2, "support_steps": 2},
}


@pytest.fixture(autouse=True)
def exact_convolutions():
    """By itself torch rounds what convolutions multiply on CUDA, which is a thousandth of a feature."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def problem(device, dtype):
    """Features of eight pictures, 98 prototypes and where both are, on a device."""
    generator = torch.Generator().manual_seed(0)
    grid = grid_coordinates(7, 7)
    features = torch.rand(8 * 49, 6, generator=generator)
    prototypes = torch.rand(98, 6, generator=generator)
    return tuple(part.to(device, dtype) for part in (features, prototypes, grid, grid.repeat(2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_transport(monkeypatch, dtype, alpha, kernel):
    # Blocks small enough for the least memory.
    monkeypatch.setattr("anomalib_ot.transport.costs._BLOCK_ENTRIES", 30)
    features, *_ = exact = problem("cpu", torch.float64)
    expected = sinkhorn(FusedCost(*exact, alpha), 0.05, 50, 0)
    workspace = Workspace(KERNELS[kernel] * dtype.itemsize / 4)
    on_device = problem("cuda", dtype)
    plan = sinkhorn(FusedCost(*on_device, alpha, workspace=workspace), 0.05, 50, 0, workspace=workspace)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    points = plan.barycentres(on_device[0])
    assert points.device.type == "cuda"
    torch.testing.assert_close(points.cpu().double(), expected.barycentres(features), atol=tolerance, rtol=tolerance)
    assert plan.transport_cost() == pytest.approx(expected.transport_cost(), rel=tolerance)
    assert plan.marginal_error == pytest.approx(expected.marginal_error, abs=tolerance)
    torch.testing.assert_close(plan.potential.cpu().double(), expected.potential, atol=tolerance, rtol=tolerance)
    again = sinkhorn(FusedCost(*on_device, alpha), 0.05, 50, 1e-3, plan.potential)
    assert again.iterations <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 25), (3, 40, 25), (600, 500)])
def test_values_and_gradients_of_solve(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(shape, generator=generator, dtype=torch.float64)
    a, b = (torch.rand(*shape[:-2], size, generator=generator).double().softmax(-1) for size in shape[-2:])
    given = [each.requires_grad_() for each in (cost, a, b)]
    on_device = [each.detach().to("cuda", dtype).requires_grad_() for each in given]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    expected, result = (solve(*each, 0.05, tol=tolerance) for each in (given, on_device))
    assert result.plan.device.type == "cuda"
    error = 10 * tolerance
    torch.testing.assert_close(result.value.cpu().double(), expected.value, atol=error, rtol=error)
    torch.testing.assert_close(result.value_linear.cpu().double(), expected.value_linear, atol=error, rtol=error)
    assert (result.plan.cpu().double() - expected.plan).abs().sum((-2, -1)).max() < error
    for mine, theirs in zip(
        *(torch.autograd.grad(each.value.sum(), leaves) for each, leaves in ((result, on_device), (expected, given))),
        strict=True,
    ):
        torch.testing.assert_close(mine.cpu().double(), theirs, atol=error, rtol=error)
    again = solve(*on_device, 0.05, tol=10 * tolerance, potentials_init=result.potentials)
    assert again.iterations <= 2


def test_coupling():
    data, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    coupling = WorstCoupling("positions", 0, "greedy")
    torch.testing.assert_close(coupling(data.cuda(), noise.cuda()).cpu(), coupling(data, noise))


def test_navigator():
    generator = torch.Generator().manual_seed(0)
    # In double precision: Adam goes the whole way for the least gradient.
    memory, query = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    navigators = Navigator(5).double(), Navigator(5).double().cuda()
    navigators[1].load_state_dict(navigators[0].state_dict())
    fits = [
        fit_navigator(each, memory.to(device), query.to(device), features=20, steps=10, learning_rate=1e-2)
        for each, device in zip(navigators, ("cpu", "cuda"), strict=True)
    ]
    assert fits[0].steps == fits[1].steps
    assert fits[1].objective == pytest.approx(fits[0].objective)
    torch.testing.assert_close(navigators[1](memory.cuda(), query.cuda()).cpu(), navigators[0](memory, query))


def test_a_model_scores_alike_on_both(name, train, scores):
    model = train(name, 3, "gpu")
    # Each run starts with an untaught memory.
    for ours, theirs in zip(scores(model, "gpu"), scores(model), strict=True):
        spread = theirs.max() - theirs.min()
        assert spread > 0
        assert (ours - theirs).abs().max() < 1e-3 * spread


def test_prototypes_are_the_same_wherever_they_learned(train, scores):
    for ours, theirs in zip(scores(train("Pradot", 3, "gpu")), scores(train("Pradot", 3)), strict=True):
        assert (ours - theirs).abs().max() < 2e-2 * (theirs.max() - theirs.min())


def test_memory_is_of_the_same_features_wherever_it_was_filled(train):
    # Which of two features that are about as far away a coreset takes is a matter of rounding.
    ours, theirs = (train("Foct", 3, accelerator).model for accelerator in ("gpu", "cpu"))
    assert ours.semantic.features.shape == theirs.semantic.features.shape
    for name in ("centre", "scale", "semantic.threshold"):
        value, expected = (each.get_buffer(name) for each in (ours, theirs))
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("place", ["auto", "device", "cpu", "disk", "none"])
@pytest.mark.parametrize("kind", [Pradot, WtFlow, Duo])
def test_features_are_kept_anywhere(kind, place, data, engine):
    model = kind("resnet18", **SMALL, **FEW[kind], feature_cache=place, visualizer=False)
    engine("gpu").fit(model, datamodule=data())
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", [Pradot, Foct, WtFlow, Duo])
def test_half_precision(kind, precision, data, engine, scores):
    model = kind("resnet18", **SMALL, **FEW[kind], visualizer=False)
    engine("gpu", precision=precision).fit(model, datamodule=FewShot(data(), 2) if kind is Foct else data())
    assert all(each.isfinite().all() for each in scores(model, "gpu"))


def test_less_precise_products_change_no_score(name, train, scores):
    model = train(name, 3, "gpu")
    expected = scores(model, "gpu")
    torch.set_float32_matmul_precision("high")
    try:
        found = scores(model, "gpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * (theirs.max() - theirs.min())


def test_checkpoint_of_a_device_is_read_on_a_processor(name, train, scores, engine, data, tmp_path):
    model = train(name, 3, "gpu")
    runner = engine("gpu")
    runner.predict(model, datamodule=data())
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu")
    for ours, theirs in zip(scores(loaded), scores(model), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_export_after_training_on_a_device(name, train, engine, tmp_path):
    pytest.importorskip("openvino")
    model = train(name, 3, "gpu")
    assert engine("gpu").export(model, ExportType.TORCH, export_root=tmp_path).exists()
    assert engine("gpu").export(model, ExportType.ONNX, export_root=tmp_path, input_size=(128, 128)).exists()


def test_memory_that_queries_teach_grows_on_the_device():
    torch.manual_seed(0)
    settings = FoctSettings(backbone="resnet18", layers=["layer2"], pre_trained=False, rotations=2, online=True)
    model = FoctModel(settings).cuda().eval()
    model.fit(torch.rand(2, 3, 64, 64, device="cuda"))
    images = torch.rand(3, 3, 64, 64, device="cuda")
    first = model(images).anomaly_map
    assert model.episodic.features.device.type == "cuda"
    model.rollback(3)
    torch.testing.assert_close(model(images).anomaly_map, first)


def test_comparison_measures_the_device(tmp_path):
    sizes = {"n_train": 4, "n_validation": 1, "n_test": 2, "num_workers": 0}
    data = {"class_path": "Assembly", "init_args": {"root": str(tmp_path / "data"), **sizes}}
    arguments = {"layers": ["layer2"], "pre_trained": False}
    models = {
        "Pradot": {"class_path": "anomalib_ot.Pradot", "init_args": {**arguments, "epochs": 1}},
        "PaDiM": {"class_path": "Padim", "init_args": {**arguments, "n_features": 10}},
    }
    plan = Plan(models=models, data={"small": data}, backbone="resnet18", image_size=(64, 64))
    records = compare_models(plan, tmp_path / "runs", accelerator="gpu")
    assert [record.error for record in records] == ["", ""]
    for record in records:
        assert record.environment["device"] == torch.cuda.get_device_name()
        # More than the weights of the network alone.
        assert record.costs["device_peak_mib"] > 2
        assert record.costs["ms_per_image"] > 0


@pytest.mark.parametrize("kind", [Pradot, Foct, WtFlow, Duo])
def test_pictures_are_explained_on_the_device(kind, data, engine, tmp_path):
    visualizer = ExplainingVisualizer(count=1, output_dir=tmp_path / "images")
    model = kind("resnet18", **SMALL, **FEW[kind], visualizer=visualizer)
    runner = engine("gpu")
    runner.fit(model, datamodule=FewShot(data(), 2) if kind is Foct else data())
    runner.test(model, datamodule=data())
    (page,) = tmp_path.rglob("index.html")
    assert page.stat().st_size > 1000


def test_a_picture_is_scored_on_the_device(train, engine, data):
    model = train("WtFlow", 3, "gpu")
    module = data()
    module.prepare_data()
    module.setup()
    path = module.test_data.samples.image_path[0]
    (batch,) = engine("gpu").predict(model, dataset=PredictDataset(path=path))
    assert batch.pred_score.isfinite().all()
