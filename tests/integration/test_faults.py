"""Runs that are killed, disks that are full, folders that cannot be written: what is left is whole, or absent."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from safetensors.torch import load_file

from anomalib_ot import Assembly, Pradot, WtFlow
from anomalib_ot.export.staging import staged
from anomalib_ot.features.store import allocate

SHARED = {
    "backbone": "test_resnet",
    "layers": ["layer3"],
    "pre_trained": False,
    "image_size": (64, 64),
    "visualizer": False,
}
MODELS = {
    "Pradot": lambda: Pradot(prototypes_per_cell=2, whitened_channels=16, epochs=12, batch_size=4, **SHARED),
    # Two steps an epoch.
    "WtFlow": lambda: WtFlow(width=16, whitened_channels=16, training_steps=24, batch_size=4, **SHARED),
}
KINDS = {"Pradot": Pradot, "WtFlow": WtFlow}
COUNTS = {"n_train": 8, "n_validation": 1, "n_test": 1}
# Says when it starts, so that what is killed is the work and not the imports before it.
FIT = """
import sys
from tests_of_faults import fit
print("starts", flush=True)
fit(*sys.argv[1:])
"""


def fit(name, data, folder, checkpoint=None):
    """Fit a model, from a checkpoint where there is one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MODELS[name]()
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=Assembly(data, **COUNTS), ckpt_path=checkpoint)
    return model


def learned(model):
    return {name: value for name, value in model.model.state_dict().items() if "feature_extractor" not in name}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    Assembly(root, **COUNTS).prepare_data()
    return root


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    return {name: learned(fit(name, data, tmp_path_factory.mktemp(name))) for name in MODELS}


@pytest.fixture
def killed(tmp_path, request):
    """Runs a program that imports this file, and sends a signal to it some time after it has started to work."""

    # By a name that a process finds from anywhere.
    (tmp_path / "tests_of_faults.py").symlink_to(request.path)

    def start(code, arguments):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout.readline() == "starts\n"
        return process

    def run(code, *arguments, after, number):
        while True:
            process = start(code, arguments)
            try:
                process.communicate(timeout=after)
            except subprocess.TimeoutExpired:
                break
            # A fast machine was done before.
            after /= 2
        process.send_signal(number)
        # The status says little: Lightning ends in good order on SIGTERM, with 0.
        process.communicate(timeout=120)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [("Pradot", signal.SIGINT), ("Pradot", signal.SIGTERM), ("Pradot", signal.SIGKILL), ("WtFlow", signal.SIGKILL)],
)
def test_a_killed_fit_leaves_whole_checkpoints_and_resumes(name, number, data, tmp_path, killed, uninterrupted):
    after = random.Random(f"{name} {number}").uniform(0.3, 2.0)
    folder = tmp_path / "killed"
    killed(FIT, name, data, folder, after=after, number=number)
    found = sorted(folder.rglob("*.ckpt"))
    for path in found:
        assert isinstance(KINDS[name].load_from_checkpoint(path), KINDS[name])
    resumed = learned(fit(name, data, tmp_path / "resumed", found[-1] if found else None))
    assert resumed.keys() == uninterrupted[name].keys()
    for key, value in uninterrupted[name].items():
        # Sums are rounded by where a tensor lies in memory.
        torch.testing.assert_close(resumed[key], value, atol=1e-4, rtol=1e-4, msg=key)


def export(folder, number):
    """Publish the files of an export. Each contains the export's number."""
    with staged(folder, ExportType.OPENVINO) as staging:
        weights = staging / "weights" / "openvino"
        weights.mkdir(parents=True)
        for name in ("model.xml", "model.bin"):
            (weights / name).write_text(str(number))
        report = {"bytes": {"model.xml": 1, "model.bin": 1}, "number": number}
        (weights / "model.parity.json").write_text(json.dumps(report))


def exported(folder):
    """Number of the export that wrote each file, by file name."""
    numbers = {path.name: json.loads(path.read_text()) for path in (folder / "weights/openvino").glob("*")}
    return {name: number["number"] if isinstance(number, dict) else number for name, number in numbers.items()}


def whole(number):
    return dict.fromkeys(("model.xml", "model.bin", "model.parity.json"), number)


