"""What a quick run leaves out of the products of parameters."""

import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TESTS = """
import pytest

@pytest.fixture(params=["x", "y"])
def kind(request):
    return request.param

@pytest.mark.in_turn
@pytest.mark.parametrize(("size", "reason"), [(1, "same"), (True, "same"), (2, "same"), (3, "other")])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_product(name, size, reason, kind):
    pass

@pytest.mark.in_turn
@pytest.mark.parametrize("name", ["a", "b"])
def test_list(name):
    pass

@pytest.mark.parametrize("name", ["a", "b"])
def test_without_the_marker(name, kind):
    pass
"""


def collected(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def test_each_value_of_the_longest_parameter_is_run_once_and_every_value_at_all(tmp_path):
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: slow\n    in_turn: in turn\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    whole, quick = collected(tmp_path), collected(tmp_path, "-m", "not slow")
    assert len(whole) == 4 * 3 * 2 + 2 + 2 * 2
    assert [name for name in whole if "product" not in name] == [name for name in quick if "product" not in name]
    product = [name.partition("[")[2].rstrip("]") for name in quick if "product" in name]
    assert len(product) == 4
    assert all(any(f"{pair}" in name for name in product) for pair in ("1-same", "True-same", "2-same", "3-other"))
    assert all(any(value in name.split("-") for name in product) for value in ("a", "b", "c", "x", "y"))
