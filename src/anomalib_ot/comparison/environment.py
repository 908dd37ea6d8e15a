"""The environment of a run: versions, hardware, threads, revision and time."""

import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .plan import Job

_PACKAGES = ("anomalib-ot", "anomalib", "torch", "torchvision", "lightning", "timm", "POT", "openvino", "nncf", "numpy")


def environment(job: Job, device: torch.device | None = None) -> dict[str, Any]:
    """Hardware, versions and settings that a job runs with.

    Args:
        job: The job.
        device: Device of the model; None if the run failed before, for the device that it would most likely have had.
    """
    device = device or _likely_device(job.accelerator)
    return {
        "packages": installed_versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        # The job's own setting may be "auto".
        "accelerator": device.type,
        "revision": _revision(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, of those that are installed."""
    return {name: found for name in _PACKAGES if (found := _version(name))}


def cores() -> int:
    """Number of CPU cores that are available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _likely_device(accelerator: str) -> torch.device:
    found = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def _device_name(device: torch.device) -> str:
    """Name of a device, or its type if it has no name."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name(device)) if name else device.type


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _revision() -> str:
    """Git revision of the source tree that contains this file; empty for an installed package."""
    here = Path(__file__)
    with suppress(OSError):
        if not _git(here.parent, "ls-files", "--error-unmatch", here.name).returncode:
            return _git(here.parent, "describe", "--always", "--dirty", "--exclude=*").stdout.strip()
    return ""


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603, S607
