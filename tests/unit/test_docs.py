"""Tests of the documentation: its examples run, and the names, files and commands in it exist."""

import ast
import doctest
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI
from anomalib.models.components import AnomalibModule
from jsonargparse import ArgumentParser

import anomalib_ot
from anomalib_ot import Duo, Foct, Pradot, WtFlow, cli
from anomalib_ot.shipped import shipped_files

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "anomalib_ot"
PAGES = sorted(
    [
        *(
            ROOT / name
            for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "SECURITY.md")
        ),
        *(ROOT / "docs").rglob("*.md"),
        *SOURCE.glob("models/*/README.md"),
    ]
)
MODELS = {"foct": Foct, "pradot": Pradot, "wt_flow": WtFlow, "duo": Duo}
# Values for placeholders: any name that the type of the option accepts.
STANDS_FOR = {"$BACKBONE": "resnet18", "$(anomalib-ot weights)": "resnet18"} | {
    f"$(anomalib-ot configs --name {each})": str(path) for each, path in shipped_files().items()
}
MODULES = [
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    for path in sorted(SOURCE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


def name(path):
    return str(path.relative_to(ROOT))


def text(path):
    return path.read_text(encoding="utf-8")


def commands(path):
    """Commands of a page's shell blocks, as words."""
    blocks = re.findall(r"^ *```shell\n(.*?)^ *```", text(path), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for placeholder, value in STANDS_FOR.items():
            line = line.replace(placeholder, value)  # noqa: PLW2901
        words = shlex.split(line, comments=True)
        if words:
            found.append(words)
    return found


def slugs(path):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text(path), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# A command on several pages is tested once.
_FIRST = {tuple(words): path for path in reversed(PAGES) for words in reversed(commands(path))}
COMMANDS = {f"{name(path)}: {' '.join(words)}": list(words) for words, path in _FIRST.items()}


@pytest.fixture(scope="module")
def host():
    """The parser of the command ``anomalib``."""
    command = AnomalibCLI.__new__(AnomalibCLI)
    command.parser = command.init_parser(exit_on_error=False)
    command.subcommand_parsers, command.subcommand_method_arguments = {}, {}
    command.add_subcommands(exit_on_error=False)
    return command.parser


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0
    assert not [*tmp_path.iterdir()], "an example has written files"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not anchor or anchor in slugs(found), target


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_pictures_and_included_files_are_there(path):
    for target in re.findall(r"^```\{(?:image|include)\} (\S+)$", text(path), re.MULTILINE):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_no_line_is_a_comment_that_the_site_leaves_out(path):
    """MyST takes a line that begins with a percent sign for one."""
    assert not re.findall(r"^%.*", text(path), re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_paths_and_modules_that_are_named_exist(path):
    named = re.findall(r"(?:configs|benchmarks|notebooks|tests|docs)/[\w./-]+\.(?:yaml|csv|py|ipynb|md)", text(path))
    assert not [each for each in named if not (ROOT / each).exists()]
    modules = re.findall(r"python -m (benchmarks\.\w+)", text(path).replace("\n", " "))
    assert not [each for each in modules if not (ROOT / each.replace(".", "/")).with_suffix(".py").exists()]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_plans_and_configurations_that_are_named_are_shipped(path):
    assert {*re.findall(r"compare --plan (\w+)", text(path))} <= {*shipped_files("compare")}
    assert {*re.findall(r"anomalib-ot configs --name ([\w/]+)", text(path))} <= {*shipped_files()}


def test_tables_of_results_are_those_of_the_kept_runs():
    for page, table in importlib.import_module("benchmarks.readme_tables").tables():
        assert table in text(ROOT / page)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_are_understood(words, host, monkeypatch):
    monkeypatch.chdir(ROOT)
    if words[0] == "anomalib":
        _parse_for_host(host, words[1:])
    elif words[0] == "anomalib-ot":
        subcommand, *arguments = cli._with_options(words[1:])
        _parse_for(cli._SUBCOMMANDS[subcommand], arguments)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", text(ROOT / "Makefile"), re.MULTILINE)
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
        _parse_for(importlib.import_module(words[2]).main, words[3:])
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"(?:^| )(?:anomalib-ot|\.)\[([\w,]+)\]", " ".join(words))
        known = re.findall(r"^(\w+) = \[", text(ROOT / "pyproject.toml"), re.MULTILINE)
        assert {each for extra in extras for each in extra.split(",")} <= {*known}


@pytest.mark.parametrize("words", [words for words in COMMANDS.values() if "Folder" in words], ids=" ".join)
def test_folders_that_are_split_at_random_have_a_seed(words):
    module = words[words.index("Folder") - 1]
    assert f"{module}.seed" in words


def _parse_for_host(parser, arguments):
    if "--model.help" in arguments or "--print_config" in arguments:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(arguments)
        assert stop.value.code == 0
        return
    parser.parse_args(arguments)


def _parse_for(function, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function, as_positional=False)
    parser.parse_args(arguments)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_python_examples_import_what_exists(path):
    for block in re.findall(r"^```python\n(.*?)^```", text(path), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert not [each.name for each in node.names if not hasattr(module, each.name)]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_options_that_are_named_are_arguments_of_a_model(path):
    options = re.findall(r"--model\.(\w+)", text(path))
    models = [MODELS[path.parent.name]] if path.parent.name in MODELS else [*MODELS.values()]
    known = {"help", *(each for model in models for each in inspect.signature(model).parameters)}
    # Model cards also name settings of other models.
    known |= {*inspect.signature(AnomalibModule).parameters}
    assert {*options} <= known


@pytest.mark.parametrize("path", [SOURCE / "models" / model / "README.md" for model in MODELS], ids=name)
def test_model_card_is_complete(path):
    wanted = {"intended-use", "how-it-works", "training-data", "results", "limits"}
    assert wanted <= slugs(path)
    picture = ROOT / "docs" / f"failures_{path.parent.name}.png"
    assert f"docs/{picture.name}" in text(path)
    assert picture.stat().st_size < 200_000


def test_who_asks_which_model_to_take_is_answered_with_one_default_and_one_command_each():
    page = ROOT / "docs/guides/choosing.md"
    answers = re.findall(r"^\| [^|]+ \| `(\w+)` \|", text(page), re.MULTILINE)
    trained = [words[words.index("--model") + 1] for words in commands(page) if words[:2] == ["anomalib", "train"]]
    (default,) = re.findall(r"^\*\*Take `(\w+)`, unless", text(page), re.MULTILINE)
    assert sorted(answers) == sorted(trained) == ["Duo", "Foct", "Pradot", "WtFlow"]
    assert trained[0] == answers[-1] == default


def test_reference_lists_the_public_names():
    listed = {}
    for path in (ROOT / "docs" / "reference").glob("*.md"):
        for module, names in re.findall(
            r"^\*\*Public names of `([\w.]+)`:\*\* (.*?)\.$", text(path), re.DOTALL | re.MULTILINE
        ):
            listed[module] = re.findall(r"`(\w+)`", names)
    public = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCE.rglob("*.py")
        if re.search(r"^__all__ = ", text(path), re.MULTILINE)
    }
    assert listed == {module: sorted(importlib.import_module(module).__all__) for module in public}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_python_examples_import_public_names(path):
    for block in re.findall(r"^```python\n(.*?)^```", text(path), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "anomalib_ot":
                assert {each.name for each in node.names} <= {*importlib.import_module(node.module).__all__}


def test_changelog_and_citation_name_the_version():
    assert f"## {anomalib_ot.__version__}" in text(ROOT / "CHANGELOG.md")
    assert f"version: {anomalib_ot.__version__}" in text(ROOT / "CITATION.cff")


@pytest.mark.slow
@pytest.mark.parametrize("builder", ["html", "doctest"])
def test_site_builds_without_a_warning(builder, tmp_path):
    pytest.importorskip("furo", reason="the site needs the extra docs")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "--builder", builder]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "site"), "--doctree-dir", str(tmp_path / "trees")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
