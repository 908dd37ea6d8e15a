"""Commands that are interrupted: what is left is whole, nothing goes on, and run again they end as if it never was."""

import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino
import pytest
import torch
import yaml
from anomalib.cli.cli import main as anomalib
from anomalib.engine import Engine
from PIL import Image

from anomalib_ot import Assembly, Pradot
from anomalib_ot.cli import main as anomalib_ot
from anomalib_ot.comparison import job, read_records, supervision

pytestmark = pytest.mark.slow

SMALL = {"layers": ["layer1"], "prototypes_per_cell": 1, "whitened_channels": 16, "epochs": 4, "batch_size": 4}
MODEL = {"backbone": "resnet18", "pre_trained": False, "image_size": [64, 64], **SMALL}
COUNTS = {"n_train": 8, "n_validation": 2, "n_test": 2}
# Ctrl-C reaches all that a terminal started, the others the one process that is meant.
SIGNALS = {signal.SIGINT: os.killpg, signal.SIGTERM: os.kill, signal.SIGKILL: os.kill}
# Seconds for a process to end, and for those that it started, on a busy machine.
PATIENCE = 300


def command(_, main, arguments, folder, fatal=None):
    """Run a command in a process group of its own, with its output in a file.

    The group is killed when it is about to open this file for writing, of those in the folder, counted from 1; 0 only
    counts them.
    """
    os.setsid()
    if fatal is not None:
        sys.addaudithook(killer(folder, fatal))
    # Not that of the server which this was forked from: the workers of a loader would outlive it.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    os.environ["COLUMNS"] = "200"
    os.chdir(folder)
    supervision.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})
    sys.argv = [main.__module__, *map(str, arguments)]
    with Path("output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    main()


def killer(folder, fatal):
    """An audit hook that kills the process group at a file; how many there were is in ``written.txt`` beside it."""
    count = folder.with_name("written.txt")
    count.write_text("0")

    def hook(event, arguments):
        if event != "open" or not isinstance(arguments[0], str | Path) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path = Path(arguments[0]).absolute()
        if path.is_relative_to(folder) and path.name != "output.txt":
            number = int(count.read_text()) + 1
            if number == fatal:
                os.killpg(0, signal.SIGKILL)
            count.write_text(str(number))

    return hook


class Forked:
    """As ``subprocess.Popen`` of a job, but forked from this process, which has imported all already."""

    def __init__(self, arguments, **_):
        assert arguments[1:3] == ["-m", job.__name__]
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            job.main(*map(Path, arguments[3:5]), int(arguments[5]))
            os._exit(0)
        except KeyboardInterrupt:
            # As Python itself ends.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(1)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with pictures, the checkpoint of a model, and the plan of a comparison."""
    root = tmp_path_factory.mktemp("interruptions")
    torch.manual_seed(0)
    engine = Engine(default_root_dir=root / "fit", accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(Pradot(**MODEL, visualizer=False), datamodule=Assembly(root / "data", **COUNTS, num_workers=0))
    engine.trainer.save_checkpoint(root / "model.ckpt")
    plan = {
        "backbone": "resnet18",
        "layers": ["layer1"],
        "image_size": [64, 64],
        "models": {
            "Pradot": {"class_path": "Pradot", "init_args": {"pre_trained": False, **SMALL}},
            "PaDiM": {"class_path": "Padim", "init_args": {"pre_trained": False, "n_features": 9}},
        },
        "data": {"tray": {"class_path": "Assembly", "init_args": {"root": str(root / "data"), **COUNTS}}},
        "ensembles": ["Pradot+PaDiM"],
    }
    (root / "plan.yaml").write_text(yaml.safe_dump(plan))
    return root


def arguments(name, root):
    """Main function and arguments of a command."""
    model = ["--model", "Pradot", *(f"--model.{key}={value}" for key, value in MODEL.items())]
    data = ["--data", "Assembly", "--data.root", root / "data", *(f"--data.{k}={v}" for k, v in COUNTS.items())]
    checkpoint = ["--ckpt_path", root / "model.ckpt"]
    return {
        "test": (anomalib, ["test", *model, *data, "--data.num_workers=1", *checkpoint]),
        "export": (
            anomalib,
            ["export", *model, *checkpoint, "--export_type=openvino", "--input_size=[64, 64]", "--export_root=export"],
        ),
        "compare": (anomalib_ot, ["compare", "--plan", root / "plan.yaml", "--output=compared", "--accelerator=cpu"]),
    }[name]


def what_test_says(folder, _):
    """Metrics as they are printed, and pictures."""
    metrics = dict(re.findall(r"((?:image|pixel)_\w+)\W+([\d.]+)", (folder / "output.txt").read_text()))
    assert {"image_AUROC", "pixel_F1Score"} <= metrics.keys()
    pictures = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}
    assert len(pictures) == 3 * COUNTS["n_test"]
    return metrics, pictures


def what_export_says(folder, root):
    """What the graph says of a picture, and the names of all files that are there, but those under hidden names."""
    path = folder / "export/weights/openvino/model.xml"
    graph = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": "1"})
    with Image.open(root / "data/tray/test/good/000.png") as image:
        pixels = np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float32).transpose(2, 0, 1)[None] / 255
    values = {output.get_any_name(): value.tolist() for output, value in graph(pixels).items()}
    assert np.ptp(values["anomaly_map"]) > 0
    return values, sorted(path.name for path in visible(folder / "export"))


