"""Hardware and versions of a run."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from job.cluster import ranks
from job.monitoring.report.content import Hardware
from job.process.cpus import available_cpus

PACKAGES = (
    "job",
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "torchmetrics",
    "torch-xla",
    "numpy",
    "pillow",
    "fsspec",
    "gcsfs",
    "s3fs",
)


def hardware() -> Hardware:
    """The machine of this process."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return Hardware(
        platform=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpu=_cpu_model(),
        cpus=available_cpus(),
        memory_bytes=_memory_bytes(),
        accelerators=[torch.cuda.get_device_name(number) for number in gpus][: ranks.local_world_size()],
    )


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the packages that decide the results, of those that are installed."""
    releases = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            releases[name] = metadata.version(name)
    if torch.version.cuda is not None:
        releases["cuda"] = torch.version.cuda
    return releases


def _cpu_model() -> str:
    """The model's name (proc(5) on Linux)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()[:200]
    return platform.processor()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
