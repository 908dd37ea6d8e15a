"""What someone has who installed the wheel and has no checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from anomalib_ot.cli import main; main()"]


def run(installed, *arguments):
    path = os.pathsep.join(filter(None, [str(installed / "site"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=installed / "work",
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_plans_and_configurations_are_in_the_wheel_and_found_by_name(installed):
    listed = run(installed, "configs").stdout.splitlines()
    shipped = installed / "site" / "anomalib_ot" / "configs"
    assert listed
    assert all(str(shipped) in line for line in listed)
    files = {path.relative_to(shipped) for path in shipped.rglob("*.*")}
    assert files == {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.*")}
    # Read with its published numbers, then refused before anything runs.
    refused = run(installed, "compare", "--plan", "mvtec_ad", "--baseline", "x")
    assert "the baseline 'x' is not among Pradot, Pradot, defaults" in refused.stderr
