"""Writing checkpoints beside training: a copy in host memory, then a thread that uploads it."""

from __future__ import annotations

import enum
import hashlib
import logging
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.plugins import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from job import checkpoint, storage
from job.checkpoint import confusion
from job.checkpoint.confusion import ConfusionMatrix
from job.checkpoint.manifest import encode_manifest, manifest_of, manifest_uri
from job.checkpoint.state import CLASSIFIER_KEY, CONFUSION_KEY, MANIFEST_KEY, require_lightning_version
from job.errors import CheckpointError, StorageError, StorageOutage, first_line
from job.process import temporary

log = logging.getLogger(__name__)

NAMES_TRIED = 9
"""Names tried for one checkpoint on a bucket that lets nobody overwrite what an earlier attempt left."""


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
        upload_seconds: float = 600.0,
        before_commit: Callable[[], None] = storage.unconditionally,
        after_commit: Callable[[], None] = storage.unconditionally,
        before_write: Callable[[], None] = storage.unconditionally,
    ) -> None:
        self.upload_seconds = upload_seconds
        self.before_commit = before_commit
        self.after_commit = after_commit
        self.before_write = before_write
        self._buffers: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._abandoned: frozenset[str] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Copy the state and start its upload, once an earlier one has ended.

        Raises:
            StorageError: the earlier one failed.
            CheckpointError: the earlier one could not be loaded again.
        """
        self.wait()
        # Every validation has a matrix of its own: no copy is needed.
        matrix: ConfusionMatrix | None = checkpoint.pop(CONFUSION_KEY, None)
        snapshot = self._snapshot(checkpoint)
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, matrix, str(path)), name="checkpoint-upload", daemon=True
        )
        self._thread.start()

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify and load ``path``; ``weights_only`` is always on."""
        loaded = checkpoint.load(str(path))
        require_lightning_version(str(path), loaded)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        checkpoint.remove(str(path))

    def raise_failure(self) -> None:
        """Raise the exception of an upload that failed permanently, usually a :class:`~job.errors.StorageError`."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Wait for the upload in flight.

        Raises:
            StorageError: it failed for good.
            CheckpointError: what it wrote could not be loaded again.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def _snapshot(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint with its tensors copied to host memory, into the same buffers each time.

        New memory would cost a page fault every 4 KiB, several times the copy itself. Scalars of numpy, enumerations
        and paths become plain values: their classes are not among those that a safe loader accepts.
        """
        earlier, self._buffers = iter(self._buffers), []

        def copy(value: Any) -> Any:
            if isinstance(value, np.generic):
                return value.item()
            if isinstance(value, enum.Enum):
                return value.value
            if isinstance(value, Path):
                return str(value)
            if isinstance(value, set):
                return set(value)
            buffer = next(earlier, None)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            buffer.copy_(value, non_blocking=value.is_cuda)
            self._buffers.append(buffer)
            return buffer

        # apply_to_collection takes 1.7 µs for each class name.
        described = checkpoint.get(CLASSIFIER_KEY, {})
        plain = {name: list(value) for name, value in described.items() if _is_plain_list(value)}
        shorter = {**checkpoint, CLASSIFIER_KEY: {**described, **dict.fromkeys(plain)}} if plain else checkpoint
        copied: dict[str, Any] = apply_to_collection(shorter, (Tensor, np.generic, enum.Enum, Path, set), copy)
        if plain:
            copied[CLASSIFIER_KEY] |= plain
        if any(buffer.is_pinned() for buffer in self._buffers):
            torch.cuda.synchronize()
        return copied

    def _write(self, snapshot: dict[str, Any], matrix: ConfusionMatrix | None, uri: str) -> None:
        staged: Path | None = None
        try:
            staged = self._stage(snapshot, storage.basename(uri))
            _require_loadable(staged, snapshot, uri)
            with staged.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = staged.stat().st_size
            uri = self._upload(staged, uri)
            described = None
            if matrix is not None:
                content = confusion.encode(matrix.cells)
                described = confusion.describe(content, matrix.classes)
                self._write_bytes(uri + confusion.SUFFIX, content, f"the metrics of {uri} wait")
            self._retry(self.before_commit, f"the checkpoint {uri} waits")
            file_facts = {"file": storage.basename(uri), "bytes": size, "sha256": sha256, "confusion": described}
            manifest = encode_manifest(manifest_of(snapshot[MANIFEST_KEY], **file_facts))
            self._write_bytes(manifest_uri(uri), manifest, f"the manifest of {uri} waits")
            temporary.remove(staged.parent)
            self.after_commit()
        except StorageError as error:
            is_staged = staged is not None and staged.exists()
            kept = f" The state is kept in {staged}." if is_staged else ""
            self._failure = type(error)(f"the checkpoint {uri} could not be saved: {error}{kept}")
            if staged is not None and is_staged:
                temporary.keep(staged.parent, f"the state of {uri}, which could not be uploaded.")
        except Exception as error:  # a thread's exception would go to stderr, and training on without checkpoints
            if staged is not None:
                temporary.remove(staged.parent)
            self._failure = error

    def _retry(self, action: Callable[[], None], waiting: str) -> None:
        storage.retry(action, self.upload_seconds, waiting)

    def _write_bytes(self, uri: str, content: bytes, waiting: str) -> None:
        self._retry(lambda: storage.write_bytes(uri, content, self.before_write), waiting)

    def _upload(self, staged: Path, uri: str) -> str:
        """Upload the state; returns its URI, with another name where the bucket does not let an object be replaced."""
        names: list[str] = []
        self._retry(lambda: names.append(self._free_name(uri)), f"the checkpoint {uri} waits")
        name = names[0]
        for number in range(2, NAMES_TRIED + 2):
            try:
                self._upload_as(staged, name, f"the checkpoint {uri} waits")
            except StorageOutage:
                raise
            except StorageError:
                # A bucket with a retention policy, or an account that may only create: something is there already.
                if number > NAMES_TRIED or not storage.exists(name):
                    raise
                name = self._free_name(checkpoint.numbered(uri, number))
            else:
                break
        return name

    def _free_name(self, uri: str) -> str:
        """A name that no good or abandoned checkpoint has; checkpoints are abandoned only before an attempt."""
        if self._abandoned is None:
            self._abandoned = checkpoint.abandoned_names(storage.split(uri)[0])
        return checkpoint.free_name(uri, self._abandoned)

    def _upload_as(self, staged: Path, uri: str, waiting: str) -> None:
        self._retry(lambda: storage.upload(staged, uri, self.before_write), waiting)

    def _stage(self, snapshot: dict[str, Any], name: str) -> Path:
        """Write the state to a local file, which is kept if its upload fails."""
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
        except Exception as error:  # pickle raises whatever the objects in the state raise
            temporary.remove(staged.parent)
            raise _not_loadable(snapshot, name, error) from error
        return staged


