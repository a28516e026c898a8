"""What a URI of data means: a folder, archives, a manifest or a saved index."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from job import storage
from job.data.index.access import Access
from job.data.index.bounded import unpack_gzip
from job.data.local_files import locked, private_folder, room_needed
from job.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

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


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that samples are read from, or that names them.

    Attributes:
        uri: a folder or prefix, an archive, or a manifest.
        kind: which of them.
        version: 64 bits that change with the content of an archive or manifest; 0 for a folder.
        whole: it cannot be read in parts (gzip, a server without ranges): it is copied once a node.
    """

    uri: Annotated[str, msgspec.Meta(min_length=1, max_length=65_536)]
    kind: Kind
    version: Annotated[int, msgspec.Meta(ge=0)] = 0
    whole: bool = False

    def __post_init__(self) -> None:
        if self.version >= 1 << 64:
            raise ValueError("version has more than 64 bits")
        if "\0" in self.uri:
            raise ValueError("uri holds a zero byte")


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


def materialise(source: Source, cache_dir: str, access: Access | None = None) -> str:
    """Where to read ``source``: its URI, or, if it must be copied whole, the copy on this node.

    It is downloaded once a node however many processes ask (they wait for the first); its size and,
    where the store reports one, MD5 are checked, as is a gzip stream's CRC.

    Args:
        cache_dir: local folder of the node's cache.
        access: where it may be read from; default: anywhere.

    Raises:
        StorageError: the archive cannot be fetched, or there is no room for it.
        DataError: it is damaged.
    """
    if not source.whole:
        return source.uri
    name = f"{storage.basename(source.uri)}-{hashlib.sha256(source.uri.encode()).hexdigest()[:8]}-{source.version:016x}"
    target = Path(cache_dir).expanduser() / "archives" / name
    with room_needed(target.parent, f"keep a copy of {source.uri}"):
        private_folder(target.parent)
        with locked(target), access.guarded() if access else contextlib.nullcontext():
            if not target.exists():
                _fetch(source.uri, target)
    return str(target)


def _fetch(uri: str, target: Path) -> None:
    # Written beside the target and renamed at the end: a killed process leaves no half of it.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        copy = Path(scratch) / "copy"
        log.info("fetching %s", uri)
        storage.download_verified(uri, copy)
        if storage.basename(uri).lower().endswith(("gz", "tgz")):
            unpacked = Path(scratch) / "unpacked"
            unpack_gzip(uri, copy, unpacked)
            copy = unpacked
        copy.chmod(0o600)
        copy.replace(target)
