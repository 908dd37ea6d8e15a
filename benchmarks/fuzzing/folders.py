"""Folders that contain files of the user, and names that could lead to them."""

import json
import random
import shutil
from pathlib import Path, PureWindowsPath
from unittest.mock import patch

from anomalib_ot import comparison
from anomalib_ot.comparison import Key, Plan, Record
from anomalib_ot.comparison.record import pack_record, read_record, write_record
from anomalib_ot.drawing.pictures import name_of
from anomalib_ot.explain.explanation import explain
from anomalib_ot.files import MARKER, claim, replacing
from anomalib_ot.offline import offline_backbone

from .mutation import Changed
from .samples import METRICS, kept_predictions

# Parts of labels and image names.
PARTS = (
    *(".", "..", "/", "\\", ":", "C:", "~", "%2e", " ", "\n", "\t", "\0", "*", "?", '"', "<", ">", "|", "+", "$HOME"),
    *("con", "NUL", "com1.txt", "é", "e\u0301", "\u202e", "\ufeff", "字", "\U0001f9ff", "a", "A", "x" * 300, "{}", "-"),
)


def label(generator: random.Random, samples: Changed) -> None:
    """Labels of models and data and an image name, which must not lead out of the output folder."""
    words = ["".join(generator.choices(PARTS, k=generator.choice((1, 1, 2, 3, 5)))) for _ in range(4)]
    first, second, data, category = words
    picture = Path(name_of(f"{samples.root}/{first}/{second}.png".replace("\0", "")))
    assert not picture.is_absolute(), picture  # noqa: S101
    assert ".." not in picture.parts, picture  # noqa: S101
    config = {"class_path": "Padim"}
    plan = Plan(
        {first: config, second: config},
        {data: {"class_path": "MVTecAD", "categories": [category, "bottle"]}},
        ensembles=(f"{first}+{second}",) if generator.random() < 0.5 else (),  # noqa: PLR2004
    )
    runs = samples.root / "labels" / "runs"
    keys = [job.key for job in plan.jobs()]
    keys += [Key(category, each, shots, seed) for each in plan.ensembles for category, shots, seed in plan.draws()]
    try:
        for key in keys:
            folder = write_record(runs, Record(key, error="why")).folder
            assert folder is not None  # noqa: S101
            assert folder.resolve().relative_to(runs.resolve()).parts == key.folder.parts, folder  # noqa: S101
            assert PureWindowsPath(key.folder).parts == key.folder.parts, folder  # noqa: S101
            assert read_record(folder).key == key, key  # noqa: S101
        assert len({key.folder for key in keys}) == len(keys), keys  # noqa: S101
    finally:
        shutil.rmtree(runs.parent, ignore_errors=True)


def output(generator: random.Random, samples: Changed) -> None:
    """An output folder that contains files of the user, none of which may be lost."""
    folder = samples.root / "outputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for _ in range(generator.choice((0, 1, 1))):
        # The files of an earlier run.
        _write(generator.choice(WRITERS), folder, samples)
    _put(generator, folder)
    others = _contents(folder)
    try:
        _write(generator.choice(WRITERS), folder, samples)
    finally:
        lost = [path for path, content in others.items() if _content(path) != content]
        assert not lost, f"lost or changed: {lost}"  # noqa: S101


WRITERS = ("run", "report", "replacing", "claim", "weights", "explain", "compare")
PLACES = (
    *("", "runs", "runs/tray", "runs/tray/Pradot", "runs/tray/Pradot/seed-0", "runs/tray/Pradot/seed-0/maps"),
    *("replaced", "claimed", "tf_efficientnet_lite0", "Pradot", "good", "good/000", "good/000/views"),
)
NAMES = (
    *("notes.txt", "index.html", "result.json", "predictions.csv", "maps.npz", "report.md", "report.html"),
    *("results.csv", "results.json", "model.ckpt", "config.json", "SHA256SUMS", "evidence.json", "one", "two", MARKER),
)


def _put(generator: random.Random, folder: Path) -> None:
    """Put files of the user, links and folders into a folder."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "kept.txt").write_text("work of days")
    for _ in range(generator.choice((1, 2, 3))):
        path = folder / generator.choice(PLACES) / generator.choice(NAMES)
        if path.exists() or path.is_symlink() or any(each.is_file() for each in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        how = generator.choice(("file", "file", "folder", "link", "dangling"))
        if how == "file":
            lies = json.dumps(generator.choice(([], {}, None, 1, "notes.txt", [["notes.txt"]])))
            path.write_text(lies if path.name == MARKER else "work of days")
        elif how == "folder":
            path.mkdir()
            (path / "inside.txt").write_text("work of days")
        elif how == "link":
            path.symlink_to(elsewhere, target_is_directory=True)
        else:
            path.symlink_to(folder.parent / "nowhere")


def _contents(folder: Path) -> dict[Path, str]:
    """Files of the user and their content."""
    found = [*folder.rglob("*"), *(folder.parent / "elsewhere").rglob("*")]
    return {path: content for path in found if (content := _content(path)) == "work of days"}


def _content(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _write(how: str, folder: Path, samples: Changed) -> None:
    if how == "run":
        write_record(folder / "runs", Record(Key("tray", "Pradot"), metrics=METRICS), kept_predictions())
    elif how == "report":
        record = read_record(samples.root / "runs" / Key("tray", "Pradot").folder)
        comparison.write_report([record], folder, "Report")
    elif how == "replacing":
        with replacing(folder / "replaced") as partial:
            (partial / "one").write_text("ours")
    elif how == "claim":
        claim(folder / "claimed", "one", "two")
        (folder / "claimed" / "one").write_text("ours")
    elif how == "weights":
        offline_backbone(folder)
    elif how == "explain":
        good = samples.root / "tray" / "test" / "good"
        explain(samples.root / "Pradot.ckpt", str(good), folder, count=1, views=["evidence"], formats=["png"])
    else:
        _compare(folder)


def _compare(folder: Path) -> None:
    """A comparison whose runs return the sample predictions."""
    plan = Plan(
        {"Pradot": {"class_path": "Pradot"}, "Padim": {"class_path": "Padim"}},
        {"tray": {"class_path": "Assembly"}},
        ensembles=("Pradot+Padim",),
    )
    execution = "anomalib_ot.comparison.execution"

    def run_job(job: comparison.Job, *_: object) -> dict[str, bytes]:
        return pack_record(Record(job.key, job.config, METRICS, costs={"fit_s": 1.0}), kept_predictions())

    with patch(f"{execution}.run_job", run_job), patch(f"{execution}._check_data"):
        comparison.compare(plan, folder)
