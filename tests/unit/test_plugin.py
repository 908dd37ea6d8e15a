"""One test for each promise that anomalib makes its models and that plugin.py relies on."""

import os
import re
import subprocess
import sys
import warnings
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from anomalib_ot import plugin


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


def test_short_names_resolve_after_importing_anomalib_alone():
    out = run(
        "from anomalib.models import list_models, get_model\n"
        "print('pradot' in list_models())\n"
        "for spec in ('pradot', {'class_path': 'Pradot'}, {'class_path': 'anomalib.models.Pradot'},\n"
        "             {'class_path': 'anomalib_ot.Pradot'}):\n"
        "    print(type(get_model(spec, backbone='resnet18', pre_trained=False)).__name__)\n"
        "from anomalib.models import Pradot\n"
        "import anomalib_ot\n"
        "print(Pradot is anomalib_ot.Pradot)\n"
    )
    assert [line for line in out.splitlines() if line in {"True", "Pradot"}] == ["True", *["Pradot"] * 4, "True"]


def test_all_models_are_listed_by_the_hosts_names():
    out = run(
        "from anomalib.models import list_models, get_model\n"
        "print({'foct', 'pradot', 'wt_flow'} <= set(list_models()))\n"
        "print(type(get_model('wt_flow', backbone='resnet18', pre_trained=False)).__name__)\n"
    )
    assert "True\nWtFlow" in out


def test_host_keeps_its_own_models():
    out = run(
        "from anomalib.models import get_model, Padim\nprint(type(get_model('padim', pre_trained=False)) is Padim)"
    )
    assert "True" in out


def test_every_import_order_works():
    modules = ("components.whitening", "models.pradot.torch_model", "models", "data")
    for first in (*(f"anomalib_ot.{module}" for module in modules), "anomalib.models"):
        run(f"import {first}, anomalib.models\nanomalib.models.Pradot")


def test_data_modules_resolve_by_short_name():
    out = run(
        "import anomalib.models\n"
        "from anomalib.data import AnomalibDataModule\n"
        "print(sorted(c.__name__ for c in AnomalibDataModule.__subclasses__() if 'anomalib_ot' in c.__module__))"
    )
    assert "MVTecLOCOAD" in out


def test_switch_leaves_the_host_alone_and_the_full_path_working():
    out = run(
        "import sys, anomalib.models\n"
        "print(hasattr(anomalib.models, 'Pradot'), 'anomalib_ot.models' in sys.modules)\n"
        "import anomalib_ot\n"
        "print(anomalib_ot.Pradot.__name__, hasattr(anomalib.models, 'Pradot'))",
        ANOMALIB_OT_AUTOLOAD="0",
    )
    assert "False False\nPradot True" in out


def test_a_process_without_anomalib_imports_only_the_hook():
    out = run("import sys\nprint(sorted(m for m in sys.modules if m.startswith(('anomalib', 'torch', 'lightning'))))")
    assert out.strip() == "['anomalib_ot', 'anomalib_ot.plugin']"


def test_a_failing_registration_warns_and_the_host_goes_on():
    code = (
        "import sys, warnings\n"
        "sys.modules['anomalib_ot.models'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import anomalib.models\n"
        "print([str(w.message) for w in caught if 'anomalib-ot could not register' in str(w.message)])\n"
        "print(anomalib.models.Padim.__name__)"
    )
    out = run(code)
    assert "ANOMALIB_OT_AUTOLOAD=0" in out
    assert out.strip().endswith("Padim")


def test_hook_is_installed_once():
    out = run("import sys\nprint([type(f).__name__ for f in sys.meta_path].count('_RegisterAfterHost'))")
    assert out.strip() == "1"


def test_hook_is_gone_after_its_work_and_not_installed_again():
    import anomalib.models  # noqa: F401, PLC0415

    plugin.install()
    assert not any(isinstance(finder, plugin._RegisterAfterHost) for finder in sys.meta_path)


@pytest.mark.parametrize("name", ["ALLOWED_MODULES", "__all__", "get_model", "list_models"])
def test_host_still_has_what_registration_uses(name):
    import anomalib.models  # noqa: PLC0415

    assert hasattr(anomalib.models, name)


def test_registering_twice_changes_nothing():
    import anomalib.models  # noqa: PLC0415

    from anomalib_ot import Pradot  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin.register(Pradot)
        plugin.register(Pradot)
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
        plugin.require_versions()
    assert found in str(caught.value)
    assert f'pip install "{needed}' in str(caught.value)


@pytest.mark.parametrize(
    ("package", "found"), [("anomalib", "2.7.0"), ("anomalib", "2.99"), ("torch", "3.1.0.dev2+cpu")]
)
def test_a_version_that_does_passes(monkeypatch, package, found):
    fake_versions(monkeypatch, **{package: found})
    plugin.require_versions()


def test_what_extras_need_is_not_asked_of_everyone(monkeypatch):
    fake_versions(monkeypatch, openvino="1.0")
    plugin.require_versions()


def test_every_requirement_has_one_lower_bound_which_nox_holds_it_to():
    needed = [Requirement(line) for line in metadata.requires("anomalib-ot") if "extra ==" not in line]
    assert len(needed) > 20
    bounds = {each.name: [part.operator for part in each.specifier].count(">=") for each in needed}
    assert set(bounds.values()) == {1}, bounds


def test_with_an_old_host_the_message_says_so_and_the_host_goes_on():
    out = run(
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
