"""What comes with the package is found by name, wherever the command is typed."""

from pathlib import Path

import pytest
import yaml

from anomalib_ot.cli import main
from anomalib_ot.shipped import shipped_file


def test_a_plan_is_run_by_its_name_or_path_and_an_unknown_one_is_told_where_the_others_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = shipped_file("quick", "compare").parent
    # Read, then refused for what is none of its models, before anything runs.
    for plan in ("quick", str(folder / "quick.yaml")):
        with pytest.raises(SystemExit, match="anomalib-ot: the baseline 'x' is not among Pradot, WtFlow, PaDiM"):
            main(["compare", "--plan", plan, "--baseline", "x"])
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--plan", "quik"])
    assert (
        "no file quik, and no shipped file of this name; choose from dino, few_shot, mpdd_few_shot," in stop.value.code
    )
    assert stop.value.code.endswith(str(folder))


def test_a_file_of_ones_own_wins_over_a_shipped_plan_of_the_same_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("quick").write_text(yaml.safe_dump({"baseline": "mine", "models": {"a": {"class_path": "Padim"}}}))
    with pytest.raises(SystemExit, match="a comparison needs data"):
        main(["compare", "--plan", "quick"])


def test_configurations_are_listed_with_paths_and_one_is_printed_for_the_hosts_command(capsys):
    main(["configs"])
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"compare/quick", "data/few_shot", "model/pradot"} <= listed.keys()
    for name, path in listed.items():
        main(["configs", "--name", name])
        assert capsys.readouterr().out == f"{path}\n"
        assert yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    others = "no shipped file of this name; choose from compare/dino,"
    with pytest.raises(SystemExit, match=f"no file model/x, and {others}"):
        main(["configs", "--name", "model/x"])
