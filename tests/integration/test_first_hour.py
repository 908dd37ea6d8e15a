"""The first hour with the wheel: the commands of README and guides, typed in a folder of pictures.

What they train is small, and each runs in a forked process. All else is as typed.
"""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from anomalib.deploy import OpenVINOInferencer

from anomalib_ot import Assembly
from anomalib_ot.data import read_picture

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
GUIDES = [
    f"docs/guides/{name}.md"
    for name in (
        "choosing",
        "compare",
        "decide",
        "deployment",
        "explain",
        "few_shot",
        "monitor",
        "settings",
        "your_data",
    )
]
PAGES = ["README.md", *GUIDES]
# Plans take hours, a watch does not end, and what installs or tests is not for this folder. test_decide.py trains for a
# rate of false alarms, and test_fit_command.py fits.
LEFT_OUT = re.compile(
    r"--plan|--watch|^anomalib train .*false_alarm_rate|^anomalib-ot fit|^(make|pip|python|nox|\.) |configs\b.*#"
)

# Trainings on as many pixels and as long as by default would take most of an hour.
SMALL = {
    "(--model Pradot|model/pradot)": "--model.prototypes_per_cell 1 --model.whitened_channels 16 --model.epochs 2",
    "--model WtFlow": "--model.width 16 --model.whitened_channels 16 --model.training_steps 20",
    "--model Foct": "--model.rotations 2",
    "--model Duo": "--model.pradot '{prototypes_per_cell: 1, epochs: 2}' --model.wt_flow '{training_steps: 20}'",
}
SIZE = (128, 128)
PIXELS = f"'[{SIZE[0]}, {SIZE[1]}]'"


def small(line):
    """A command with what makes its training take seconds."""
    if " compare " in line:
        return f"{line.partition('  #')[0]} --image_size {PIXELS}"
    for model, settings in SMALL.items():
        if re.search(rf"^anomalib (train|fit) .*{model}\b", line):
            return f"{line} {settings} --model.image_size {PIXELS}"
    return line


def commands(page):
    """The lines of a page's shell blocks, whole where they go on."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```shell\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not LEFT_OUT.search(line)]


SERVER = Path(__file__).with_name("command_server.py")
CLIENT = """#!{python} -IS
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    request = json.dumps([{module!r}, sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    sys.exit(server.recv(1)[0])
"""


@pytest.fixture(scope="module")
def plant(installed):
    """A folder with pictures of one's own, by all the names that the pages use, and the commands of the wheel."""
    folder = installed / "work"
    data = Assembly(folder / "datasets", n_train=12, n_validation=3, n_test=4)
    data.prepare_data()
    tray = folder / "datasets" / "tray"
    for name in ("parts", "DATA"):
        shutil.copytree(tray / "train" / "good", folder / name / "good")
        shutil.copytree(tray / "test" / "structural_anomalies", folder / name / "bad")
    shutil.copytree(tray / "validation" / "good", folder / "parts" / "good_later")
    masks(tray / "ground_truth" / "structural_anomalies", folder / "parts" / "masks")
    bottle = folder / "DATA" / "bottle"
    shutil.copytree(tray / "train", bottle / "train")
    for kind in ("good", "structural_anomalies"):
        shutil.copytree(tray / "test" / kind, bottle / "test" / kind)
    masks(tray / "ground_truth" / "structural_anomalies", bottle / "ground_truth" / "structural_anomalies", "_mask")
    shutil.copytree(tray, folder / "DATA" / "breakfast_box")
    shutil.copytree(tray / "test" / "logical_anomalies", folder / "IMAGES")
    shutil.copytree(tray / "validation" / "good", folder / "good")
    (folder / "line").mkdir()
    for name, picture in zip(("x", "y"), sorted((tray / "test" / "good").iterdir()), strict=False):
        shutil.copy(picture, folder / "line" / f"{name}.png")
    for name, module in (("anomalib", "anomalib.cli.cli"), ("anomalib-ot", "anomalib_ot.cli")):
        path = installed / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(CLIENT.format(python=sys.executable, path=str(installed / "socket"), module=module))
        path.chmod(0o755)
    command = [sys.executable, SERVER, installed / "socket"]
    with subprocess.Popen(command, env=environment(installed)) as server:
        while not (installed / "socket").exists():
            assert server.poll() is None
            time.sleep(0.1)
        try:
            yield folder
        finally:
            server.kill()


def environment(installed):
    """Environment in which the commands of the wheel run, and its modules."""
    paths = {
        "PATH": os.pathsep.join([str(installed / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(installed / "site"), os.environ.get("PYTHONPATH")])),
    }
    return {**os.environ, **paths}


def masks(source, target, suffix=""):
    """The masks of a folder of the LOCO layout, one file for each picture."""
    target.mkdir(parents=True)
    for path in sorted(source.glob("*/000.png")):
        shutil.copy(path, target / f"{path.parent.name}{suffix}.png")


def typed(plant, lines):
    """What commands print, typed one after another into a shell."""
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -e", 'BACKBONE="$(anomalib-ot weights)"', *map(small, lines)])],
        cwd=plant,
        env=environment(plant.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def verdicts(output):
    """The tables that a page's predictions have left."""
    paths = re.findall(r"^(\S+predictions\.csv): \d+ of \d+ images are anomalous", output, flags=re.MULTILINE)
    for path in paths:
        with Path(path).open(newline="", encoding="utf-8") as file:
            yield Path(path), {Path(row["path"]).name: row for row in csv.DictReader(file)}


def test_readme_gives_verdicts_an_export_with_the_same_scores_and_reasons(plant):
    output = typed(plant, commands("README.md"))
    ((path, rows),) = verdicts(output)
    assert path.is_relative_to(plant.resolve() / "results")
    assert rows.keys() == {each.name for each in (plant / "IMAGES").iterdir()}
    for row in rows.values():
        assert row["label"] == ("anomalous" if float(row["score"]) > float(row["threshold"]) else "normal")
    assert (plant / "results/explain/index.html").is_file()
    assert (plant / "results/line/report.html").is_file()
    exported = path.parents[1] / "weights/openvino/model.xml"
    assert str(exported) in output
    runner = OpenVINOInferencer(exported, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    for name, row in rows.items():
        prediction = runner.predict(read_picture(plant / "IMAGES" / name, size=SIZE))
        assert float(np.squeeze(prediction.pred_score)) == pytest.approx(float(row["score"]), abs=1e-5)


@pytest.fixture(scope="module")
def checkpoint(plant):
    """The checkpoint that the guides begin with, by the names that they use."""
    (line,) = [each for each in commands("docs/guides/install.md") if " train " in each and "--data Assembly" in each]
    typed(plant, [f"{line} --seed_everything 0"])
    (trained,) = (plant / "results/Pradot/Assembly").glob("*/v0/weights/lightning/model.ckpt")
    for name in ("MODEL.ckpt", "model.ckpt"):
        shutil.copy(trained, plant / name)


@pytest.mark.parametrize("page", GUIDES)
@pytest.mark.usefixtures("checkpoint")
def test_the_commands_of_a_guide_run_as_typed(plant, page):
    output = typed(plant, commands(page))
    for _, rows in verdicts(output):
        assert rows
    for written in re.findall(r"^(/\S+\.(?:csv|html|xml|ckpt))$", output, flags=re.MULTILINE):
        assert Path(written).is_file()


def test_every_page_has_commands():
    assert all(shlex.split(line, comments=True) for page in PAGES for line in commands(page))
    assert {page for page in PAGES if not commands(page)} == set()
