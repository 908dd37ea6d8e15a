"""One test for each promise that anomalib makes its models and that registration relies on."""

import json
import os
import re
import subprocess
import sys
import warnings
from importlib import metadata
from itertools import count

import pytest
from packaging.requirements import Requirement

from anomalib_ot import _autoload
from anomalib_ot.host import registration, versions


def run(code, **environment):
    """Run code in a fresh process, with the hook installed by the .pth file alone."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Imports what takes anomalib and us seconds, and nothing of both but the hook, and runs the code of folders in forks.
SERVER = """
import os, sys
import cv2, FrEIA.framework, jsonargparse, kornia, lightning.pytorch, matplotlib.pyplot, omegaconf, pandas
import skimage.morphology, sklearn.mixture, timm, torchmetrics, torchvision

assert "anomalib" not in sys.modules
assert {name for name in sys.modules if name.startswith("anomalib_ot")} == {"anomalib_ot", "anomalib_ot._autoload"}
for line in sys.stdin:
    folder = line.strip()
    child = os.fork()
    if not child:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), number)
        exec(open(f"{folder}/code.py").read(), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_forked(tmp_path_factory):
    """Runs code as :func:`run` does, in a process that has imported neither anomalib nor our models either."""
    numbers, place = count(), tmp_path_factory.mktemp("forked")
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run_forked(code):
            folder = place / str(next(numbers))
            folder.mkdir()
            (folder / "code.py").write_text(code)
            print(folder, file=server.stdin, flush=True)
            status = server.stdout.readline()
            assert status == "0\n", (folder / "stderr").read_text()
            return (folder / "stdout").read_text()

        yield run_forked


@pytest.fixture(scope="module")
def found(run_forked):
    """Names found by one process that imports anomalib alone."""
    out = run_forked(
        "import json\n"
        "from anomalib.models import get_model, list_models\n"
        "from anomalib.data import AnomalibDataModule\n"
        "data = [c.__name__ for c in AnomalibDataModule.__subclasses__() if 'anomalib_ot' in c.__module__]\n"
        "listed = sorted(list_models())\n"
        "specs = ('pradot', {'class_path': 'Pradot'}, {'class_path': 'anomalib.models.Pradot'},\n"
        "         {'class_path': 'anomalib_ot.Pradot'}, 'wt_flow')\n"
        "made = [type(get_model(spec, backbone='resnet18', pre_trained=False)).__name__ for spec in specs]\n"
        "from anomalib.models import Padim, Pradot\n"
        "padim = type(get_model('padim', pre_trained=False)) is Padim\n"
        "import anomalib_ot\n"
        "pradot = Pradot is anomalib_ot.Pradot\n"
        "print(json.dumps({'data': data, 'listed': listed, 'made': made, 'padim': padim, 'pradot': pradot}))\n"
    )
    return json.loads(out.splitlines()[-1])


def test_short_names_resolve_after_importing_anomalib_alone(found):
    assert "pradot" in found["listed"]
    assert found["made"][:4] == ["Pradot"] * 4
    assert found["pradot"]


def test_all_models_are_listed_by_the_hosts_names(found):
    assert {"duo", "foct", "pradot", "wt_flow"} <= set(found["listed"])
    assert found["made"][4] == "WtFlow"


def test_host_keeps_its_own_models(found):
    assert found["padim"]


@pytest.mark.parametrize(
    "first",
    [
        "anomalib_ot.export.checked",
        "anomalib_ot.decide.post_processor",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *("anomalib_ot.features.whitening", "anomalib_ot.host.checkpoints", "anomalib_ot.drawing.pictures"),
                *("anomalib_ot.models.pradot.torch_model", "anomalib_ot.models", "anomalib_ot.data"),
                *("anomalib_ot.explain.views", "anomalib_ot.metrics", "anomalib.models"),
            )
        ),
    ],
)
def test_every_import_order_works(first, run_forked):
    run_forked(f"import {first}, anomalib.models\nanomalib.models.Pradot")


def test_the_post_processor_may_be_imported_before_the_host(run_forked):
    out = run_forked(
        "from anomalib_ot.decide import ConformalPostProcessor\n"
        "from anomalib.models import get_model\n"
        "model = get_model('Pradot', backbone='resnet18', pre_trained=False)\n"
        "print(type(model.post_processor) is ConformalPostProcessor)"
    )
    assert out.endswith("True\n")


