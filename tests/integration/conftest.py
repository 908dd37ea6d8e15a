"""A real browser, with the network cut off, forked processes that skip the imports, and small models."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import main
from anomalib.engine import Engine
from lightning.pytorch import seed_everything

from anomalib_ot import Assembly, Duo, FewShot, Foct, Pradot, WtFlow

_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)

# Small, but with each model's own defaults where they decide what is drawn or summed.
MODELS = {
    "Pradot": (Pradot, {"layers": ["blocks.2", "blocks.4"], "prototypes_per_cell": 2, "epochs": 2, "batch_size": 6}),
    "Foct": (Foct, {"layers": ["blocks.2", "blocks.4"], "rotations": 2, "support_steps": 5}),
    "Foct online": (
        Foct,
        {"layers": ["blocks.4"], "rotations": 1, "support_steps": 2, "query_steps": 2, "online": True},
    ),
    "WtFlow": (WtFlow, {"layers": ["blocks.4"], "width": 16, "training_steps": 6, "batch_size": 4}),
    "Duo": (
        Duo,
        {
            "layers": ["blocks.2", "blocks.4"],
            "pradot": {"prototypes_per_cell": 2, "epochs": 2},
            "wt_flow": {"width": 16, "training_steps": 6},
            "batch_size": 4,
        },
    ),
}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if _BROWSER is None:
        pytest.skip("there is no Chromium or Chrome on the path")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND"]
        browser = playwright.chromium.launch(executable_path=_BROWSER, args=arguments, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture
def open_file(browser):
    """Opens files as pages; at the end nothing may have been asked of the network or complained of."""
    asked, complaints, contexts, opened = [], [], [], set()

    def open_file(path, width=1400, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        opened.add(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert {url for url in asked if not url.startswith("data:")} == opened
    assert complaints == []


@pytest.fixture(scope="session")
def start():
    """Starts processes, forked from one that has imported already what takes each ten seconds."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["anomalib.cli.cli", "anomalib_ot.comparison", "anomalib_ot.models"])

    def start(target, *arguments):
        """The first argument of each process is its number."""
        processes = [context.Process(target=target, args=(number, *each)) for number, each in enumerate(arguments)]
        for process in processes:
            process.start()
        return processes

    return start


def _run(_, folder, arguments, said):
    os.chdir(folder)
    os.environ["COLUMNS"] = "200"
    # The workers of a loader are forked from this process, not from the server.
    multiprocessing.set_start_method("fork", force=True)
    for number, path in enumerate(said, 1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["anomalib", *arguments]
    main()


@pytest.fixture(scope="session")
def forked(start, tmp_path_factory):
    """Runs the ``anomalib`` command in a folder, in a forked process, and gives its output."""

    def forked(folder, *arguments, check=True):
        said = [tmp_path_factory.mktemp("said") / name for name in ("stdout.txt", "stderr.txt")]
        (process,) = start(_run, (Path(folder), [str(each) for each in arguments], said))
        process.join()
        output = "".join(path.read_text() for path in said)
        assert not check or process.exitcode == 0, output
        return output

    return forked


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    """Name of a small model."""
    return request.param


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Makes a data module of a few small pictures, always the same."""
    root = tmp_path_factory.mktemp("data")

    def make(**arguments):
        return Assembly(root, n_train=8, n_validation=2, n_test=3, **arguments)

    return make


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def make(accelerator="cpu", **arguments):
        return Engine(
            default_root_dir=folder, accelerator=accelerator, logger=False, enable_progress_bar=False, **arguments
        )

    return make


@pytest.fixture(scope="module")
def train(backbone, data, engine):
    """Trains a new small model on every call."""

    def train(name, seed, accelerator="cpu"):
        kind, arguments = MODELS[name]
        seed_everything(seed, workers=True, verbose=False)
        # Scores as they are: post-processing would clip them.
        model = kind(
            backbone=backbone,
            image_size=(128, 128),
            **arguments,
            post_processor=False,
            evaluator=False,
            visualizer=False,
        )
        engine(accelerator).fit(model, datamodule=FewShot(data(), shots=2) if kind is Foct else data())
        return model

    return train


@pytest.fixture(scope="module")
def scores(data, engine):
    """Image scores (B,) and anomaly maps (B, H, W) of the test pictures in their order."""

    def scores(model, accelerator="cpu", **arguments):
        batches = engine(accelerator).predict(model, datamodule=data(**arguments))
        assert max(len(batch.image_path) for batch in batches) == arguments.get("eval_batch_size", 9)
        return (
            torch.cat([batch.pred_score for batch in batches]).cpu(),
            torch.cat([batch.anomaly_map for batch in batches]).cpu(),
        )

    return scores


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel, which is on Python's path before all else, and an empty one to work in."""
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=Path(__file__).resolve().parents[2], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    (folder / "work").mkdir()
    return folder
