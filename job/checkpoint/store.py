"""Checkpoints on any filesystem: committed by a manifest, verified before they are used.

``<run_dir>/checkpoints/epoch=E-step=S.ckpt`` holds the state; ``….ckpt.json`` beside it, written
last, holds its size and SHA-256 and makes it a checkpoint. A file without its manifest was never
finished and is not looked at. ``….ckpt.confusion.safetensors`` holds the confusion matrix.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from job import storage
from job.checkpoint import confusion
from job.checkpoint.abandoned import StepBack, read_steps_back
from job.checkpoint.manifest import (
    MAX_BYTES,
    NAME_PATTERN,
    SUFFIX,
    ConfusionFile,
    Manifest,
    decode_manifest,
    manifest_uri,
)
from job.checkpoint.manifest_reader import read_all
from job.checkpoint.ranking import order, ranked
from job.errors import CheckpointError, NewerFormatError, StorageError, StorageOutage
from job.storage.json_files import read_limited

__all__ = [
    "FOLDER",
    "SUFFIX",
    "ConfusionFile",
    "Manifest",
    "Scan",
    "load",
    "manifest_uri",
    "manifests",
    "newest_verified",
    "ranked",
    "remove",
    "resolve",
    "scan",
    "uncommitted",
    "usable",
    "verify",
]

log = logging.getLogger(__name__)

FOLDER = "checkpoints"

_warned: set[str] = set()


@dataclass
class Scan:
    """The checkpoints of a run.

    Attributes:
        good: manifests that can be read and stand beside their state file, oldest first.
        damaged: one message per manifest that cannot be used.
        newer: one message per manifest that a newer version of job wrote.
        abandoned: manifests of checkpoints that the run has abandoned; see :mod:`job.checkpoint.abandoned`.
        steps_back: when it did, oldest first.
    """

    good: list[Manifest] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    newer: list[str] = field(default_factory=list)
    abandoned: list[Manifest] = field(default_factory=list)
    steps_back: list[StepBack] = field(default_factory=list)


def scan(run_dir: str) -> Scan:
    """Read all manifests of a run, but for those that an earlier call has read.

    Raises:
        CheckpointError: the note of abandoned checkpoints is damaged, or of a newer format.
    """
    folder, result = storage.join(run_dir, FOLDER), Scan()
    entries = {entry.key: entry for entry in _top_level(folder)}
    result.steps_back = read_steps_back(folder, entries)
    abandoned = {name for step_back in result.steps_back for name in step_back.abandoned}
    listed = [entry for entry in entries.values() if entry.key.endswith(manifest_uri(SUFFIX))]
    for entry, outcome in zip(listed, read_all(folder, listed), strict=True):
        if outcome is None:
            continue  # retention of a running job removed it after it was listed
        uri = storage.join(folder, entry.key)
        if isinstance(outcome, NewerFormatError):
            result.newer.append(str(outcome))
        elif isinstance(outcome, CheckpointError):
            result.damaged.append(str(outcome))
        elif manifest_uri(outcome.file) != entry.key:
            result.damaged.append(
                f"the checkpoint manifest {uri} is not used: it names the file {outcome.file!r}, not the one beside "
                "it. A copy of a checkpoint belongs outside this folder."
            )
        elif outcome.file not in entries:
            result.damaged.append(f"the checkpoint manifest {uri} is not used: its file {outcome.file!r} is gone.")
        else:
            (result.abandoned if outcome.file in abandoned else result.good).append(outcome)
    result.good.sort(key=order)
    return result


def manifests(run_dir: str) -> list[Manifest]:
    """Committed checkpoints of a run, oldest first; for damaged ones and errors see :func:`usable`."""
    return usable(scan(run_dir))


def usable(scanned: Scan) -> list[Manifest]:
    """Committed checkpoints of a run, oldest first; a damaged manifest is warned of and left out.

    Raises:
        NewerFormatError: a newer version of job wrote one of them.
    """
    _warn(scanned.damaged)
    if scanned.newer:
        raise NewerFormatError(scanned.newer[0])
    return scanned.good


def uncommitted(run_dir: str) -> list[str]:
    """URIs of files of checkpoints that have no manifest: a killed process was uploading them."""
    folder = storage.join(run_dir, FOLDER)
    keys = {entry.key for entry in _top_level(folder)}
    states = {key: key.removesuffix(confusion.SUFFIX) for key in sorted(keys)}
    return [
        storage.join(folder, key)
        for key, state in states.items()
        if re.match(NAME_PATTERN, state) and manifest_uri(state) not in keys
    ]


def resolve(uri: str) -> str:
    """The state file that ``--ckpt`` refers to.

    A ``….ckpt`` file is itself; ``RUN_DIR/checkpoints/best`` and ``…/last`` are chosen by the
    manifests; a run_dir means its best.

    Raises:
        CheckpointError: there is none.
    """
    if uri.endswith(SUFFIX):
        return uri
    which, run_dir = "best", uri.rstrip("/")
    for name in ("best", "last"):
        if run_dir.endswith(f"/{FOLDER}/{name}"):
            which, run_dir = name, run_dir.removesuffix(f"/{FOLDER}/{name}")
    candidates = manifests(run_dir)
    if not candidates:
        raise CheckpointError(f"no checkpoint in {storage.join(run_dir, FOLDER)}. Is this the run_dir of a fit?")
    best_first = ranked(candidates) if which == "best" else []
    return storage.join(run_dir, FOLDER, (best_first[0] if best_first else candidates[-1]).file)


def load(uri: str) -> dict[str, Any]:
    """The checkpoint at ``uri``, on the CPU, verified against its manifest where it has one; no code is unpickled.

    Raises:
        CheckpointError: damaged, not a checkpoint, or written by a newer version of job.
        StorageError: it cannot be read.
    """
    # torch is imported here: other functions of this module work on manifests and bytes.
    from job.checkpoint.state import require_checkpoint
    from job.storage.tensor_file import load_tensors

    content = storage.read_bytes(uri)
    if storage.exists(manifest_uri(uri)):
        described = read_limited(manifest_uri(uri), MAX_BYTES)
        _require_intact(uri, content, decode_manifest(manifest_uri(uri), described))
    return require_checkpoint(uri, load_tensors(content, uri, error_type=CheckpointError))


def sha256(uri: str) -> str:
    """SHA-256 of the checkpoint at ``uri``, in hexadecimal: of its manifest where it has one.

    Raises:
        CheckpointError: the manifest is damaged.
        StorageError: neither can be read.
    """
    if storage.exists(manifest_uri(uri)):
        return decode_manifest(manifest_uri(uri), read_limited(manifest_uri(uri), MAX_BYTES)).sha256
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest()


def verify(run_dir: str, manifest: Manifest) -> None:
    """Read a checkpoint's bytes and compare them with its manifest.

    Raises:
        CheckpointError: they differ.
        StorageError: they cannot be read.
    """
    uri = storage.join(run_dir, FOLDER, manifest.file)
    _require_intact(uri, storage.read_bytes(uri), manifest)


def newest_verified(run_dir: str) -> Manifest | None:
    """The newest checkpoint that verifies; warns and falls back to an older one.

    Raises:
        CheckpointError: there are checkpoints, but none of them is good, or one is of a newer format.
        StorageOutage: the bucket does not answer: no reason to fall back to an older one.
    """
    result = scan(run_dir)
    if result.newer:
        raise NewerFormatError(result.newer[0])
    _warn(result.damaged)
    for manifest in reversed(result.good):
        try:
            verify(run_dir, manifest)
        except StorageOutage:
            raise
        except (CheckpointError, StorageError) as error:
            log.warning("cannot resume from the newest checkpoint, trying the one before: %s", error)
        else:
            return manifest
    if result.good or result.damaged:
        reasons = "".join(f"\n  {reason}" for reason in result.damaged[:5])
        raise CheckpointError(
            f"none of the {len(result.good) + len(result.damaged)} checkpoints in {run_dir} can be read. Restore one, "
            f"or start in another --run_dir.{reasons}"
        )
    return None


def free_name(uri: str, abandoned: Collection[str] = ()) -> str:
    """``uri``, or its next free variant (``….ckpt`` becomes ``…-2.ckpt``) where a manifest that is no good has it.

    A damaged manifest is kept for a repair by hand.

    Args:
        uri: of the new checkpoint.
        abandoned: names of checkpoints that the run has abandoned, which are not used again.
    """
    number, candidate = 1, uri
    while storage.basename(candidate) in abandoned or not _is_free(candidate):
        number += 1
        candidate = numbered(uri, number)
    return candidate


def numbered(uri: str, number: int) -> str:
    """The name of a further file for the same step."""
    return f"{uri.removesuffix(SUFFIX)}-{number}{SUFFIX}"


def abandoned_names(folder: str) -> frozenset[str]:
    """Files of all checkpoints that a run has ever abandoned; a new checkpoint must not have their names.

    Args:
        folder: of the checkpoints.

    Raises:
        CheckpointError: a note of abandoned checkpoints is damaged.
    """
    steps_back = read_steps_back(folder, [entry.key for entry in _top_level(folder)])
    return frozenset(name for step_back in steps_back for name in step_back.abandoned)


def confusion_cells(run_dir: str, manifest: Manifest) -> confusion.Cells | None:
    """The confusion matrix of a checkpoint as (true class, predicted class, count), None where there is none.

    Raises:
        CheckpointError: it is damaged.
        StorageError: it cannot be read.
    """
    if manifest.confusion is None:
        return None
    return confusion.read(confusion_uri(run_dir, manifest), manifest.confusion)


def confusion_uri(run_dir: str, manifest: Manifest) -> str:
    """URI of the file with a checkpoint's confusion matrix."""
    return storage.join(run_dir, FOLDER, manifest.file + confusion.SUFFIX)


