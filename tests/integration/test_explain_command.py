"""``anomalib-ot explain`` and the visualizer of the stock command, on small models."""

import json
from pathlib import Path

import pytest
from anomalib.engine import Engine

from anomalib_ot import Assembly, Duo, FewShot, Foct, Pradot, WtFlow
from anomalib_ot.cli import main
from anomalib_ot.files import MARKER

pytestmark = pytest.mark.slow
SIZES = {"n_train": 4, "n_validation": 1, "n_test": 2, "num_workers": 0}
# What each model is made with, and the views that it then has.
MODELS = {
    "Foct": (Foct, {"rotations": 2, "online": True}, {"transport"}, {"foreground", "growth"}),
    "Pradot": (
        Pradot,
        {"prototypes_per_cell": 1, "epochs": 1, "batch_size": 4, "whitened_channels": 8},
        {"assignments", "restoration"},
        {"cells", "projection-layer2", "prototypes-layer2-0", "prototypes-layer2-0.3"},
    ),
    "WtFlow": (WtFlow, {"training_steps": 2, "batch_size": 4, "whitened_channels": 8}, {"flow"}, set()),
    "Duo": (
        Duo,
        {
            "pradot": {"prototypes_per_cell": 1, "epochs": 1, "whitened_channels": 8},
            "wt_flow": {"training_steps": 2, "whitened_channels": 8},
            "batch_size": 4,
        },
        {"assignments", "restoration", "flow"},
        {"cells", "projection-layer2", "prototypes-layer2-0", "prototypes-layer2-0.3"},
    ),
}
SHARED = {"layers": ["layer2"], "pre_trained": False, "image_size": (64, 64), "evaluator": False, "visualizer": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def fitted(root, tmp_path_factory):
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        kind, arguments, *_ = MODELS[name]
        data = Assembly(root, **SIZES)
        engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
        model = kind("test_resnet", **SHARED, **arguments)
        engine.fit(model, datamodule=FewShot(data, 2, 0) if name == "Foct" else data)
        engine.trainer.save_checkpoint(folder / "model.ckpt")
        return folder / "model.ckpt"

    return make


@pytest.mark.parametrize("name", MODELS)
def test_one_command_explains(fitted, root, tmp_path, capsys, name):
    *_, of_picture, of_model = MODELS[name]
    data = json.dumps({"class_path": "Assembly", "init_args": SIZES})
    path = fitted(name)
    arguments = ["--ckpt_path", str(path), "--data", data, "--root", str(root), "--output", str(tmp_path)]
    main(["explain", *arguments, "--formats", "[png]"])
    output, progress = capsys.readouterr()
    *lines, page = output.splitlines()[-4:]
    assert page == str(tmp_path / "index.html")
    assert len(lines) == 3
    # Nothing is said twice.
    assert not [line for line in lines if line in progress]
    assert all(", threshold 0.5 (raw " in line for line in lines)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    pictures = [line.partition(":")[0] for line in lines]
    expected = {"index.html", *(f"{picture}/evidence.json" for picture in pictures)}
    expected |= {f"{picture}/{view}.png" for picture in pictures for view in ("evidence", *of_picture)}
    expected |= {f"{name}/{view}.{'html' if view == 'cells' else 'png'}" for view in of_model}
    folders = {Path(each).parent.as_posix() for each in expected}
    assert written == expected | {(Path(folder) / MARKER).as_posix() for folder in folders}
    content = json.loads((tmp_path / pictures[0] / "evidence.json").read_text())
    assert content["model"] == name
    assert content["chosen_as"] == "highest score"
    calibration = MODELS[name][0].load_from_checkpoint(path, map_location="cpu").post_processor.image_calibration
    assert content["normal_pictures"] == len(calibration) >= 2
    above = int((calibration >= content["raw_score"]).sum())
    assert content["p_value"] == (1 + above) / (1 + len(calibration))
    total = sum(part["value"] for part in content["contributions"].values())
    assert total == pytest.approx(content["raw_score"], rel=1e-4)
    if content["p_value"] == content["lowest_p_value"]:
        assert f"the lowest that {content['normal_pictures']} good image" in lines[0]


def test_a_picture_from_the_line_is_explained_as_fully_as_one_of_the_data(fitted, root, tmp_path, capsys, monkeypatch):
    path = fitted("Pradot")
    data = json.dumps({"class_path": "Assembly", "init_args": SIZES})
    source = next((root / "tray" / "test" / "logical_anomalies").glob("*.png"))
    (tmp_path / "line").mkdir()
    (tmp_path / "line" / "x.png").write_bytes(source.read_bytes())
    monkeypatch.chdir(tmp_path)
    explain = ["explain", "--ckpt_path", str(path), "--data", data, "--root", str(root), "--formats", "[png]"]
    views = "[evidence, assignments, restoration, prototypes]"
    main([*explain, "--pictures", "line/x.png", "--views", views])
    line, page = capsys.readouterr().out.splitlines()[-2:]
    assert line.startswith("line/x: ")
    assert page == "results/explain/index.html"
    written = {each.name for each in (tmp_path / "results" / "explain" / "line" / "x").iterdir()}
    assert {"evidence.json", "evidence.png", "assignments.png", "restoration.png"} <= written
    of_line = json.loads((tmp_path / "results/explain/line/x/evidence.json").read_text())
    name = f"{source.parent.name}/{source.stem}"
    main([*explain, "--pictures", f"[{name}]", "--views", "[evidence]"])
    of_data = json.loads((tmp_path / "results" / "explain" / name / "evidence.json").read_text())
    assert of_line["score"] == of_data["score"]
    assert of_line["p_value"] == of_data["p_value"] is not None
    verdicts = []
    for rate in ("0.001", "0.999"):
        main([*explain, "--pictures", "line/x.png", "--views", "[evidence]", "--false_alarm_rate", rate])
        asked = json.loads((tmp_path / "results/explain/line/x/evidence.json").read_text())
        assert asked["threshold"] == 0.5
        assert (asked["verdict"] == "anomalous") == (asked["score"] > 0.5)
        verdicts.append(asked["score"])
    # A higher rate lowers the threshold, so that the same image is shown higher.
    assert verdicts[0] < verdicts[1]


@pytest.mark.parametrize("visualizer", ["ExplainingVisualizer", "anomalib_ot.explain.ExplainingVisualizer"])
def test_the_stock_command_explains_too(root, tmp_path, forked, visualizer):
    sizes = [f"--data.{name}={value}" for name, value in SIZES.items()]
    arguments = [
        *("train", "--model", "WtFlow", "--model.backbone", "test_resnet", "--model.layers", "[layer2]"),
        *("--model.pre_trained", "false", "--model.image_size", "[64, 64]", "--model.whitened_channels", "8"),
        *("--model.training_steps", "2", "--model.batch_size", "4", "--model.evaluator", "false"),
        *("--model.visualizer", visualizer, "--model.visualizer.count", "2"),
        *("--data", "Assembly", "--data.root", str(root), *sizes),
    ]
    forked(tmp_path, *arguments)
    (page,) = tmp_path.rglob("explain/index.html")
    assert len(list(page.parent.rglob("evidence.json"))) == 2
    assert len(list(page.parent.rglob("flow.png"))) == 2
    assert len(list(page.parent.with_name("images").rglob("*.png"))) == 6