@pytest.fixture
def break_off(monkeypatch):
    """Interrupts an export when it moves a file: once, or permanently as if the process were killed."""

    @contextmanager
    def breaking(moves, for_good):
        move, moved = Path.replace, []

        def moving(*arguments, **settings):
            moved.append(arguments)
            if len(moved) == moves + 1 or (for_good and len(moved) > moves):
                raise KeyboardInterrupt
            return move(*arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", moving)
            if for_good:
                # A killed process cleans nothing up.
                patch.setattr(Path, "unlink", moving)
                patch.setattr(shutil, "rmtree", moving)
            with pytest.raises(KeyboardInterrupt):
                yield

    return breaking


@pytest.mark.parametrize("moves", range(6))
def test_an_export_that_is_killed_leaves_no_parts_of_two(tmp_path, break_off, moves):
    export(tmp_path, 1)
    with break_off(moves, for_good=True):
        export(tmp_path, 2)
    left = exported(tmp_path)
    assert len(set(left.values())) <= 1
    assert left == whole(1) or "model.parity.json" not in left
    assert "model.bin" in left or "model.xml" not in left
    export(tmp_path, 3)
    assert exported(tmp_path) == whole(3)


@pytest.mark.parametrize("moves", range(3))
def test_a_first_export_that_is_killed_leaves_no_graph_without_weights_and_is_replaced(tmp_path, break_off, moves):
    with break_off(moves, for_good=True):
        export(tmp_path, 1)
    left = exported(tmp_path)
    assert "model.parity.json" not in left
    assert "model.bin" in left or "model.xml" not in left
    export(tmp_path, 2)
    assert exported(tmp_path) == whole(2)


@pytest.mark.parametrize("moves", range(6))
def test_an_export_that_is_interrupted_leaves_the_earlier_one_whole(tmp_path, break_off, moves):
    export(tmp_path, 1)
    with break_off(moves, for_good=False):
        export(tmp_path, 2)
    assert exported(tmp_path) == whole(1)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_an_export_keeps_the_files_of_others(tmp_path, caplog):
    folder = tmp_path / "weights/openvino"
    folder.mkdir(parents=True)
    theirs = {"model.xml": "graph of PaDiM", "model.bin": "weights of PaDiM", "notes.txt": "notes", "other.bin": "2"}
    for name, content in theirs.items():
        (folder / name).write_text(content)
    for number in (1, 2):
        export(tmp_path, number)
    renamed = {name.replace("model.", "model.earlier-1."): content for name, content in theirs.items()}
    left = {path.name: path.read_text() for path in folder.iterdir() if path.name not in whole(2)}
    assert left == renamed
    assert [(folder / name).read_text() for name in ("model.xml", "model.bin")] == ["2", "2"]
    assert len([record for record in caplog.records if "is kept as model.earlier-1." in record.message]) == 2


def test_a_report_does_not_speak_for_a_file_that_was_changed_since(tmp_path):
    export(tmp_path, 1)
    folder = tmp_path / "weights/openvino"
    (folder / "model.xml").write_text("edited by hand")
    export(tmp_path, 2)
    assert {path.name: path.read_text() for path in folder.glob("*.xml")} == {
        "model.xml": "2",
        "model.earlier-1.xml": "edited by hand",
    }
    # The edited graph may need its old weights.
    assert {path.name: path.read_text() for path in folder.glob("*.bin")} == {
        "model.bin": "2",
        "model.earlier-1.bin": "1",
    }


def test_what_a_killed_export_left_behind_is_removed_a_day_later(tmp_path):
    left_behind, at_work = tmp_path / ".export-killed", tmp_path / ".export-at-work"
    unique = tmp_path / ".export-with-the-only-copy"
    for folder in (left_behind, at_work, unique):
        (folder / "weights/torch").mkdir(parents=True)
    (unique / "earlier/torch").mkdir(parents=True)
    (unique / "earlier/torch/model.pt").write_text("1")
    for folder in (left_behind, unique):
        os.utime(folder, (time.time() - 100_000,) * 2)
    export(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"weights", at_work.name, unique.name}


@contextmanager
def file_size_limit(size):
    """A limit of the size of files, which the system refuses to exceed as it refuses to write to a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_while_a_checkpoint_is_written_is_an_error_and_leaves_no_part_of_it(data, tmp_path):
    with file_size_limit(2**18), pytest.raises(OSError, match="File too large"):
        fit("Pradot", data, tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_full_disk_under_the_feature_cache_is_an_error_before_anything_is_written():
    features = {"layer1": torch.zeros(1, 64, 16, 16)}
    with file_size_limit(2**20), pytest.raises(OSError, match=r"3\.3 MB .* feature_cache") as caught:
        allocate(features, 50, "disk", 0.5, torch.device("cpu"))
    assert caught.value.errno in {errno.EFBIG, errno.ENOSPC}


def test_two_fits_at_once_have_feature_caches_of_their_own():
    features = {"layer1": torch.zeros(1, 4, 2, 2)}
    one, other = (allocate(features, 3, "disk", 0.5, torch.device("cpu")) for _ in range(2))
    one.features["layer1"].fill_(1)
    other.features["layer1"].fill_(2)
    assert float(one.features["layer1"].max()) == 1


@pytest.mark.parametrize("kind", ["to_torch", "to_onnx", "to_openvino"])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_export(kind, tmp_path):
    (tmp_path / "file").touch()
    arguments = {} if kind == "to_torch" else {"input_size": (64, 64)}
    model = Pradot(prototypes_per_cell=1, whitened_channels=16, **SHARED)
    with pytest.raises(OSError, match="file"):
        getattr(model, kind)(tmp_path / "file" / "export", **arguments)


OFFLINE = "import sys\nfrom pathlib import Path\nfrom anomalib_ot.offline import offline_backbone\n"
OFFLINE += "print(offline_backbone(Path(sys.argv[1])))"


@pytest.mark.slow
def test_processes_that_make_the_offline_backbone_at_once_agree(backbone, tmp_path):
    def make(_):
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", OFFLINE, tmp_path], capture_output=True, text=True, check=True
        ).stdout.strip()

    with ThreadPoolExecutor(3) as pool:
        names = set(pool.map(make, range(3)))
    (name,) = names
    ours, theirs = (load_file(Path(each.partition(":")[2]) / "model.safetensors") for each in (name, backbone))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["tf_efficientnet_lite0"]
