"""Names of the formats, the packages that they need, and the kinds of input; imported without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Literal

from job.errors import ConfigError

FormatName = Literal["onnx", "pt2", "weights", "int8", "triton"]
InputKind = Literal["image", "resized", "normalised"]
"""Input of a network. image: uint8 [B, H, W, 3], resized inside. resized: uint8 [B, S, S, 3]. normalised: float
[B, 3, S, S]."""

PACKAGES: dict[FormatName, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
    "weights": (),
    "int8": ("onnx", "onnxscript", "onnxruntime"),
    "triton": ("onnx", "onnxscript", "onnxruntime"),
}
"""Packages of each format beyond those that training needs."""
HUB = "huggingface_hub"
ONNX_FILE, INT8_FILE, PROGRAM_FILE = "model.onnx", "model.int8.onnx", "model.pt2"
LABELS_FILE = "labels.txt"
INPUT, OUTPUT = "images", "probabilities"
"""Names of the input and of the output in ONNX."""


def parse_formats(value: str | list[str]) -> tuple[FormatName, ...]:
    """The formats of ``--format``, a comma-separated list, in the order of :data:`PACKAGES`.

    Raises:
        ConfigError: one of them is unknown, or there is none.
    """
    words = value.split(",") if isinstance(value, str) else [word for entry in value for word in entry.split(",")]
    names = {word.strip() for word in words} - {""}
    known = ", ".join(PACKAGES)
    if unknown := sorted(names - set(PACKAGES)):
        raise ConfigError(f"--format {unknown[0]!r} is unknown. Choose from {known}.")
    if not names:
        raise ConfigError(f"--format names no format. Choose from {known}.")
    return tuple(name for name in PACKAGES if name in names)


def require_packages(formats: Iterable[FormatName], *, push: bool) -> None:
    """Check that the packages of all formats are installed, without importing them.

    Raises:
        ConfigError: one of them is not.
    """
    needed = [package for name in formats for package in PACKAGES[name]] + ([HUB] if push else [])
    missing = [package for package in dict.fromkeys(needed) if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f'this export needs {", ".join(missing)}. Install them: pip install ".[export]"')
