"""List prefixes: folder by folder, several at once."""

from __future__ import annotations

import errno
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple

from job.storage.errors import translate_errors
from job.storage.filesystems import filesystem, store_of
from job.storage.stores import Store
from job.storage.uris import join

LISTINGS_IN_FLIGHT = 16


class Entry(NamedTuple):
    """One object under a listed prefix.

    Attributes:
        key: path relative to the prefix, ``/`` between its parts; a directory ends with ``/``.
        size: bytes (0 for a directory, -1 where the store does not tell).
        version: 64 bits that change with the content: of the object's generation, ETag or modification time.
        problem: why it cannot be read, as a plural noun: "broken links", "unreadable folders", …; empty: it can.
    """

    key: str
    size: int
    version: int = 0
    problem: str = ""

    @property
    def is_dir(self) -> bool:
        """Whether this is a folder, or a bucket's placeholder for one."""
        return self.key.endswith("/")


def list_files(uri: str) -> list[Entry]:
    """Everything below the prefix ``uri``, sorted by key.

    Raises:
        StorageError: nothing is there, or it may not be listed.
    """
    entries = (entry for page in list_pages(uri) for entry in page if not entry.problem)
    return sorted(entries, key=lambda entry: entry.key)


def list_pages(
    uri: str, skip: Callable[[str], bool] | None = None, *, pass_over_unreadable: bool = False
) -> Iterator[list[Entry]]:
    """Everything below the prefix ``uri``, folder by folder, each sorted; a folder's own files come first.

    Several folders are listed at once, and no more than those are held in memory. Links on disks are followed.

    Args:
        uri: prefix.
        skip: whether the folder of a key is not looked into.
        pass_over_unreadable: yield an entry with a problem for a folder below the prefix that may not be listed.

    Raises:
        StorageError: nothing is there, or it may not be listed.
    """
    store, path = store_of(uri)
    root = store.listing_root(path)
    with translate_errors(uri, "list"):
        store.fs.invalidate_cache()  # a listing from before somebody's upload would be silently stale
    entries = 0
    with ThreadPoolExecutor(LISTINGS_IN_FLIGHT) as pool:
        waiting: deque[tuple[str, Future[list[dict[str, Any]]] | None]] = deque([(root, None)])
        try:
            while waiting:
                for place in range(min(LISTINGS_IN_FLIGHT, len(waiting))):
                    folder, listing = waiting[place]
                    waiting[place] = (folder, listing or pool.submit(_list_folder, store, folder))
                folder, listing = waiting.popleft()
                assert listing is not None
                with translate_errors(_uri_of(uri, root, folder), "list"):
                    try:
                        page, folders = _page(root, folder, listing.result(), skip)
                    except PermissionError:
                        if not pass_over_unreadable or folder == root:
                            raise
                        start = len(root) + 1 if root else 0
                        page, folders = [Entry(f"{folder[start:]}/", 0, problem="unreadable folders")], []
                waiting.extendleft((name, None) for name in reversed(folders))
                entries += len(page)
                yield page
        finally:
            pool.shutdown(cancel_futures=True)
    if not entries and not store.has_empty_folder(root):
        with translate_errors(uri, "list"):
            raise FileNotFoundError(root)


def glob(pattern: str) -> list[str]:
    """URIs that match a pattern with ``*`` or ``?``, sorted."""
    fs, path = filesystem(pattern)
    with translate_errors(pattern, "list"):
        fs.invalidate_cache()
        return sorted(fs.unstrip_protocol(name) if "://" in pattern else name for name in fs.glob(path))


def version(details: dict[str, Any]) -> int:
    """64 bits that change with an object's content, from what its store reports (``fs.info``)."""
    for name in ("generation", "ETag", "etag", "md5Hash", "mtime", "LastModified", "Last-Modified", "created"):
        if (value := details.get(name)) is not None:
            # The memory filesystem has a number in one answer, and a date in another.
            value = value.timestamp() if isinstance(value, datetime) else value
            text = f"{name} {value} {details.get('size')}"
            return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return 0


def _list_folder(store: Store, folder: str) -> list[dict[str, Any]]:
    try:
        listing = store.list_folder(folder)
        if store.is_async and any(_is_unnamed(details, folder) for details in listing):
            # Of folder//file a bucket's filesystem names the folder again, and cannot list what is in it.
            listing += store.fs.find(folder, prefix="/", detail=True).values()
        return listing
    finally:
        store.fs.invalidate_cache(folder)  # else it would keep the listing of the whole bucket


def _is_unnamed(details: dict[str, Any], folder: str) -> bool:
    """Whether an entry of a folder's listing is a folder with an empty name in it."""
    is_object = any(details.get(name) is not None for name in ("generation", "ETag", "etag"))
    return details["type"] == "directory" and details["name"].rstrip("/") == folder and not is_object


def _uri_of(uri: str, root: str, folder: str) -> str:
    return uri if folder == root else join(uri, folder[len(root) :].lstrip("/"))


def _page(
    root: str, folder: str, listing: list[dict[str, Any]], skip: Callable[[str], bool] | None
) -> tuple[list[Entry], list[str]]:
    """The entries of one folder's listing, and the folders in it to look into."""
    start, page, folders = len(root) + 1 if root else 0, [], []
    for details in listing:
        name = details["name"]
        stripped = name.rstrip("/")
        # Consoles make "folders" in buckets as empty objects whose name ends with a slash.
        if stripped == folder:
            if details["type"] != "directory" and name == folder:
                raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
        elif details["type"] == "directory" or name.endswith("/"):
            key = stripped[start:] + "/"
            page.append(Entry(key, 0))
            if skip is None or not skip(key):
                folders.append(stripped)
        elif problem := details.get("problem"):
            page.append(Entry(name[start:], 0, problem=problem))
        else:
            size = details.get("size")
            page.append(Entry(name[start:], -1 if size is None else int(size), version(details)))
    return sorted(page), sorted(folders)
