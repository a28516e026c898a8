"""The manifest of a checkpoint: one JSON object beside the state file, checked field by field when it is read."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from job import typed
from job.errors import CheckpointError, NewerFormatError
from job.storage.format_version import MALFORMED, Unversioned, format_version

FORMAT = 2
"""Version of the manifest and of the checkpoint's own entries; 1 had no ``format`` field."""

SUFFIX = ".ckpt"
NAME_PATTERN = r"^epoch=[0-9]{3,9}-step=[0-9]{8,15}(-validated)?(-[0-9]{1,3})?\.ckpt\Z"
MAX_BYTES = 32 << 20
"""Largest manifest that is read: those of format 1 held the confusion matrix."""
PER_CLASS_BYTES = 600
"""Length of the entries of single classes, such as ``val/accuracy_of/NAME``, up to which a manifest holds them."""
ENTRY_BYTES = 32
"""Length of such an entry without its name."""

Count = Annotated[int, Meta(ge=0, lt=2**53)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(pattern=NAME_PATTERN, max_length=64)]
Mode = Literal["max", "min"]
MetricName = Annotated[str, Meta(min_length=1, max_length=1000)]


class ConfusionFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file beside a checkpoint that holds the confusion matrix; see :mod:`job.checkpoint.confusion`.

    Attributes:
        bytes: size.
        sha256: SHA-256, in hexadecimal.
        classes: number of classes.
    """

    bytes: Annotated[int, Meta(ge=0, le=1 << 30)]
    sha256: Sha256
    classes: Annotated[int, Meta(ge=1, lt=2**31)]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A committed checkpoint.

    Attributes:
        file: name of the state file, beside the manifest.
        bytes: its size.
        sha256: its SHA-256, in hexadecimal.
        epoch: epochs completed.
        batch: batches done of the epoch after those.
        global_step: optimizer steps done.
        monitor: name of the metric that ranks checkpoints.
        mode: "max" or "min": which way is better.
        metrics: validation metrics of this very step, empty if none were measured; None for a value that is not finite.
        confusion: file with the confusion matrix of the same validation.
        validation: identity of the samples that were validated; empty if unknown.
        format: version of this file format.
    """

    file: Name
    bytes: Count
    sha256: Sha256
    epoch: Count
    batch: Count
    global_step: Count
    monitor: MetricName
    mode: Mode
    metrics: dict[MetricName, float | None]
    confusion: ConfusionFile | None = None
    validation: Annotated[str, Meta(max_length=1000)] = ""
    format: int = FORMAT

    @property
    def value(self) -> float | None:
        """The monitored metric; None where it was not measured or is not finite."""
        return self.measured(self.monitor)

    def measured(self, metric: str) -> float | None:
        """A metric of this checkpoint; None where it was not measured or is not finite."""
        value = self.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None


class _Format1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    file: Name
    bytes: Count
    sha256: Sha256
    epoch: Count
    batch: Count
    global_step: Count
    monitor: MetricName
    mode: Mode
    metrics: dict[MetricName, float]
    confusion_matrix: msgspec.Raw


def manifest_uri(checkpoint_uri: str) -> str:
    """URI of the manifest of a state file."""
    return checkpoint_uri + ".json"


def decode_manifest(uri: str, content: bytes) -> Manifest:
    """The manifest in ``content``, which was read from ``uri``.

    Raises:
        CheckpointError: it is damaged.
        NewerFormatError: a newer version of job wrote it.
    """
    if len(content) > MAX_BYTES:
        raise CheckpointError(
            f"the checkpoint manifest {uri} is damaged: {len(content):,} bytes, at most {MAX_BYTES:,}."
        )
    try:
        version = format_version(content, Unversioned)
        if version > FORMAT:
            raise NewerFormatError(
                f"the checkpoint manifest {uri} was written by a newer version of job: it has format {version}, this "
                f"version reads formats up to {FORMAT}. Upgrade job, or use another --run_dir."
            )
        if version == 1:
            old = typed.from_json(content, _Format1)
            fields = {name: getattr(old, name) for name in old.__struct_fields__ if name != "confusion_matrix"}
            return Manifest(**fields)
        return typed.from_json(content, Manifest)
    except msgspec.ValidationError as error:
        if unknown := _unknown_fields(content):
            raise NewerFormatError(
                f"the checkpoint manifest {uri} was written by a newer version of job: this version does not know its "
                f"field {unknown[0]!r}. Upgrade job, or use another --run_dir."
            ) from error
        raise CheckpointError(f"the checkpoint manifest {uri} is damaged: {error}") from error
    except MALFORMED as error:
        raise CheckpointError(f"the checkpoint manifest {uri} is damaged: {error}") from error


def _unknown_fields(content: bytes) -> list[str]:
    """Unknown fields of a manifest that has all required ones; none for other manifests, which are damaged."""
    try:
        fields = typed.from_json(content, dict)
    except MALFORMED:
        return []
    schema = Manifest if "format" in fields else _Format1
    required = set(schema.__struct_fields__[: len(schema.__struct_fields__) - len(schema.__struct_defaults__)])
    return sorted(fields.keys() - set(schema.__struct_fields__)) if required <= fields.keys() else []


def encode_manifest(manifest: Manifest) -> bytes:
    """Strict JSON; a metric that is not finite becomes null."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2)


def kept_metrics(metrics: dict[str, float], monitor: str) -> dict[str, float | None]:
    """The metrics for a manifest: without those of single classes where they are long, None for NaN and infinity.

    Which are left out follows from the names alone, so that all manifests of a run hold the same metrics.
    """
    per_class = {name for name in metrics if name.count("/") > 1}
    length = sum(len(msgspec.json.encode(name)) + ENTRY_BYTES for name in per_class)
    dropped = per_class - {monitor} if length > PER_CLASS_BYTES else set()
    return {name: value if math.isfinite(value) else None for name, value in metrics.items() if name not in dropped}


def manifest_of(facts: dict[str, Any], **file: Any) -> Manifest:
    """The manifest of a checkpoint with these entries, checked as it will be when it is read.

    Args:
        facts: fields from ``epoch`` to ``metrics``, and ``validation``.
        file: ``file``, ``bytes``, ``sha256`` and ``confusion``.

    Raises:
        CheckpointError: a field is missing, unknown or out of its range.
    """
    try:
        return typed.from_builtins({**facts, **file}, Manifest)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"the manifest of {file.get('file')} would be invalid: {error}") from error