def _is_plain_list(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {str, int, float, bool}


def _require_loadable(staged: Path, snapshot: dict[str, Any], uri: str) -> None:
    """Load the staged file as a resume will, without reading its tensors.

    Raises:
        CheckpointError: it holds an object whose class a safe loader refuses.
    """
    try:
        torch.load(staged, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever the bytes led it to
        raise _not_loadable(snapshot, uri, error) from error


def _not_loadable(snapshot: dict[str, Any], uri: str, error: Exception) -> CheckpointError:
    where, value = next(_unsafe(snapshot, ()), (("unknown",), None))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    reason = first_line(error, 200)
    return CheckpointError(
        f"the checkpoint {uri} could not be loaded again without running code: its entry {' → '.join(where)} is a "
        f"{kind} ({reason}). Let the state_dict() of that callback return numbers, text, tensors and "
        "lists or dicts of them."
    )


_SAFE = (type(None), bool, int, float, complex, str, bytes, Tensor, torch.Size, torch.dtype, torch.device)


def _unsafe(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of values that a safe loader may refuse."""
    if isinstance(value, (dict, list, tuple, set)) and type(value) in (dict, OrderedDict, Counter, list, tuple, set):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unsafe(item, (*path, str(key)))
    elif type(value) not in _SAFE and not isinstance(value, Tensor):
        yield path, value
