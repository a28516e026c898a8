"""The format of a chunk of cached features: a safetensors file and its JSON manifest."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import safetensors
import torch
from torch import Tensor

from job import typed
from job.data.index.file import Sha256
from job.errors import DataError
from job.storage.format_version import MALFORMED, format_version

FORMAT = 1
"""Version of the format of PART-NUMBER.json."""
LARGEST_WIDTH = 1 << 20
LONGEST_LINE = 8192
"""Characters of the reason per unreadable sample; the rest is cut off."""
HEADER_BYTES = 4096
"""Bytes of a chunk besides its tensors, at most."""
MANIFEST_BYTES = 64 << 20
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class ChunkInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``PART-NUMBER.json``.

    Attributes:
        sha256: hash of the chunk's file.
        bytes: its size.
        samples: number of samples.
        views: variants per sample.
        width: features per variant.
        dtype: type of a feature.
        bad: reason per unreadable sample, by sample id.
        format: version of this format.
    """

    sha256: Sha256
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    samples: Annotated[int, msgspec.Meta(ge=1)]
    views: Annotated[int, msgspec.Meta(ge=1)]
    width: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_WIDTH)]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    bad: dict[Annotated[int, msgspec.Meta(ge=0)], Annotated[str, msgspec.Meta(max_length=LONGEST_LINE)]]
    format: int = FORMAT

    def __post_init__(self) -> None:
        content = self.samples * self.views * (self.width * DTYPES[self.dtype].itemsize + 1)
        if not content <= self.bytes <= content + HEADER_BYTES:
            raise ValueError(f"{self.bytes:,} bytes do not hold {self.samples} x {self.views} x {self.width} features")

    @classmethod
    def from_json(cls, uri: str, text: builtins.bytes) -> ChunkInfo:
        """Parse a chunk's manifest.

        Raises:
            DamagedChunk: it cannot be parsed.
            NewerFormat: a newer release wrote it.
        """
        try:
            if (version := format_version(text)) > FORMAT:
                raise NewerFormat(
                    f"{uri} has format {version}: a newer release of this package wrote it, this one reads format "
                    f"{FORMAT}. Choose another folder by --features.uri, or --features.use=never."
                )
            return typed.from_json(text, cls)
        except MALFORMED as error:
            raise DamagedChunk(f"{uri} describes no features: {error}") from error


def read_tensors(path: Path, info: ChunkInfo) -> dict[str, Tensor]:
    """The tensors ``features`` and ``valid`` of a chunk's local file, mapped into memory.

    Raises:
        DamagedChunk: they differ from the manifest.
    """
    try:
        if path.stat().st_size != info.bytes:
            raise DamagedChunk(f"{path} has another size than {info.bytes:,} bytes")
        with safetensors.safe_open(path, framework="pt") as file:
            if sorted(file.keys()) != ["features", "valid"]:
                raise DamagedChunk(f"{path} must hold the tensors features and valid, and no others")
            tensors = {name: file.get_tensor(name) for name in ("features", "valid")}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise DamagedChunk(f"{path} is no safetensors file: {error}") from error
    features, valid = tensors["features"], tensors["valid"]
    shape = (info.samples, info.views)
    if features.shape != (*shape, info.width) or features.dtype != DTYPES[info.dtype]:
        raise DamagedChunk(f"{path} holds features {tuple(features.shape)} {features.dtype}")
    if valid.shape != shape or valid.dtype != torch.bool:
        raise DamagedChunk(f"{path} holds valid {tuple(valid.shape)} {valid.dtype}")
    return tensors


class DamagedChunk(DataError):
    """A chunk that was damaged since it was written, or has another shape than needed."""


class NewerFormat(DataError):
    """A chunk that a newer release wrote."""
