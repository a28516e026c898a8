"""Rights to the data and to run_dir, tried out on the very prefixes."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from job import storage
from job.check.clock import compare_clocks
from job.check.finding import Finding, fail, ok, warn
from job.data.datamodule import ImageDataModule
from job.data.index.sources import expand_braces
from job.errors import StorageError
from job.process.periodic import call_within
from job.redact import HTTP
from job.storage import conditional

DATA, RUN_DIR, FEATURES = "data_access", "run_dir_access", "features_access"
DATA_MEND = "Correct --data.root (or --data.train, .val, .test), or give the account the right to read and list it."
RUN_DIR_MEND = (
    "Correct --run_dir, or give the account the right to create, read, list and delete objects below it (on Google "
    "Cloud: roles/storage.objectUser on the bucket)."
)


PATTERN_SECONDS = 20.0
"""How long a pattern with a wildcard is listed; one that takes longer passes."""


def require_data(data: ImageDataModule) -> None:
    """Look up each URI of the data.

    Raises:
        StorageError: one is missing, or this process may not read it.
    """
    for uri in itertools.chain.from_iterable(data.uris.values()):
        require_readable(uri)


def require_readable(uri: str) -> None:
    """Look up a URI of data.

    Of several archives the first one is looked up; one at least must match a wildcard. The images are not listed.

    Raises:
        StorageError: it is missing, or this process may not read it.
    """
    first = expand_braces(uri)[0]
    if uri.startswith(HTTP) or not re.search("[*?]", first):
        storage.info(first)
        return
    with contextlib.suppress(TimeoutError):
        if not call_within(PATTERN_SECONDS, lambda: storage.glob(first), "pattern"):
            raise StorageError(f"nothing matches {first}. Check the spelling.")


def write_probe(run_dir: str) -> str:
    """Write an empty object below run_dir; returns its URI.

    Raises:
        StorageError: this process may not write there.
    """
    uri = storage.join(run_dir, f"write-check-{uuid.uuid4().hex}")
    storage.write_bytes(uri, b"")
    return uri


def remove_probe(uri: str) -> StorageError | None:
    """Delete the object; returns the error of a bucket that lets nobody delete, as under a retention policy."""
    try:
        storage.remove(uri)
    except StorageError as error:
        return error
    return None


def data_access(data: ImageDataModule) -> Iterator[Finding]:
    """Whether the data can be looked up."""
    require_data(data)
    count = sum(map(len, data.uris.values()))
    yield ok(DATA, f"{count} URI(s) of the data can be looked up.")


def run_dir_access(run_dir: str) -> Iterator[Finding]:
    """Write, read back, list, overwrite, write conditionally and delete an object below run_dir; compare the clocks.

    Nothing stays behind, folders included, unless the store forbids to delete.
    """
    with _new_folders_removed(run_dir):
        before = time.time()
        uri = write_probe(run_dir)
        after = time.time()
        try:
            yield from compare_clocks(storage.modified(uri), before, after)
            yield from _rights(run_dir, uri)
        finally:
            error = _remove_versioned(uri) or remove_probe(uri)
    if error is not None:
        yield warn(
            RUN_DIR,
            f"objects below {run_dir} cannot be deleted: {error} {uri} stays behind.",
            "Give the account the right to delete: without it superseded checkpoints occupy space, and no lease "
            "protects the run from a second job.",
        )


def features_access(uri: str) -> Iterator[Finding]:
    """The same below ``--features.uri``, where several runs share cached features."""
    for finding in run_dir_access(uri):
        if finding.check == RUN_DIR:
            yield msgspec.structs.replace(finding, check=FEATURES)


def _rights(run_dir: str, uri: str) -> Iterator[Finding]:
    content = uuid.uuid4().bytes
    try:
        storage.write_bytes(uri, content)
    except StorageError as error:
        yield warn(
            RUN_DIR,
            f"objects below {run_dir} cannot be overwritten: {error}",
            "Choose a --run_dir in a bucket without retention policy, or give the account the right to delete: without "
            "it reports keep their first values, and no lease protects the run from a second job.",
        )
        return
    if storage.read_bytes(uri) != content:
        yield fail(RUN_DIR, f"{uri} holds other bytes than were written.", "Choose another --run_dir.")
        return
    name, pages = storage.basename(uri), storage.list_pages(run_dir)  # the first page has run_dir's own files
    if not any(entry.key == name for entry in next(pages, [])):
        yield fail(RUN_DIR, f"{uri} was written, and a listing of {run_dir} lacks it.", RUN_DIR_MEND)
        return
    yield _conditional_writes(run_dir, uri, content)


def _conditional_writes(run_dir: str, uri: str, content: bytes) -> Finding:
    """Whether the store honours conditions, by which one job at a time has the run_dir."""
    mend = "Start no second job with this --run_dir, or choose one in a store with conditional writes (gs://, s3://)."
    if weakness := conditional.weakness(uri):
        return warn(RUN_DIR, f"a second job in {run_dir} may not be noticed: {weakness}.", mend)
    if conditional.write_if(uri, uuid.uuid4().bytes, None) is not None:
        return warn(RUN_DIR, f"the store of {run_dir} overwrites an object that a condition forbids to.", mend)
    current = conditional.read_versioned(uri)
    if current is None or current.data != content or conditional.write_if(uri, b"2", current.version) is None:
        return warn(RUN_DIR, f"the store of {run_dir} refuses a conditional write whose condition holds.", mend)
    return ok(RUN_DIR, f"objects below {run_dir} can be written, read, listed, overwritten conditionally and deleted.")


@contextlib.contextmanager
def _new_folders_removed(run_dir: str) -> Iterator[None]:
    """Remove the folders of a local run_dir that did not exist before; a bucket has none."""
    if not storage.is_local(run_dir):
        yield
        return
    folder = Path(storage.filesystem(run_dir)[1])
    new = list(itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # another process has put something there
            for each in new:
                each.rmdir()


def _remove_versioned(uri: str) -> StorageError | None:
    """Delete the object as a lease is deleted: on a disk its lock file goes with it."""
    try:
        current = conditional.read_versioned(uri)
        if current is not None:
            conditional.remove_if(uri, current.version)
    except StorageError as error:
        return error
    return None
