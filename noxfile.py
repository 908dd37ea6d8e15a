"""The sessions of the workflows in .github: quick tests with several versions, linters, documentation and the wheel.

After ``pip install nox``, ``nox --list`` lists the sessions and ``nox --session oldest`` runs one. Each session has its
own environment, which takes some 7 GB with torch for CUDA. The oldest versions are the lower bounds in
``pyproject.toml``, so that the bounds stay valid.
"""

from pathlib import Path

import nox
from packaging.requirements import Requirement

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
REQUIREMENTS = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
NEEDED = {each.name: each for each in map(Requirement, REQUIREMENTS)}
EXTRAS = ".[offline,openvino,sam,dev]"
# Dependencies whose releases have changed most. Each torchvision fits only one torch.
CHANGING = ["anomalib", "lightning", "numpy", "pandas", "POT", "timm", "torch"]
TOGETHER = {"torch": ["torchvision"]}
# The current state of the next anomalib release.
UPSTREAM = "anomalib @ git+https://github.com/open-edge-platform/anomalib@main"

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["oldest", "newest"]


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The lower bounds of all dependencies, on the oldest Python."""
    quick_tests(session, [lower_bound(name) for name in NEEDED])


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The newest versions that the bounds and the version of Python allow."""
    quick_tests(session, [])


@nox.session(python="3.11")
@nox.parametrize("package", CHANGING)
def one_old(session: nox.Session, package: str) -> None:
    """The lower bound of one dependency, with the newest compatible versions of the others."""
    quick_tests(session, [lower_bound(name) for name in (package, *TOGETHER.get(package, ()))])


@nox.session(python="3.11")
@nox.parametrize("major", [2, 3])
def pandas(session: nox.Session, major: int) -> None:
    """The newest pandas of a major version. Version 3 has a separate type for text."""
    quick_tests(session, [f"pandas=={major}.*"])


@nox.session(python="3.11")
def upstream(session: nox.Session) -> None:
    """The main branch of anomalib, to detect changes before their release."""
    quick_tests(session, [UPSTREAM])


@nox.session(python="3.11")
def slow(session: nox.Session) -> None:
    """The slow tests and the notebooks, in two processes, with all extras as in the Makefile."""
    session.install("--constraint", "constraints.txt", "--editable", ".[docs,offline,openvino,ray,sam,viz,dev]")
    arguments = ["--numprocesses", "2", "--dist", "loadscope", *session.posargs]
    session.run("python", "-m", "pytest", "-m", "slow", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Ruff and mypy, in the versions of constraints.txt."""
    session.install("--constraint", "constraints.txt", "--editable", EXTRAS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python="3.11")
def coverage(session: nox.Session) -> None:
    """The coverage of the numerics, with the lower bound in pyproject.toml."""
    session.install("--constraint", "constraints.txt", "--editable", EXTRAS)
    tests = ["tests/unit/transport", "tests/unit/metrics"]
    session.run("coverage", "run", "-m", "pytest", "-m", "not slow", *tests, env={"OMP_NUM_THREADS": "1"})
    session.run("coverage", "report")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """Build the documentation into dist/docs, with warnings as errors."""
    session.install("--constraint", "constraints.txt", "--editable", ".[docs,offline,openvino]")
    session.run("python", "-m", "sphinx", "--fail-on-warning", "--keep-going", "docs", "dist/docs")


@nox.session(python=[PYTHONS[0], PYTHONS[-1]])
def wheel(session: nox.Session) -> None:
    """Build both distributions, and train and export with the wheel outside the source tree."""
    session.install("build")
    session.run("python", "-m", "build", "--outdir", "dist")
    (built,) = Path("dist").resolve().glob("anomalib_ot-*.whl")
    session.install(f"anomalib-ot[offline,openvino] @ {built.as_uri()}")
    session.chdir(session.create_tmp())
    backbone = session.run("anomalib-ot", "weights", silent=True).strip()
    model = ["--model", "WtFlow", "--model.backbone", backbone, "--model.layers", "[blocks.4]"]
    session.run("anomalib", "train", *model, "--data", "Assembly")
    (checkpoint,) = Path("results/WtFlow/Assembly").glob("*/latest/weights/lightning/model.ckpt")
    session.run("anomalib", "export", "--model", "WtFlow", "--export_type", "openvino", "--ckpt_path", str(checkpoint))


def lower_bound(name: str) -> str:
    """A dependency, pinned to the oldest version that ``pyproject.toml`` allows."""
    needed = NEEDED[name]
    extras = f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""
    (oldest_version,) = [each.version for each in needed.specifier if each.operator == ">="]
    return f"{name}{extras}=={oldest_version}"


def quick_tests(session: nox.Session, pins: list[str]) -> None:
    """Install the project with pinned versions, and run the unit tests that are not slow."""
    session.install("--editable", EXTRAS, *pins)
    session.run(
        "python", "-m", "pytest", "-m", "not slow", "tests/unit", *session.posargs, env={"OMP_NUM_THREADS": "1"}
    )