def test_data_modules_resolve_by_short_name(found):
    assert "MVTecLOCOAD" in found["data"]


def test_switch_leaves_the_host_alone_and_the_full_path_working():
    out = run(
        "import sys, anomalib.models\n"
        "print(hasattr(anomalib.models, 'Pradot'), 'anomalib_ot.models' in sys.modules)\n"
        "import anomalib_ot\n"
        "print(anomalib_ot.Pradot.__name__, hasattr(anomalib.models, 'Pradot'))",
        ANOMALIB_OT_AUTOLOAD="0",
    )
    assert "False False\nPradot False" in out


def test_a_process_without_anomalib_imports_only_the_hook():
    out = run("import sys\nprint(sorted(m for m in sys.modules if m.startswith(('anomalib', 'torch', 'lightning'))))")
    assert out.strip() == "['anomalib_ot', 'anomalib_ot._autoload']"


def test_a_failing_registration_warns_and_the_host_goes_on(run_forked):
    code = (
        "import sys, warnings\n"
        "sys.modules['anomalib_ot.models'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import anomalib.models\n"
        "print([str(w.message) for w in caught if 'anomalib-ot could not register' in str(w.message)])\n"
        "print(anomalib.models.Padim.__name__)"
    )
    out = run_forked(code)
    assert "ANOMALIB_OT_AUTOLOAD=0" in out
    assert out.strip().endswith("Padim")


def test_a_package_that_only_models_need_is_named_with_the_extra_that_brings_it(run_forked):
    hint = 'run: pip install "anomalib-ot[train]"'
    direct = "import anomalib_ot\ntry: anomalib_ot.WtFlow\nexcept ModuleNotFoundError as error: print(error)"
    assert hint in run_forked("import sys\nsys.modules['torch'] = None\n" + direct)
    by_hook = (
        "import sys\nsys.modules['psutil'] = None\nimport warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import anomalib.models\n"
        "print([str(w.message) for w in caught if 'anomalib-ot could not register' in str(w.message)])"
    )
    out = run_forked(by_hook)
    assert "psutil" in out
    assert hint in out


def test_hook_is_installed_once():
    out = run("import sys\nprint([type(f).__name__ for f in sys.meta_path].count('_RegisterAfterHost'))")
    assert out.strip() == "1"


OURS = """
import importlib, importlib.util, sys, threading
from importlib.machinery import PathFinder
from types import ModuleType

import anomalib_ot

anomalib_ot.MODELS = {"Pradot": "anomalib_ot.models.pradot"}
for name in ("data", "decide", "decide.post_processor", "explain", "explain.visualizer", "models", "models.pradot"):
    sys.modules[f"anomalib_ot.{name}"] = ModuleType(f"anomalib_ot.{name}")
sys.modules["anomalib_ot.models.pradot"].Pradot = type("Pradot", (), {})
"""


@pytest.fixture
def run_quickly(tmp_path):
    """Runs code in a fresh process, where the host and our models are imported at once, as there is little to them."""
    models = tmp_path / "anomalib/models"
    models.mkdir(parents=True)
    (tmp_path / "anomalib/__init__.py").touch()
    (models / "__init__.py").write_text(
        "from . import image\nALLOWED_MODULES = set()\n__all__ = ['Padim']\nclass Padim: pass\n"
    )
    (models / "image.py").touch()
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return lambda code, **environment: run(OURS + code, PYTHONPATH=paths, **environment).split()


@pytest.mark.parametrize(
    "before",
    [
        "importlib.util.find_spec('anomalib.models')",
        "importlib.util.find_spec('anomalib.models'); importlib.util.find_spec('anomalib.models')",
        "import pkgutil, anomalib; list(pkgutil.walk_packages(anomalib.__path__, 'anomalib.'))[:1]",
        "assert importlib.util.find_spec('anomalib.models').loader.get_source('anomalib.models')",
    ],
    ids=["once", "twice", "walk", "source"],
)
def test_looking_for_the_host_without_importing_it_loses_no_model(before, run_quickly):
    assert run_quickly(f"{before}\nimport anomalib.models\nprint(anomalib.models.Pradot.__name__)") == ["Pradot"]


