"""What a URI of data means: a folder, archives, a manifest or a saved index."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from job import storage
from job.data.bounded import unpack_gzip
from job.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
INDEX_FILE = "index.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
IMAGE_PATTERN = rf"(?i)(^|/)[^/.][^/]*({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$"
"""Keys of images; hidden files (``._cat.jpg``) are none."""

Kind = Literal["folder", "zip", "tar", "manifest"]
KINDS: dict[str, Kind] = {
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".csv": "manifest",
    ".jsonl": "manifest",
    ".parquet": "manifest",
}


@dataclass(frozen=True)
class Source:
    """One thing that samples are read from, or that names them.

    Attributes:
        uri: a folder or prefix, an archive, or a manifest.
        kind: which of them.
        version: 64 bits that change with the content of an archive or manifest; 0 for a folder.
        whole: it cannot be read in parts (gzip, a server without ranges): it is copied once a node.
    """

    uri: str
    kind: Kind
    version: int = 0
    whole: bool = False


def is_image(key: str) -> bool:
    """Whether a key has the suffix of an image format; hidden files are none."""
    return re.search(IMAGE_PATTERN, key) is not None


def default_cache_dir() -> str:
    """``$XDG_CACHE_HOME/job``, or ``~/.cache/job``."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "job")


def kind_of(uri: str) -> Kind:
    """What ``uri`` names, by its suffix."""
    name = storage.basename(uri).lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), "folder")


def is_saved_index(uri: str) -> bool:
    """Whether ``uri`` names the index that ``job index`` made."""
    return storage.basename(uri) == INDEX_FILE


def find_sources(uri: str) -> list[Source]:
    """The sources behind one URI; a pattern (``{000..146}``, ``{a,b}``, ``*``) stands for several archives.

    Raises:
        ConfigError: a pattern of something else than archives.
        StorageError: an archive is not there.
    """
    uris = [match for expanded in expand_braces(uri) for match in _globbed(expanded)]
    if not uris:
        raise StorageError(f"nothing matches {uri}. Check the spelling.")
    if len(uris) > 1 and any(kind_of(each) not in ("tar", "zip") for each in uris):
        raise ConfigError(f"{uri}: a pattern stands for .tar or .zip files. Give several folders as a list.")
    return [_source(each) for each in uris]


def expand_braces(pattern: str) -> list[str]:
    """``shard-{000..002}.tar`` → three names, ``{train,val}.tar`` → two, as in WebDataset and bash."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = numbers[1], numbers[2]
        names = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        names = found[1].split(",")
    rest = expand_braces(pattern[found.end() :])
    return [pattern[: found.start()] + name + tail for name in names for tail in rest]


def _globbed(uri: str) -> list[str]:
    is_url = uri.startswith(("http://", "https://"))  # whose ? begins a query
    return storage.glob(uri) if re.search(r"[*?]", uri) and not is_url else [uri]


def _source(uri: str) -> Source:
    kind = kind_of(uri)
    if kind == "folder":
        return Source(uri, kind)
    whole = storage.basename(uri).lower().endswith(("gz", "tgz")) or not storage.serves_ranges(uri)
    return Source(uri, kind, storage.version(storage.info(uri)), whole)


def materialise(source: Source, cache_dir: str) -> str:
    """Where to read ``source``: its URI, or, if it must be copied whole, the copy on this node.

    It is downloaded once a node however many processes ask (they wait for the first); its size and,
    where the store reports one, MD5 are checked, as is a gzip stream's CRC.

    Raises:
        StorageError: the archive cannot be fetched, or there is no room for it.
        DataError: it is damaged.
    """
    if not source.whole:
        return source.uri
    name = f"{storage.basename(source.uri)}-{hashlib.sha256(source.uri.encode()).hexdigest()[:8]}-{source.version:016x}"
    target = Path(cache_dir).expanduser() / name
    with room_needed(target.parent, f"keep a copy of {source.uri}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if not target.exists():
                _fetch(source.uri, target)
    return str(target)


def _fetch(uri: str, target: Path) -> None:
    # Written beside the target and renamed at the end: a killed process leaves no half of it.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        copy = Path(scratch) / "copy"
        log.info("fetching %s", uri)
        storage.download_verified(uri, copy)
        if uri.lower().endswith(("gz", "tgz")):
            unpacked = Path(scratch) / "unpacked"
            unpack_gzip(uri, copy, unpacked)
            copy = unpacked
        copy.replace(target)


@contextlib.contextmanager
def room_needed(folder: Path, purpose: str) -> Iterator[None]:
    """Tell which option to change when ``folder`` cannot be written or is full."""
    try:
        yield
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, StorageError) and getattr(cause, "errno", None) not in DISK_FULL:
            raise
        raise StorageError(
            f"cannot {purpose} in {folder}: {getattr(cause, 'strerror', None) or error}. Choose a writable place "
            "with enough room by --data.cache_dir."
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A lock of the kernel, on ``path`` with ``.lock``: it ends with the process that holds it, however that ends."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
