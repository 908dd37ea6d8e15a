"""What GitHub, pre-commit and nox read agrees with the project's own files."""

import ast
import re
from itertools import chain
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted({*(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")} - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"})


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow):
    return list(chain.from_iterable(job["steps"] for job in workflow["jobs"].values()))


def sessions_of_noxfile():
    """Names of all sessions, as ``nox --list`` has them, without nox."""
    content = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    names = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in content.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"PYTHONS", "CHANGING"}
    }
    found = set()
    for node in content.body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            found |= {*_sessions(node, names)}
    return found


def _sessions(function, names):
    calls = {ast.unparse(each.func): each for each in function.decorator_list}
    pythons = _value(calls["nox.session"].keywords[0].value, names)
    yield from (
        f"{function.name}{python}{parameter}"
        for python in ([f"-{each}" for each in pythons] if isinstance(pythons, list) else [""])
        for parameter in _parameters(calls.get("nox.parametrize"), names)
    )


def _parameters(call, names):
    if call is None:
        return [""]
    name, values = (_value(each, names) for each in call.args)
    return [f"({name}={value!r})" for value in values]


def _value(expression, names):
    return eval(compile(ast.Expression(expression), "noxfile.py", "eval"), {}, dict(names))


def sessions_that_run():
    found = {}
    for path in WORKFLOWS:
        workflow = read(path)
        for job in workflow["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {}).get("session", [])
            named = re.findall(r"nox --session ([\w.-]+)", " ".join(step.get("run", "") for step in job["steps"]))
            found.setdefault(path.stem, set()).update(matrix, named)
    return found


def constraint(package):
    (version,) = re.findall(
        rf"^{package}==([\w.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    return version


def test_workflows_run_the_sessions_of_nox_and_leave_out_none():
    ran = sessions_that_run()
    assert ran["release"] <= ran["tests"], "what is released is tested with each change"
    assert set().union(*ran.values()) == sessions_of_noxfile()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_takes_actions_by_major_version_and_rights_one_by_one(path):
    workflow = read(path)
    actions = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert actions
    assert not [each for each in actions if not re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", each)]
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_release_is_trusted_by_its_identity_and_holds_no_token():
    path = ROOT / ".github" / "workflows" / "release.yml"
    publish = read(path)["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"
    assert "secrets." not in path.read_text(encoding="utf-8")


def test_actions_are_of_one_version_throughout():
    actions = {step["uses"] for path in WORKFLOWS for step in steps(read(path)) if "uses" in step}
    assert len({each.partition("@")[0] for each in actions}) == len(actions)


def test_pre_commit_runs_ruff_and_mypy_of_the_versions_tested_together():
    ruff, local = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert ruff["rev"] == f"v{constraint('ruff')}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    # No version of its own: it is that which make installs.
    assert [hook["entry"] for hook in local["hooks"]] == [".venv/bin/mypy"]
    assert constraint("mypy")


def test_pythons_that_are_tested_are_those_that_the_package_names():
    classifiers = re.findall(
        r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )
    assert {f"newest-{each}" for each in classifiers} == {
        each for each in sessions_of_noxfile() if each.startswith("newest")
    }


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form_asks_each_thing_once(path):
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    asked = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert asked
    assert len(asked) == len({*asked})


def test_what_tests_read_is_in_the_source_distribution():
    included = re.search(
        r"^\[tool\.hatch\.build\.targets\.sdist\]\ninclude = \[(.*?)^\]",
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )[1]
    wanted = {
        ".github",
        ".pre-commit-config.yaml",
        "CODE_OF_CONDUCT.md",
        "SECURITY.md",
        "constraints.txt",
        "noxfile.py",
    }
    assert wanted <= {*re.findall(r'"([^"]+)"', included)}
