"""The folder of an export, on a disk or in a bucket: ``export.json`` is written last, and makes it whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from job import storage
from job.errors import ConfigError
from job.export import manifest
from job.export.manifest import ExportManifest, FileEntry
from job.storage.json_files import read_limited


def require_free(output: str, *, overwrite: bool) -> None:
    """Check that nothing is lost by writing to a folder.

    Raises:
        ConfigError: it has files, and they are not to be overwritten.
    """
    if overwrite or not storage.exists(output):
        return
    entries = [entry for entry in storage.list_files(output) if not entry.is_dir]
    if entries:
        raise ConfigError(
            f"{output} has {len(entries)} file(s), such as {entries[0].key}. Choose another --output, or replace an "
            "earlier export by --overwrite."
        )


def file_entries(folder: Path) -> list[FileEntry]:
    """Size and hash of all files below a local folder."""
    entries = []
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries.append(FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, digest))
    return entries


def publish(folder: Path, content: ExportManifest, output: str) -> None:
    """Upload the files, and then ``export.json``; files of an earlier export that are not among them are deleted.

    Args:
        folder: local folder of the files; ``export.json`` is added to it.
        content: of ``export.json``.
        output: URI of the export's folder.

    Raises:
        CheckpointError: the ``export.json`` of the earlier export is damaged.
        StorageError: a file cannot be written.
    """
    uri = storage.join(output, manifest.FILE)
    earlier: list[str] = []
    if storage.exists(uri):
        earlier = manifest.listed_files(uri, read_limited(uri))
        storage.remove(uri)  # until the end there is no whole export
    paths = [entry.path for entry in content.files]
    for path in paths:
        storage.upload(folder / path, storage.join(output, path))
    for path in sorted(set(earlier) - set(paths)):
        storage.remove(storage.join(output, path))
    local = folder / manifest.FILE
    local.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))
    storage.upload(local, uri)
