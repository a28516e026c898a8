"""Small JSON files of a run_dir: strict JSON, read with a limit on their size."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec

from job import storage
from job.errors import CheckpointError, DataError, StorageError, StorageOutage

log = logging.getLogger(__name__)

MAX_BYTES = 32 << 20


def read_limited(uri: str, limit: int = MAX_BYTES) -> bytes:
    """The object at ``uri``.

    Raises:
        CheckpointError: it is larger than ``limit`` bytes.
        StorageError: it cannot be read.
    """
    try:
        return storage.read_bounded(uri, limit)
    except DataError as error:
        raise CheckpointError(f"{uri} is damaged: {error}") from error


def write_json(uri: str, value: Any, before_write: Callable[[], None] = storage.unconditionally) -> None:
    """Write strict JSON; NaN and infinity become null.

    A bucket that lets nobody overwrite the object of an earlier attempt keeps that one, with a warning.

    Args:
        before_write: called immediately before the write; raises if this job may not write there.

    Raises:
        StorageError: there is no earlier object, and this one cannot be written.
    """
    replace(uri, msgspec.json.format(msgspec.json.encode(value), indent=2), before_write)


def replace(uri: str, content: bytes, before_write: Callable[[], None] = storage.unconditionally) -> None:
    """Write an object, or keep that of an earlier attempt, with a warning, where the bucket lets nobody overwrite it.

    Args:
        before_write: called immediately before the write; raises if this job may not write there.

    Raises:
        StorageError: there is no earlier object, and this one cannot be written.
    """
    try:
        storage.write_bytes(uri, content, before_write)
    except StorageOutage:
        raise
    except StorageError as error:
        if not storage.exists(uri):
            raise
        log.warning(
            "%s was not updated and holds the values of an earlier attempt, because overwriting failed: %s", uri, error
        )
