"""Versions of this package and of the libraries that decide its results, read without importing them."""

from __future__ import annotations

import platform
from importlib import metadata


def library_versions() -> str:
    """For example ``job 0.1.0 (torch 2.9.0, pytorch-lightning 2.6.6, Python 3.12.3)``."""
    libraries = ", ".join(f"{name} {_version(name)}" for name in ("torch", "pytorch-lightning"))
    return f"job {_version('job')} ({libraries}, Python {platform.python_version()})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