def remove(uri: str) -> None:
    """Delete the checkpoint at ``uri``, its manifest first: without it the state file is not a checkpoint."""
    storage.remove(manifest_uri(uri))
    storage.remove(uri + confusion.SUFFIX)
    storage.remove(uri)


def _is_free(uri: str) -> bool:
    """Whether there is no manifest, or that of a checkpoint of this very name, which is written again."""
    if not storage.exists(manifest_uri(uri)):
        return True
    try:
        content = read_limited(manifest_uri(uri), MAX_BYTES)
        return decode_manifest(manifest_uri(uri), content).file == storage.basename(uri)
    except CheckpointError:
        return False


def _top_level(folder: str) -> list[storage.Entry]:
    if not storage.exists(folder):
        return []
    return [entry for entry in storage.list_files(folder) if "/" not in entry.key]


def _warn(problems: list[str]) -> None:
    """Log each message once per process: retention reads the manifests after every checkpoint."""
    for problem in problems:
        if problem not in _warned:
            _warned.add(problem)
            log.warning("%s", problem)


def _require_intact(uri: str, content: bytes, manifest: Manifest) -> None:
    if len(content) != manifest.bytes or hashlib.sha256(content).hexdigest() != manifest.sha256:
        raise CheckpointError(
            f"{uri} is damaged: {len(content)} bytes, not what its manifest says ({manifest.bytes} bytes, "
            f"SHA-256 {manifest.sha256[:12]}…). Use an older checkpoint."
        )
