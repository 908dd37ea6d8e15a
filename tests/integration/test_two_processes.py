"""Several processes train what one does, and if one is lost the others end with an error and do not wait for ever."""

import os
import signal
import time

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything
from torch import distributed

from anomalib_ot import Assembly, Duo, WtFlow
from anomalib_ot.transport import FusedCost, Processes, grid_coordinates, sinkhorn

# Seconds; far less than the half hour for which gloo waits for a process that lives and says nothing.
PATIENCE = 120
# For two processes to import all that they need, on a busy machine.
START = 600
# Step at which a process is lost.
LAST = 4
# In batches of three the last has one image, so that one process has none.
# All prototypes are kept, as rounding changes which ones are needed.
PROTOTYPES = {"prototypes_per_cell": 1, "whitened_channels": 16, "epochs": 2, "compress": False}
FLOW = {"whitened_channels": 16, "width": 16}
IMAGES = {"n_train": 10, "n_validation": 2, "n_test": 1, "num_workers": 0}


def meet(rank, folder, processes):
    torch.set_num_threads(1)
    if processes > 1:
        # Lightning starts no processes where it finds that somebody did.
        os.environ["LOCAL_RANK"] = str(rank)
        distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)


def lose_one(rank, step, how):
    if (rank, step) == (1, LAST):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        msg = "out of memory"
        raise MemoryError(msg)


def transport(rank, folder, how):
    """Solve problems until a process is lost."""
    meet(rank, folder, 2)
    grid = grid_coordinates(4, 4)
    for step in range(1000):
        lose_one(rank, step, how)
        features = torch.rand(16, 8, generator=torch.Generator().manual_seed(step))
        cost = FusedCost(features, features[:8], grid, grid[:8], 0.3, processes=Processes.all())
        sinkhorn(cost, 0.1, 500, 1e-2, processes=Processes.all())
        (folder / f"{rank}-{step}").touch()


class LoseOne(Callback):
    def __init__(self, folder, how):
        self.folder = folder
        self.how = how

    def on_train_batch_start(self, trainer, *_):
        if self.how != "diverges":
            lose_one(trainer.global_rank, trainer.global_step, self.how)
        elif (trainer.global_rank, trainer.global_step) == (1, LAST):
            next(trainer.lightning_module.trained.parameters()).data.fill_(torch.nan)

    def on_train_batch_end(self, trainer, *_):
        (self.folder / f"{trainer.global_rank}-{trainer.global_step - 1}").touch()


def flow(rank, folder, how):
    """Fit until a process is lost, and keep why."""
    try:
        fit_flow(rank, folder, 2, [LoseOne(folder, how)], training_steps=1000)
    except RuntimeError as error:
        (folder / f"{rank}.txt").write_text(str(error))
        raise


def fit_few(rank, folder, images):
    """Fit to fewer pictures than processes, or to one that cannot be read, and keep why it fails."""
    try:
        fit_flow(rank, folder, 2, images=images)
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
        raise


def fit_flow(rank, folder, processes, callbacks=(), training_steps=8, images=IMAGES, kind=WtFlow):
    """Fit, and keep what each process has learned and says of its loss."""
    meet(rank, folder, processes)
    seed_everything(0, verbose=False)
    flow = {**FLOW, "training_steps": training_steps}
    model = kind(
        "test_resnet",
        ["layer2", "layer3"],
        pre_trained=False,
        image_size=(64, 64),
        batch_size=min(3, images["n_train"]),
        visualizer=False,
        **({"pradot": PROTOTYPES, "wt_flow": flow} if kind is Duo else flow),
    )
    engine = Engine(
        # Engines of one folder that start at once sometimes choose the same run, which anomalib refuses.
        default_root_dir=folder / f"rank_{rank}",
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
    )
    engine.fit(model, datamodule=Assembly(folder.parent / "data", **images))
    assert engine.trainer.world_size == processes
    loss = engine.trainer.callback_metrics["train_loss"]
    learned = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(("model.", "trained")) and "feature_extractor" not in name
    }
    torch.save({"train_loss": loss, **learned}, folder / f"{rank}.pt")


def ended(processes, patience):
    """Exit codes, None of those that are not done when patience is."""
    end = time.monotonic() + patience
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def fit_duo(rank, folder, processes):
    """Fit prototypes and a flow."""
    fit_flow(rank, folder, processes, kind=Duo)


@pytest.mark.parametrize("fit", [pytest.param(fit_flow, marks=pytest.mark.slow), fit_duo])
def test_two_processes_train_what_one_does(tmp_path, start, fit):
    folders = alone, together = tmp_path / "alone", tmp_path / "together"
    Assembly(tmp_path / "data", **IMAGES).prepare_data()
    for folder, processes in zip(folders, (1, 2), strict=True):
        folder.mkdir()
        assert ended(start(fit, *[(folder, processes)] * processes), START) == [0] * processes
    expected = torch.load(alone / "0.pt")
    for rank in range(2):
        found = torch.load(together / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Each of the eight steps moves a weight by as much as the learning rate, 1e-3.
            torch.testing.assert_close(
                found[name], value, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def lose(work, how, folder, start):
    """Exit codes of two processes, after one of them failed."""
    (folder / "run").mkdir()
    Assembly(folder / "data", **IMAGES).prepare_data()
    processes = start(work, *[(folder / "run", how)] * 2)
    end = time.monotonic() + START
    while not (folder / "run" / f"0-{LAST - 1}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    codes = ended(processes, PATIENCE)
    assert (folder / "run" / f"0-{LAST - 1}").exists()
    assert not (folder / "run" / f"0-{LAST}").exists()
    return codes


@pytest.mark.parametrize("how", ["killed", "raises"])
@pytest.mark.parametrize("work", [transport, flow])
def test_a_lost_process_is_an_error_and_not_a_wait(tmp_path, start, work, how):
    codes = lose(work, how, tmp_path, start)
    assert None not in codes
    assert 0 not in codes


def test_a_loss_that_is_not_finite_in_one_process_is_an_error_of_both(tmp_path, start):
    assert lose(flow, "diverges", tmp_path, start) == [1, 1]
    for rank in range(2):
        error = (tmp_path / "run" / f"{rank}.txt").read_text()
        assert f"the loss of layer layer2 is not finite at step {LAST}" in error


def test_fewer_pictures_than_processes_are_refused_by_all(tmp_path, start):
    few = {**IMAGES, "n_train": 1}
    Assembly(tmp_path / "data", **few).prepare_data()
    (tmp_path / "run").mkdir()
    assert ended(start(fit_few, *[(tmp_path / "run", few)] * 2), PATIENCE) == [1, 1]
    for rank in range(2):
        error = (tmp_path / "run" / f"{rank}.txt").read_text()
        assert "1 training images are fewer than the 2 processes" in error


def test_a_picture_that_one_process_cannot_read_is_named_by_all(tmp_path, start):
    data = Assembly(tmp_path / "data", **IMAGES)
    data.prepare_data()
    # The second process has the last pictures.
    *_, last = sorted((tmp_path / "data").rglob("train/good/*.png"))
    last.write_bytes(last.read_bytes()[:100])
    (tmp_path / "run").mkdir()
    assert ended(start(fit_few, *[(tmp_path / "run", IMAGES)] * 2), PATIENCE) == [1, 1]
    for rank in range(2):
        assert f"{last.name} cannot be read" in (tmp_path / "run" / f"{rank}.txt").read_text()
