"""Files on any fsspec filesystem: the only module that knows buckets from disks.

Every function takes a URI (``gs://``, ``s3://``, ``http(s)://``, ``memory://``, ``file://``) or a
plain path, and raises :class:`~job.errors.StorageError` with that URI in it, or its kind
:class:`~job.errors.StorageOutage` where the bucket itself is in trouble and a retry may help.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import logging
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from job.errors import StorageError, StorageOutage

log = logging.getLogger(__name__)

_creating = threading.Lock()
"""The memory filesystem, too, looks first and then writes; a bucket's server decides by itself."""


def use_gcs_emulator(url: str) -> None:
    """Let gs:// URIs mean the GCS server at ``url``, for this process and its children."""
    os.environ["STORAGE_EMULATOR_HOST"] = url
    # gcsfs probes a bucket's type over gRPC, which emulators do not speak: 60 s lost a call.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    # No credentials are asked for; gcsfs would look for some, on a network that may not be there.
    os.environ["FSSPEC_GS_TOKEN"] = "anon"
    fsspec.config.conf.setdefault("gs", {})["token"] = "anon"


if os.environ.get("STORAGE_EMULATOR_HOST"):
    use_gcs_emulator(os.environ["STORAGE_EMULATOR_HOST"])


@dataclass(frozen=True)
class Entry:
    """One object under a listed prefix.

    Attributes:
        key: path relative to the prefix, ``/`` between its parts; a directory ends with ``/``.
        size: bytes (0 for a directory).
    """

    key: str
    size: int

    @property
    def is_dir(self) -> bool:
        """Whether this is a folder, or a bucket's placeholder for one."""
        return self.key.endswith("/")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of ``uri`` and the path within it.

    Call it in the process that uses it: fsspec's asynchronous filesystems do not survive a fork
    (https://github.com/fsspec/gcsfs/issues/379).
    """
    with _explained(uri, "open"):
        fs, path = url_to_fs(uri)
        return fs, str(path)


def is_local(uri: str) -> bool:
    """True for a plain path or ``file://`` URI."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def is_process_local(uri: str) -> bool:
    """True where other processes cannot see the data (``memory://``)."""
    return "memory" in _protocols(filesystem(uri)[0])


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` below it."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def basename(uri: str) -> str:
    """The last part of a URI, without a query string (``https://host/a.zip?alt=media`` → ``a.zip``)."""
    path = uri.split("?", 1)[0] if uri.startswith(("http://", "https://")) else uri
    return path.rstrip("/").rsplit("/", 1)[-1]


def exists(uri: str) -> bool:
    """Whether an object (or a prefix with something under it) is there."""
    fs, path = filesystem(uri)
    with _explained(uri, "look up"):
        return bool(fs.exists(path))


def info(uri: str) -> dict[str, Any]:
    """What the filesystem knows of one object: ``size`` in bytes, ``type``, checksums."""
    fs, path = filesystem(uri)
    with _explained(uri, "look up"):
        found: dict[str, Any] = fs.info(path)
        return found


def list_files(uri: str) -> list[Entry]:
    """Everything below the prefix ``uri``, sorted by key.

    Raises:
        StorageError: nothing is there, or it may not be listed.
    """
    fs, path = filesystem(uri)
    with _explained(uri, "list"):
        fs.invalidate_cache()  # a listing from before somebody's upload would be silently stale
        found = fs.find(path, withdirs=True, detail=True)
        prefix = path.rstrip("/") + "/"
        entries = []
        for name, details in found.items():
            key = name[len(prefix) :] if name.startswith(prefix) else ""
            # Consoles make "folders" in buckets as empty objects whose name ends with a slash.
            is_dir = details["type"] == "directory" or name.endswith("/")
            if key.strip("/"):
                size = 0 if is_dir else int(details.get("size") or 0)
                entries.append(Entry(key.rstrip("/") + "/" if is_dir else key, size))
        if not entries and not (isinstance(fs, LocalFileSystem) and fs.isdir(path)):
            raise FileNotFoundError(path)
    return sorted(entries, key=lambda entry: entry.key)


def read_bytes(uri: str) -> bytes:
    """The whole object."""
    fs, path = filesystem(uri)
    with _explained(uri, "read"):
        data: bytes = fs.cat_file(path)
        return data


def read_many(root: str, keys: list[str]) -> list[bytes]:
    """Objects ``root/key``, fetched concurrently where the filesystem can.

    Raises:
        StorageError: one of them cannot be read; the message names it.
    """
    fs, path = filesystem(root)
    paths = {key: fs._strip_protocol(f"{path.rstrip('/')}/{key}") for key in keys}
    with _explained(root, "read"):
        found = fs.cat(list(dict.fromkeys(paths.values())), on_error="return")
    for key, name in paths.items():
        if isinstance(found[name], Exception):
            with _explained(join(root, key), "read"):
                raise found[name]
    return [found[paths[key]] for key in keys]


def write_bytes(uri: str, data: bytes) -> None:
    """Write the object whole or not at all: readers see the old content or the new.

    An object store's PUT is atomic by itself; a disk needs a temporary file and a rename.
    """
    fs, path = filesystem(uri)
    with _explained(uri, "write"):
        if isinstance(fs, LocalFileSystem):
            _write_and_rename(Path(path), io.BytesIO(data))
        else:
            fs.pipe_file(path, data)


def upload(source: Path, uri: str) -> None:
    """:func:`write_bytes` of a local file's content, and a check that it arrived.

    Raises:
        StorageOutage: what the store says it has is not what was sent.
    """
    fs, path = filesystem(uri)
    with _explained(uri, "write"):
        if isinstance(fs, LocalFileSystem):
            with source.open("rb") as file:
                _write_and_rename(Path(path), file)
        else:
            fs.put_file(str(source), path)
            require_same(uri, fs.info(path), source)


def require_same(uri: str, details: dict[str, Any], file: Path) -> None:
    """Hold a local copy of ``uri`` against what its store says of it: size and, where known, MD5.

    Raises:
        StorageOutage: they differ: something was lost on the way.
    """
    size, expected, md5 = file.stat().st_size, details.get("size"), details.get("md5Hash")
    if isinstance(expected, int) and size != expected:
        raise StorageOutage(f"{uri}: {expected} bytes in the store, {size} here. Try again.")
    if isinstance(md5, str):
        with file.open("rb") as content:
            found = base64.b64encode(hashlib.file_digest(content, "md5").digest()).decode()
        if found != md5:
            raise StorageOutage(f"{uri}: the content here does not match its MD5 ({found}, stored {md5}). Try again.")


def create(uri: str, data: bytes) -> bool:
    """Write the object if there is none; returns whether this call made it. Of several callers one wins."""
    fs, path = filesystem(uri)
    with _explained(uri, "create"):
        try:
            if isinstance(fs, LocalFileSystem):
                # fsspec looks first and then writes; the kernel does both at once.
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with Path(path).open("xb") as file:
                    file.write(data)
            else:
                with _creating:
                    fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True


def write_many(root: str, contents: dict[str, bytes]) -> None:
    """Write objects ``root/key``, concurrently where the filesystem can."""
    fs, path = filesystem(root)
    with _explained(root, "write"):
        fs.pipe({f"{path.rstrip('/')}/{key}": content for key, content in contents.items()})


def write_text(uri: str, text: str) -> None:
    """:func:`write_bytes` of UTF-8."""
    write_bytes(uri, text.encode())


def download(uri: str, target: Path) -> None:
    """Copy one object to the local file ``target``, streaming."""
    fs, path = filesystem(uri)
    with _explained(uri, "download"):
        fs.get_file(path, str(target))


def retry(action: Callable[[], None], seconds: float, waiting: str) -> None:
    """Do ``action``, again and again for ``seconds`` while the bucket is in trouble, with jittered backoff.

    The filesystems themselves retry a request several times first.

    Args:
        waiting: what to say in the log when the first attempt fails.

    Raises:
        StorageOutage: the last failure.
    """
    deadline, pause = time.monotonic() + seconds, 0.5
    while True:
        try:
            return action()
        except StorageOutage as error:
            if pause == 0.5:
                log.warning("%s: %s", waiting, error)
            pause = min(pause * 2, 16.0)
            wait = pause * random.uniform(0.5, 1.0)
            if time.monotonic() + wait > deadline:
                raise
            time.sleep(wait)


def remove(uri: str) -> None:
    """Delete one object; it is no error when it is already gone."""
    fs, path = filesystem(uri)
    with _explained(uri, "delete"), contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_tree(uri: str) -> None:
    """Delete everything below a prefix; it is no error when nothing is there."""
    fs, path = filesystem(uri)
    with _explained(uri, "delete"), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def _write_and_rename(target: Path, content: IO[bytes]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextlib.contextmanager
def _explained(uri: str, action: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise StorageError(
            f"cannot {action} {uri}: no such bucket, object or folder. Check the spelling; for a "
            "bucket, also that it exists in the project of your credentials."
        ) from error
    except (NotADirectoryError, IsADirectoryError) as error:
        raise StorageError(f"cannot {action} {uri}: {error.strerror or error}.") from error
    except ImportError as error:
        raise StorageError(f"cannot {action} {uri}: {error}.") from error
    except ValueError as error:
        raise StorageError(f"cannot {action} {uri}: {error}.") from error
    except Exception as error:
        if _is_denied(error):
            raise StorageError(
                f"cannot {action} {uri}: permission denied ({_first_line(error)}). Give the account the job "
                "runs as the right to do this (on Google Cloud: roles/storage.objectUser on the bucket)."
            ) from error
        if _looks_remote(error):
            raise StorageOutage(f"cannot {action} {uri}: {type(error).__name__}: {_first_line(error)}") from error
        if isinstance(error, OSError):
            raise StorageError(f"cannot {action} {uri}: {error.strerror or _first_line(error)}.") from error
        raise


def _is_denied(error: Exception) -> bool:
    code = getattr(error, "code", None) or getattr(error, "status", None)
    told = isinstance(error, OSError) and str(error).startswith("Forbidden")  # gcsfs, without a code
    return told or isinstance(error, PermissionError) or code in (401, 403, "401", "403")


def _looks_remote(error: Exception) -> bool:
    """Cloud clients raise their own families of exceptions, most of them not OSError."""
    roots = ("aiohttp", "gcsfs", "google", "botocore", "s3fs", "requests", "asyncio", "fsspec")
    known = any(kind.__module__.split(".")[0] in roots for kind in type(error).__mro__)
    return known or isinstance(error, (TimeoutError, ConnectionError))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
