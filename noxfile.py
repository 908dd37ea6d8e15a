"""The quick tests on each Python and with the oldest versions of what we need.

After ``pip install nox``, ``nox --list`` names the sessions and ``nox --session oldest`` runs one. Each has an
environment of its own, some 7 GB with torch for graphics processors. The oldest versions come from ``pyproject.toml``,
so that its lower bounds are kept true.
"""

import nox
from packaging.requirements import Requirement

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
NEEDED = {each.name: each for each in map(Requirement, PROJECT["dependencies"])}
EXTRAS = ".[offline,openvino,sam,dev]"
# Those whose releases have changed most under us; torchvision fits one torch alone.
CHANGING = ["anomalib", "lightning", "numpy", "pandas", "POT", "timm", "torch"]
TOGETHER = {"torch": ["torchvision"]}

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["oldest", "newest"]


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The lower bound of every dependency at once, on the oldest Python."""
    quick_tests(session, [lower_bound(name) for name in NEEDED])


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The newest versions that the bounds and the Python allow."""
    quick_tests(session, [])


@nox.session(python="3.11")
@nox.parametrize("package", CHANGING)
def one_old(session: nox.Session, package: str) -> None:
    """The lower bound of one dependency, with the newest of the others that go with it."""
    quick_tests(session, [lower_bound(name) for name in (package, *TOGETHER.get(package, ()))])


@nox.session(python="3.11")
@nox.parametrize("major", [2, 3])
def pandas(session: nox.Session, major: int) -> None:
    """The newest pandas of a major version: with 3, text has a type of its own."""
    quick_tests(session, [f"pandas=={major}.*"])


def lower_bound(name: str) -> str:
    """A dependency, pinned to the oldest version that ``pyproject.toml`` allows."""
    needed = NEEDED[name]
    extras = f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""
    (oldest_version,) = [each.version for each in needed.specifier if each.operator == ">="]
    return f"{name}{extras}=={oldest_version}"


def quick_tests(session: nox.Session, pins: list[str]) -> None:
    """Install the project with some versions pinned, and run the unit tests that are not slow."""
    session.install("--editable", EXTRAS, *pins)
    session.run(
        "python", "-m", "pytest", "-m", "not slow", "tests/unit", *session.posargs, env={"OMP_NUM_THREADS": "1"}
    )
