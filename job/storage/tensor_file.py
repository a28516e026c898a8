"""Safe reading of .pth, .ckpt and .safetensors files: no code is run, and memory is bounded by the file size."""

from __future__ import annotations

import argparse
import io
import re
import threading
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

from job.errors import JobError, WeightsError
from job.process.terminal import escape

DATA_CLASSES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]
"""Classes of records that training scripts save with the weights; unpickling them calls no code."""

_LOADING = threading.Lock()
"""Held while a file is loaded: the classes that torch accepts and Python's filters of warnings are global."""


def load_tensors(content: bytes, uri: str, *, error_type: type[JobError] = WeightsError) -> Any:
    """Load the content of a file that ``torch.save`` or safetensors wrote, on the CPU.

    Args:
        content: the whole file.
        uri: URI of the file, for messages; the suffix .safetensors selects the format.
        error_type: class of the error that is raised.

    Raises:
        JobError: of ``error_type``: the file is damaged, or contains objects other than tensors and plain values.
    """
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(content)
        _require_bounded(content)
        with (
            _LOADING,
            torch.serialization.safe_globals(DATA_CLASSES),
            warnings.catch_warnings(action="ignore"),
        ):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of any class
        raise error_type(f"{uri} cannot be loaded safely: {_reason(error)}") from error


def _require_bounded(content: bytes) -> None:
    """Refuse compressed zip archives: torch.load allocates the size that a record claims."""
    if not content.startswith(b"PK"):
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("it is a compressed archive, which torch.save does not write")
    if sum(record.file_size for record in records) > len(content):
        raise ValueError("its records claim to be larger than the file")
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    if sorted(reader.get_all_records()) != sorted(_below_root(record.filename) for record in records):
        raise ValueError("its table of contents is ambiguous")


def _below_root(name: str) -> str:
    return name.split("/", 1)[-1]


def _reason(error: Exception) -> str:
    """One line, without torch's advice to load unsafely and without escape sequences."""
    text = str(error)
    if match := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds an object made by {match[1]}, and only tensors and plain values are loaded."
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line for line in text.splitlines() if line.strip() and "weights_only" not in line]
    line = printable((lines or [""])[0])
    return f"{line.rstrip('.') or type(error).__name__}."


def printable(text: str, length: int = 200) -> str:
    """Text from a file for a message, with line breaks and control characters escaped."""
    escaped = escape(text[:length])
    return escaped if len(text) <= length else f"{escaped}…"
