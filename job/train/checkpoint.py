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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from job import storage
from job.errors import CheckpointError, ConfigError, StorageError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
SUFFIX = ".ckpt"
RANKING = "ranking"
"""Key of the checkpoint under which :class:`Checkpointer` says how it ranks."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a committed checkpoint.

    Attributes:
        file: name of the state file, beside the manifest.
        bytes: its size.
        sha256: its SHA-256, in hexadecimal.
        epoch: epochs completed.
        global_step: optimizer steps done.
        monitor: name of the metric that ranks checkpoints.
        mode: "max" or "min": which way is better.
        value: the metric.
    """

    file: str
    bytes: int
    sha256: str
    epoch: int
    global_step: int
    monitor: str
    mode: str
    value: float


class VerifiedCheckpointIO(CheckpointIO):
    """Reads and writes Lightning's checkpoints through :mod:`job.storage`, never unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``path``, then the manifest that makes it a checkpoint."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getvalue()
        manifest = Manifest(
            file=storage.basename(str(path)),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            global_step=checkpoint["global_step"],
            **checkpoint[RANKING],
        )
        storage.write_bytes(str(path), content)
        storage.write_text(_manifest_uri(str(path)), json.dumps(asdict(manifest), indent=2))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify and load ``path``; ``weights_only`` is always on."""
        return load(str(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, its manifest first: a state file alone is none."""
        storage.remove(_manifest_uri(str(path)))
        storage.remove(str(path))


def load(uri: str) -> dict[str, Any]:
    """The checkpoint at ``uri``, on the CPU, verified against its manifest where it has one.

    Raises:
        CheckpointError: damaged, or not a checkpoint.
        StorageError: it cannot be read.
    """
    content = storage.read_bytes(uri)
    if storage.exists(_manifest_uri(uri)):
        manifest = _read_manifest(_manifest_uri(uri))
        if len(content) != manifest.bytes or hashlib.sha256(content).hexdigest() != manifest.sha256:
            raise CheckpointError(
                f"{uri} is damaged: {len(content)} bytes, not what its manifest says ({manifest.bytes} bytes, "
                f"SHA-256 {manifest.sha256[:12]}…). Use an older checkpoint."
            )
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes led it to
        raise CheckpointError(
            f"{uri} is no checkpoint that can be loaded safely: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(checkpoint, dict) or "classifier" not in checkpoint:
        raise CheckpointError(f"{uri} is no checkpoint of this job (it says nothing of its classifier).")
    return cast("dict[str, Any]", checkpoint)


def manifests(run_dir: str) -> list[Manifest]:
    """Committed checkpoints of a run, oldest first; an unreadable manifest is named and passed over."""
    folder = storage.join(run_dir, FOLDER)
    if not storage.exists(folder):
        return []
    found = []
    for entry in storage.list_files(folder):
        if entry.key.endswith(SUFFIX + ".json"):
            try:
                found.append(_read_manifest(storage.join(folder, entry.key)))
            except CheckpointError as error:
                log.warning("%s", error)
    return sorted(found, key=lambda m: (m.global_step, m.epoch))


def best(candidates: list[Manifest]) -> Manifest:
    """The one with the best monitored value; of equals the newest."""
    sign = 1 if candidates[-1].mode == "max" else -1
    return max(candidates, key=lambda m: (sign * m.value, m.global_step))


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
    chosen = best(candidates) if which == "best" else candidates[-1]
    return storage.join(run_dir, FOLDER, chosen.file)


def newest_trusted(run_dir: str) -> tuple[str, Manifest] | None:
    """(URI, manifest) of the newest checkpoint that verifies; a bad one is named, and an older one used.

    Raises:
        CheckpointError: there are checkpoints, but none of them is good.
    """
    candidates = manifests(run_dir)
    for manifest in reversed(candidates):
        uri = storage.join(run_dir, FOLDER, manifest.file)
        try:
            load(uri)
        except (CheckpointError, StorageError) as error:
            log.warning("cannot resume from the newest checkpoint, trying the one before: %s", error)
        else:
            return uri, manifest
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {run_dir} can be read. Restore one, or start in "
            "another --run_dir."
        )
    return None


class Checkpointer(Checkpoint):
    """Commits a checkpoint at the end of every ``every_n_epochs``-th epoch, and the last.

    Args:
        monitor: logged metric that ranks checkpoints.
        mode: "max" or "min".
        keep_last: newest checkpoints to keep, at least 1.
        keep_best: best checkpoints to keep, besides.
        every_n_epochs: epochs between two checkpoints.
    """

    def __init__(
        self,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        keep_last: int = 2,
        keep_best: int = 1,
        every_n_epochs: int = 1,
    ) -> None:
        if keep_last < 1 or keep_best < 0 or every_n_epochs < 1:
            raise ConfigError("--checkpoint.keep_last and every_n_epochs must be at least 1, keep_best at least 0.")
        self.monitor = monitor
        self.mode = mode
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.every_n_epochs = every_n_epochs
        self.run_dir = ""
        self._committed_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Learn the run_dir from the trainer."""
        self.run_dir = trainer.default_root_dir

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, commit, and remove what is no longer kept."""
        done = trainer.current_epoch + 1
        # Lightning calls this hook again for the epoch that a resumed run had already finished.
        if trainer.global_step <= self._committed_step or trainer.sanity_checking:
            return
        if done % self.every_n_epochs and done != trainer.max_epochs:
            return
        name = f"epoch={done:03d}-step={trainer.global_step:08d}{SUFFIX}"
        uri = storage.join(self.run_dir, FOLDER, name)
        for logger in trainer.loggers:
            logger.save()  # so that no event before this checkpoint is missing after a kill
        trainer.save_checkpoint(uri)
        self._committed_step = trainer.global_step
        if trainer.is_global_zero:
            self._remove_superseded(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write into the checkpoint how it ranks among the others."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(k for k in trainer.callback_metrics if k.startswith("val/")))
            raise ConfigError(f"--checkpoint.monitor {self.monitor!r} is not logged. There are: {known}.")
        epoch = trainer.current_epoch + 1
        checkpoint[RANKING] = {"epoch": epoch, "monitor": self.monitor, "mode": self.mode, "value": float(value)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run has committed the step it starts from."""
        if trainer.global_step:
            self._committed_step = trainer.global_step

    def _remove_superseded(self, trainer: pl.Trainer) -> None:
        committed = manifests(self.run_dir)
        kept = {m.file for m in committed[-self.keep_last :]}
        ranked = sorted(committed, key=lambda m: (m.value if self.mode == "max" else -m.value, m.global_step))
        kept |= {m.file for m in ranked[len(ranked) - self.keep_best :]}
        for manifest in committed:
            if manifest.file not in kept:
                trainer.strategy.remove_checkpoint(storage.join(self.run_dir, FOLDER, manifest.file))


def _manifest_uri(checkpoint_uri: str) -> str:
    return checkpoint_uri + ".json"


def _read_manifest(uri: str) -> Manifest:
    try:
        return Manifest(**json.loads(storage.read_bytes(uri)))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint manifest {uri} cannot be read: {error}") from error