def what_compare_says(folder, _):
    """Metrics and scores of all runs."""
    records = read_records(folder / "compared" / "runs")
    assert [record.error for record in records] == [""] * 3
    with (folder / "compared" / "results.csv").open(newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == [record.key.model for record in records]
    return [(record.key, record.metrics, record.predictions.scores.tolist()) for record in records]


RESULTS = {"test": what_test_says, "export": what_export_says, "compare": what_compare_says}


def read_table(path):
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert {len(row) for row in rows} == {len(header)}


def read_arrays(path):
    with np.load(path) as arrays:
        assert [array.size for array in arrays.values()]


def read_picture(path):
    with Image.open(path) as image:
        image.load()


def read_page(path):
    assert path.read_text().rstrip().endswith("</html>")


READERS = {
    ".csv": read_table,
    ".html": read_page,
    ".json": lambda path: json.loads(path.read_text()),
    ".md": lambda path: path.read_text()[-1],
    ".npz": read_arrays,
    ".png": read_picture,
    # With its weights.
    ".xml": lambda path: openvino.Core().read_model(path),
    ".yaml": lambda path: yaml.safe_load(path.read_text())["model"],
}


def visible(folder):
    """All files except hidden ones, which are renamed once they are complete."""
    found = [path for path in folder.rglob("*.*") if path.is_file()]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def is_readable(path):
    try:
        READERS[path.suffix](path)
    except Exception:  # noqa: BLE001 - whatever a file that is cut off makes of it
        return False
    return True


def broken(folder):
    """Files that cannot be read."""
    return [path for path in visible(folder) if path.suffix not in {".bin", ".txt"} and not is_readable(path)]


def living(group):
    """Processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def interrupt(begin, after, number):
    """Send a signal to a command some seconds after it has begun, and wait until nothing of it lives."""
    process = begin()
    process.join(after)
    while not process.is_alive():
        # It was faster than before.
        after /= 2
        process = begin()
        process.join(after)
    SIGNALS[number](process.pid, number)
    end = time.monotonic() + PATIENCE
    while living(process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    left = living(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("name", RESULTS)
def test_an_interrupted_command_leaves_whole_files_and_ends_when_run_again(name, root, start, tmp_path):
    def begin(folder):
        output = folder / "output.txt"
        output.unlink(missing_ok=True)
        (process,) = start(command, (*arguments(name, root), folder))
        while not output.exists():
            time.sleep(0.01)
        return process

    def result(folder):
        """What the command says when it is left alone, and how long it takes once it has begun."""
        process, begun = begin(folder), time.monotonic()
        process.join()
        seconds = time.monotonic() - begun
        assert process.exitcode == 0, (folder / "output.txt").read_text()
        return RESULTS[name](folder, root), seconds

    once, again = tmp_path / "once", tmp_path / "again"
    once.mkdir()
    again.mkdir()
    expected, seconds = result(once)
    moments = random.Random(name)
    for number in SIGNALS:
        interrupt(lambda: begin(again), moments.uniform(0.1, 0.9) * seconds, number)
        # anomalib writes its pictures in place: the one that it is at may be cut off.
        assert len(broken(again)) <= (name == "test")
    assert result(again)[0] == expected
    assert not broken(again)


@pytest.mark.parametrize("name", ["export", "compare"])
def test_a_command_killed_between_any_two_files_ends_when_run_again(name, root, start, tmp_path):
    again, output = tmp_path / "again", tmp_path / "again" / "output.txt"

    def run_until(fatal):
        output.parent.mkdir(exist_ok=True)
        (process,) = start(command, (*arguments(name, root), again, fatal))
        process.join()
        return process.exitcode

    assert run_until(0) == 0, output.read_text()
    expected, count = RESULTS[name](again, root), int((tmp_path / "written.txt").read_text())
    assert count
    for fatal in random.Random(name).sample(range(1, count + 1), min(count, 6)):
        shutil.rmtree(again)
        assert run_until(fatal) == -signal.SIGKILL
        assert not broken(again)
        # A model is there with its report of parity, or not at all.
        assert not list(again.glob("export/weights/openvino/*"))
        assert run_until(None) == 0, output.read_text()
        assert RESULTS[name](again, root) == expected
