"""Checkpoints on any filesystem: committed by a manifest, verified before they are trusted.

``<run_dir>/checkpoints/epoch=E-step=S.ckpt`` holds the state; ``….ckpt.json`` beside it, written
last, holds its size and SHA-256 and makes it a checkpoint. A file without its manifest was never
finished and is not looked at.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from dataclasses import dataclass
from typing import Any, cast

import torch

from job import storage
from job.errors import CheckpointError, StorageError, StorageOutage

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
SUFFIX = ".ckpt"


@dataclass(frozen=True)
class Manifest:
    """What is known of a committed checkpoint.

    Attributes:
        file: name of the state file, beside the manifest.
        bytes: its size.
        sha256: its SHA-256, in hexadecimal.
        epoch: epochs completed.
        batch: batches done of the epoch after those.
        global_step: optimizer steps done.
        monitor: name of the metric that ranks checkpoints.
        mode: "max" or "min": which way is better.
        metrics: what validation measured at this very step; empty for a checkpoint within an epoch.
        confusion_matrix: rows of true classes, measured with them.
    """

    file: str
    bytes: int
    sha256: str
    epoch: int
    batch: int
    global_step: int
    monitor: str
    mode: str
    metrics: dict[str, float]
    confusion_matrix: list[list[int]]

    @property
    def value(self) -> float | None:
        """The monitored metric, where it was measured."""
        return self.metrics.get(self.monitor)


def manifest_uri(checkpoint_uri: str) -> str:
    """Where the manifest of a state file lies."""
    return checkpoint_uri + ".json"


def read_manifest(uri: str) -> Manifest:
    """The manifest at ``uri``.

    Raises:
        CheckpointError: it is damaged, or of another version of this program.
    """
    try:
        return Manifest(**json.loads(storage.read_bytes(uri)))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint manifest {uri} cannot be read: {error}") from error


def manifests(run_dir: str) -> list[Manifest]:
    """Committed checkpoints of a run, oldest first; an unreadable manifest is named and passed over."""
    folder = storage.join(run_dir, FOLDER)
    if not storage.exists(folder):
        return []
    found = []
    for entry in storage.list_files(folder):
        if entry.key.endswith(manifest_uri(SUFFIX)):
            try:
                found.append(read_manifest(storage.join(folder, entry.key)))
            except CheckpointError as error:
                log.warning("%s", error)
    return sorted(found, key=lambda m: (m.global_step, m.epoch))


def uncommitted(run_dir: str) -> list[str]:
    """URIs of state files that have no manifest: what a killed process was uploading."""
    folder = storage.join(run_dir, FOLDER)
    keys = {entry.key for entry in storage.list_files(folder)} if storage.exists(folder) else set()
    return [storage.join(folder, k) for k in sorted(keys) if k.endswith(SUFFIX) and manifest_uri(k) not in keys]


def ranked(candidates: list[Manifest]) -> list[Manifest]:
    """Those whose monitored metric was measured, the best first; of equals the newest first."""
    valued = [(m.value if m.mode == "max" else -m.value, m.global_step, m) for m in candidates if m.value is not None]
    return [m for *_, m in sorted(valued, key=lambda item: item[:2], reverse=True)]


def resolve(uri: str) -> str:
    """The state file that a user's ``--ckpt`` means.

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
        CheckpointError: damaged, or not a checkpoint.
        StorageError: it cannot be read.
    """
    content = storage.read_bytes(uri)
    if storage.exists(manifest_uri(uri)):
        _require_intact(uri, content, read_manifest(manifest_uri(uri)))
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes led it to
        raise CheckpointError(
            f"{uri} is no checkpoint that can be loaded safely: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(checkpoint, dict) or "classifier" not in checkpoint:
        raise CheckpointError(f"{uri} is no checkpoint of this job (it says nothing of its classifier).")
    return cast("dict[str, Any]", checkpoint)


def verify(run_dir: str, manifest: Manifest) -> None:
    """Read a checkpoint's bytes and hold them against its manifest.

    Raises:
        CheckpointError: they differ.
        StorageError: they cannot be read.
    """
    uri = storage.join(run_dir, FOLDER, manifest.file)
    _require_intact(uri, storage.read_bytes(uri), manifest)


def newest_trusted(run_dir: str) -> Manifest | None:
    """The newest checkpoint that verifies; a bad one is named, and an older one used.

    Raises:
        CheckpointError: there are checkpoints, but none of them is good.
        StorageOutage: the bucket does not answer: no reason to fall back to an older one.
    """
    candidates = manifests(run_dir)
    for manifest in reversed(candidates):
        try:
            verify(run_dir, manifest)
        except StorageOutage:
            raise
        except (CheckpointError, StorageError) as error:
            log.warning("cannot resume from the newest checkpoint, trying the one before: %s", error)
        else:
            return manifest
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {run_dir} can be read. Restore one, or start in "
            "another --run_dir."
        )
    return None


def remove(uri: str) -> None:
    """Delete the checkpoint at ``uri``, its manifest first: a state file alone is none."""
    storage.remove(manifest_uri(uri))
    storage.remove(uri)


def _require_intact(uri: str, content: bytes, manifest: Manifest) -> None:
    if len(content) != manifest.bytes or hashlib.sha256(content).hexdigest() != manifest.sha256:
        raise CheckpointError(
            f"{uri} is damaged: {len(content)} bytes, not what its manifest says ({manifest.bytes} bytes, "
            f"SHA-256 {manifest.sha256[:12]}…). Use an older checkpoint."
        )
