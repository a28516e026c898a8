"""Reading of all manifests of a run: several at once, and each of them once per process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from job import storage
from job.checkpoint.manifest import MAX_BYTES, Manifest, decode_manifest
from job.errors import CheckpointError, StorageError

READS_IN_FLIGHT = 16

Outcome = Manifest | CheckpointError | None
"""A manifest, why it cannot be used, or None where it is gone."""


class ManifestReader:
    """Reads manifests, and keeps those of the latest folder.

    A manifest is read again where the listing has another size or version of its file: another generation, ETag or
    modification time. A file without a version is always read, and so is one that could not be used.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder = ""
        self._kept: dict[storage.Entry, Manifest] = {}

    def read(self, folder: str, entries: Sequence[storage.Entry]) -> list[Outcome]:
        """The outcome of each entry.

        Args:
            folder: of the checkpoints.
            entries: the manifests in it, as they have just been listed.

        Raises:
            StorageError: one exists and cannot be read.
        """
        with self._lock:
            kept = self._kept if self._folder == folder else {}
        unread = [entry for entry in entries if entry not in kept]
        outcomes: dict[storage.Entry, Outcome] = {**kept}
        if unread:
            with ThreadPoolExecutor(min(READS_IN_FLIGHT, len(unread))) as pool:
                outcomes |= zip(unread, pool.map(lambda entry: _read(folder, entry), unread), strict=True)
        usable = {entry: outcome for entry in entries if isinstance(outcome := outcomes[entry], Manifest)}
        with self._lock:
            self._folder = folder
            self._kept = {entry: manifest for entry, manifest in usable.items() if entry.version}
        return [outcomes[entry] for entry in entries]


def _read(folder: str, entry: storage.Entry) -> Outcome:
    uri = storage.join(folder, entry.key)
    try:
        if entry.size > MAX_BYTES:
            return CheckpointError(f"the checkpoint manifest {uri} is damaged: {entry.size:,} bytes.")
        return decode_manifest(uri, storage.read_bytes(uri))
    except CheckpointError as error:
        return error
    except StorageError:
        if storage.exists(uri):
            raise
        return None


read_all = ManifestReader().read
"""The reader of this process."""