def test_a_debugger_that_looks_for_the_real_host_loses_no_model(run_forked):
    out = run_forked(
        "import importlib.util\n"
        "importlib.util.find_spec('anomalib.models')\n"
        "from anomalib.models import get_model\n"
        "print(type(get_model('pradot', backbone='resnet18', pre_trained=False)).__name__)"
    )
    assert out.strip().endswith("Pradot")


def test_threads_that_look_for_the_host_while_another_imports_it_lose_no_model(run_quickly):
    out = run_quickly(
        "def look():\n"
        "    together.wait()\n"
        "    for _ in range(200):\n"
        "        assert importlib.util.find_spec('anomalib.models')\n"
        "together = threading.Barrier(3)\n"
        "lookers = [threading.Thread(target=look) for _ in range(2)]\n"
        "for each in lookers: each.start()\n"
        "together.wait()\n"
        "import anomalib.models\n"
        "for each in lookers: each.join()\n"
        "print(anomalib.models.Pradot.__name__)"
    )
    assert out == ["Pradot"]


def test_models_of_a_reloaded_host_are_found_by_name(run_forked):
    out = run_forked(
        "import importlib, anomalib.models\n"
        "importlib.reload(anomalib.models)\n"
        "print('Pradot' in anomalib.models.__all__)\n"
        "spec = {'class_path': 'anomalib_ot.Pradot'}\n"
        "print(type(anomalib.models.get_model(spec, backbone='resnet18', pre_trained=False)).__name__)"
    )
    assert "True\nPradot" in out


def test_a_host_that_failed_and_is_tried_again_has_the_models(run_quickly):
    out = run_quickly(
        "sys.modules['anomalib.models.image'] = None\n"
        "try:\n"
        "    import anomalib.models\n"
        "except ImportError:\n"
        "    print('failed')\n"
        "del sys.modules['anomalib.models.image']\n"
        "import anomalib.models\n"
        "print(anomalib.models.Pradot.__name__)"
    )
    assert out == ["failed", "Pradot"]


def test_a_finder_in_front_that_takes_the_host_for_itself_loses_no_model(run_quickly):
    out = run_quickly(
        "class Checker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return PathFinder.find_spec(name, path, target) if name.startswith('anomalib.') else None\n"
        "sys.meta_path.insert(0, Checker())\n"
        "import anomalib.models\n"
        "print(anomalib.models.Pradot.__name__, type(sys.meta_path[1]).__name__)"
    )
    assert out == ["Pradot", "Checker"]


def test_a_host_that_only_another_finder_knows_has_the_models(run_quickly):
    """As where it is installed for editing: no path leads to it."""
    out = run_quickly(
        "import anomalib\n"
        "class Editable:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return PathFinder.find_spec(name, folders, target) if name == 'anomalib.models' else None\n"
        "folders, anomalib.__path__ = anomalib.__path__, []\n"
        "sys.meta_path.append(Editable())\n"
        "import anomalib.models\n"
        "print(anomalib.models.Pradot.__name__)"
    )
    assert out == ["Pradot"]


def test_a_host_loaded_lazily_registers_once_it_is_used(run_quickly):
    out = run_quickly(
        "spec = importlib.util.find_spec('anomalib.models')\n"
        "spec.loader = importlib.util.LazyLoader(spec.loader)\n"
        "module = sys.modules['anomalib.models'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print('anomalib.models.image' in sys.modules, module.Padim.__name__, module.Pradot.__name__)"
    )
    assert out == ["False", "Padim", "Pradot"]


def test_the_host_keeps_its_own_loader(run_quickly):
    out = run_quickly(
        "import anomalib.models as m\nprint(type(m.__loader__).__name__, m.__spec__.loader is m.__loader__)"
    )
    assert out == ["SourceFileLoader", "True"]


def test_the_switch_may_be_set_until_the_host_is_imported(run_quickly):
    out = run_quickly(
        "import os\n"
        "os.environ['ANOMALIB_OT_AUTOLOAD'] = '0'\n"
        "import anomalib.models\n"
        "print(hasattr(anomalib.models, 'Pradot'))"
    )
    assert out == ["False"]


def test_installing_late_registers_at_once(run_quickly):
    out = run_quickly(
        "import anomalib.models, os, anomalib_ot._autoload\n"
        "print(hasattr(anomalib.models, 'Pradot'))\n"
        "del os.environ['ANOMALIB_OT_AUTOLOAD']\n"
        "anomalib_ot._autoload.install()\n"
        "print(anomalib.models.Pradot.__name__)",
        ANOMALIB_OT_AUTOLOAD="0",
    )
    assert out == ["False", "Pradot"]


