"""Where images come from: a folder or prefix, or an archive fetched once a node and unpacked safely."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from job import storage
from job.errors import DataError, StorageError

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def is_archive(uri: str) -> bool:
    """Whether the URI names a zip or tar archive."""
    return storage.basename(uri).lower().endswith(ARCHIVE_SUFFIXES)


def is_image(key: str) -> bool:
    """Whether a key has the suffix of an image format; hidden files (``._cat.jpg``) are none."""
    return key.lower().endswith(IMAGE_SUFFIXES) and not PurePosixPath(key).name.startswith(".")


def default_cache_dir() -> str:
    """``$XDG_CACHE_HOME/job``, or ``~/.cache/job``."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "job")


def materialise(uri: str, cache_dir: str) -> str:
    """The URI of the folder to read: ``uri`` itself, or where its archive lies unpacked on this node.

    An archive is downloaded once a node however many processes ask (they wait for the first), its
    size and, where the store reports one, MD5 are checked, as is every member's CRC (zip) or the
    stream's (gzip). Only plain files are unpacked, none of them outside the target.

    Raises:
        StorageError: the archive cannot be fetched.
        DataError: it is damaged, or a member's name would escape the target folder.
    """
    if not is_archive(uri):
        return uri
    details = storage.info(uri)
    # Whatever names a version of the object: a new upload under the same name is a new folder.
    version = [str(details.get(k)) for k in ("size", "generation", "ETag", "etag", "md5Hash", "mtime")]
    digest = hashlib.sha256("\n".join([uri, *version]).encode()).hexdigest()[:16]
    cache = Path(cache_dir).expanduser()
    target = cache / f"{storage.basename(uri)}-{digest}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{target.name}.lock"):
            if not target.exists():
                _fetch_and_unpack(uri, details, cache, target)
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, StorageError) and getattr(cause, "errno", None) not in DISK_FULL:
            raise
        raise StorageError(
            f"cannot unpack {uri} under {cache}: {getattr(cause, 'strerror', None) or error}. Choose a writable place "
            "with enough room by --data.cache_dir."
        ) from error
    return str(target)


def _fetch_and_unpack(uri: str, details: dict[str, Any], cache: Path, target: Path) -> None:
    # Unpacked beside the target and renamed at the end: a killed process leaves no half-filled target.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=cache) as scratch:
        archive = Path(scratch) / storage.basename(uri)
        log.info("fetching %s", uri)
        storage.download(uri, archive)
        storage.require_same(uri, details, archive)
        content = Path(scratch) / "content"
        content.mkdir()
        try:
            for name, member in _members(archive):
                _write_member(uri, content, name, member)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's trouble, not the archive's (a bad gzip stream has no errno)
            raise DataError(f"{uri} is not a readable archive: {error}. Upload it again.") from error
        content.rename(target)


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """(name, content) of every directory (None) and plain file; links and devices are left out."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as zip_file:
            for item in zip_file.infolist():
                if item.is_dir():
                    yield item.filename, None
                else:
                    with zip_file.open(item) as member:
                        yield item.filename, member
    else:
        if archive.name.lower().endswith(".tar"):
            _require_end_of_tar(archive)  # tarfile takes a cut between two members for the end
        with tarfile.open(archive) as tar_file:
            for tar_item in tar_file:
                if tar_item.isdir():
                    yield tar_item.name, None
                elif tar_item.isfile():
                    yield tar_item.name, tar_file.extractfile(tar_item)


def _require_end_of_tar(archive: Path) -> None:
    """POSIX ends a tar archive by blocks of 512 zeros."""
    with archive.open("rb") as file:
        file.seek(-min(512, archive.stat().st_size), os.SEEK_END)
        if file.read().strip(b"\0"):
            raise tarfile.ReadError("it is cut short")


def _write_member(uri: str, content: Path, name: str, member: IO[bytes] | None) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise DataError(f"{uri}: member {name!r} would be written outside the target folder. Pack it again.")
    if "__MACOSX" in path.parts:
        return
    target = content.joinpath(*path.parts)
    if member is None:
        target.mkdir(parents=True, exist_ok=True)
    elif is_image(name):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock of the kernel: it ends with the process that holds it, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
