"""Writing checkpoints beside training: a copy in host memory, then a thread that uploads it."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from job import storage, temporary
from job.errors import StorageError
from job.train import checkpoint
from job.train.checkpoint import Manifest

log = logging.getLogger(__name__)

FACTS = "manifest"
"""Key of a checkpoint under which its :class:`~job.train.checkpoint.Manifest` fields stand, but for the file's own."""


class BackgroundCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through :mod:`job.storage`; training stands still for a copy in memory only.

    One upload is in flight at a time. One that fails is tried again for ``upload_seconds``; then
    the failure is raised at the next call, and the state stays in a local file that the message names.

    Args:
        upload_seconds: how long an unreachable bucket is waited for.
        before_write: called immediately before each write to the bucket; raises if this job may not write there.
        before_commit: called in the thread when the state is uploaded, before its manifest is.
        after_commit: called in the thread once the checkpoint counts.
    """

    def __init__(
        self,
        upload_seconds: float,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[], None] = lambda: None,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.upload_seconds = upload_seconds
        self.before_commit = before_commit
        self.after_commit = after_commit
        self.before_write = before_write
        self._buffers: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Copy the state and start its upload, once an earlier one has ended.

        Raises:
            StorageError: the earlier one failed.
        """
        self.wait()
        snapshot = self._snapshot(checkpoint)
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, str(path)), name="checkpoint-upload", daemon=True
        )
        self._thread.start()

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify and load ``path``; ``weights_only`` is always on."""
        return checkpoint.load(str(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        checkpoint.remove(str(path))

    def raise_failure(self) -> None:
        """Raise what an upload that failed for good raised: a :class:`~job.errors.StorageError` as a rule."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Wait for the upload in flight.

        Raises:
            StorageError: it failed for good.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def _snapshot(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint with its tensors copied to host memory, into the same buffers each time.

        New memory would cost a page fault every 4 KiB, several times the copy itself.
        """
        earlier, self._buffers = iter(self._buffers), []

        def copy(tensor: Tensor) -> Tensor:
            buffer = next(earlier, None)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            buffer.copy_(tensor, non_blocking=tensor.is_cuda)
            self._buffers.append(buffer)
            return buffer

        taken: dict[str, Any] = apply_to_collection(checkpoint, Tensor, copy)
        if any(buffer.is_pinned() for buffer in self._buffers):
            torch.cuda.synchronize()
        return taken

    def _write(self, snapshot: dict[str, Any], uri: str) -> None:
        staged: Path | None = None
        try:
            facts = snapshot[FACTS]
            staged = self._stage(snapshot, storage.basename(uri))
            with staged.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            manifest = Manifest(file=storage.basename(uri), bytes=staged.stat().st_size, sha256=sha256, **facts)
            storage.retry(
                lambda: storage.upload(staged, uri, self.before_write),
                self.upload_seconds,
                f"the checkpoint {uri} waits",
            )
            storage.retry(self.before_commit, self.upload_seconds, f"the checkpoint {uri} waits")
            text = json.dumps(asdict(manifest), indent=2)
            storage.retry(
                lambda: storage.write_text(checkpoint.manifest_uri(uri), text, self.before_write),
                self.upload_seconds,
                f"the manifest of {uri} waits",
            )
            temporary.remove(staged.parent)
            self.after_commit()
        except StorageError as error:
            kept = ""
            if staged is not None and staged.exists():
                temporary.keep(staged.parent, f"the state of {uri}, which could not be uploaded.")
                kept = f" The state is kept in {staged}."
            self._failure = type(error)(f"the checkpoint {uri} could not be saved: {error}{kept}")
        except Exception as error:  # a thread's exception would go to stderr, and training on without checkpoints
            if staged is not None:
                temporary.remove(staged.parent)
            self._failure = error

    def _stage(self, snapshot: dict[str, Any], name: str) -> Path:
        """Write the state to a local file, from which it is uploaded, and which stays if that fails."""
        folder = None
        try:
            folder = temporary.folder("checkpoint")
            staged = temporary.create_file(folder / name)
            torch.save(snapshot, staged)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            if folder is not None:
                temporary.remove(folder)
            raise StorageError(
                f"it could not be written to {tempfile.gettempdir()} first: {error}. Make room there, or set TMPDIR "
                "to a larger disk."
            ) from error
        return staged