JOB = "\ndef job():\n    import anomalib.models\n    return anomalib.models.Pradot.__name__\n"
SPAWN = (
    "import multiprocessing\n"
    "from job import job\n"
    "if __name__ == '__main__':\n"
    "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
    "        print(pool.apply(job))"
)


def test_a_spawned_process_has_the_models(run_quickly, tmp_path):
    (tmp_path / "job.py").write_text(OURS + JOB)
    assert run_quickly(SPAWN) == ["Pradot"]


@pytest.mark.slow
def test_a_spawned_process_has_the_models_with_the_real_host(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    out = run(SPAWN, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert out.strip() == "Pradot"


def test_the_hook_stays_and_is_not_installed_again():
    import anomalib.models  # noqa: F401, PLC0415

    _autoload.install()
    assert [type(finder) for finder in sys.meta_path].count(_autoload._RegisterAfterHost) == 1


@pytest.mark.parametrize("name", ["ALLOWED_MODULES", "__all__", "get_model", "list_models"])
def test_host_still_has_what_registration_uses(name):
    import anomalib.models  # noqa: PLC0415

    assert hasattr(anomalib.models, name)


def test_registering_twice_changes_nothing():
    import anomalib.models  # noqa: PLC0415

    from anomalib_ot import Pradot  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.register(Pradot)
        registration.register(Pradot)
    assert anomalib.models.__all__.count("Pradot") == 1


def fake_versions(monkeypatch, **versions):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))


@pytest.mark.parametrize(
    ("package", "found", "needed"),
    [
        ("anomalib", "2.6.2", "anomalib<3,>=2.7"),
        ("anomalib", "3.0.0", "anomalib<3,>=2.7"),
        ("torch", "2.9.1+cpu", "torch>=2.10"),
        ("timm", "1.0.9", "timm>="),
    ],
)
def test_a_version_that_does_not_do_is_named_with_those_that_would(monkeypatch, package, found, needed):
    fake_versions(monkeypatch, **{package: found})
    with pytest.raises(ImportError, match=rf"needs {re.escape(needed)}.*, but {re.escape(package)} ") as caught:
        versions.require_versions()
    assert found in str(caught.value)
    assert f'pip install "{needed}' in str(caught.value)


@pytest.mark.parametrize(
    ("package", "found"), [("anomalib", "2.7.0"), ("anomalib", "2.99"), ("torch", "3.1.0.dev2+cpu")]
)
def test_a_version_that_does_passes(monkeypatch, package, found):
    fake_versions(monkeypatch, **{package: found})
    versions.require_versions()


def test_what_extras_need_is_not_asked_of_everyone(monkeypatch):
    fake_versions(monkeypatch, openvino="1.0")
    versions.require_versions()


def requirements(*extras):
    lines = map(Requirement, metadata.requires("anomalib-ot"))
    return [
        each for each in lines if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def test_an_edge_device_installs_no_torch_and_every_other_extra_installs_all_that_models_need():
    assert {each.name for each in requirements("edge")} == {"jsonargparse", "numpy", "openvino", "pillow"}
    extras = {*metadata.metadata("anomalib-ot").get_all("Provides-Extra")} - {"edge", "train"}
    assert len(extras) > 5
    for extra in extras:
        assert {each.name for each in requirements("train")} <= {each.name for each in requirements(extra)}, extra


def test_every_requirement_has_one_lower_bound_which_nox_holds_it_to():
    needed = requirements("train")
    assert len(needed) > 20
    bounds = {each.name: [part.operator for part in each.specifier].count(">=") for each in needed}
    assert set(bounds.values()) == {1}, bounds


def test_with_an_old_host_the_message_says_so_and_the_host_goes_on(run_forked):
    out = run_forked(
        "import importlib.metadata as metadata, warnings\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '2.6.2' if name == 'anomalib' else real(name)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import anomalib.models\n"
        "print([str(w.message) for w in caught if 'could not register' in str(w.message)])\n"
        "print(hasattr(anomalib.models, 'Pradot'), anomalib.models.Padim.__name__)"
    )
    assert "needs anomalib<3,>=2.7, but anomalib 2.6.2 is installed; run: pip install" in out
    assert out.strip().endswith("False Padim")
