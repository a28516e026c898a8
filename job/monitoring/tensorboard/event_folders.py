"""Where the TensorBoard events of runs lie, and the names by which TensorBoard shows the runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from job import redact, storage

log = logging.getLogger(__name__)

FOLDER = "tensorboard"
"""Folder of the events, below run_dir."""
EVENT_FILE = "tfevents"
"""Part of the name of an event file, by which TensorBoard knows one."""

NO_EVENTS = frozenset(["checkpoints", "features", "index", "profile", "xla"])
"""Folders of a run_dir that are not searched."""
MOST_LEVELS = 6
"""Folders this deep below the given one are searched."""
MOST_ENTRIES = 200_000
"""Files and folders after which the search ends."""


class EventFile(NamedTuple):
    """A file that TensorBoard may read: an event file, or one that lies beside or below one.

    Attributes:
        folder: URI of the folder that was searched.
        key: path below it.
        size: bytes; -1 where the store does not say.
    """

    folder: str
    key: str
    size: int


def events_uri(run_dir: str) -> str:
    """``run_dir/tensorboard``, or the folder that Vertex AI reads for the TensorBoard instance of a job."""
    return os.environ.get("AIP_TENSORBOARD_LOG_DIR") or storage.join(run_dir, FOLDER)


def tensorboard_argument(run_dir: str) -> str:
    """What ``python -m job tensorboard`` takes to show a run: run_dir, unless its events lie elsewhere."""
    events = events_uri(run_dir)
    return run_dir if events == storage.join(run_dir, FOLDER) else events


def find_event_files(uri: str) -> dict[str, EventFile]:
    """The files of all runs at or below ``uri``, by ``RUN/FILE``.

    RUN is the path of the run_dir below ``uri``, and empty for ``uri`` itself. The folder ``tensorboard`` is no part of
    it, unless two folders would have the same name.

    Args:
        uri: a run_dir, a folder of run_dirs, or a folder of event files.

    Raises:
        StorageError: it may not be listed.
    """
    if not storage.exists(uri):
        return {}
    entries: list[storage.Entry] = []
    for page in storage.list_pages(uri, skip=_is_skipped, pass_over_unreadable=True):
        entries += (entry for entry in page if not entry.is_dir and not entry.problem)
        if len(entries) > MOST_ENTRIES:
            log.warning("%s has more than %d files: only these are searched for events", uri, MOST_ENTRIES)
            break
    folders = {_folder(entry.key) for entry in entries if EVENT_FILE in storage.basename(entry.key)}
    names: dict[str, str] = {}
    for folder in sorted(folders):
        name = "/".join(part for part in folder.split("/") if part != FOLDER)
        names[folder] = folder if name in names.values() else name
    files = {}
    for entry in entries:
        folder = _folder(entry.key)
        while folder and folder not in names:
            folder = _folder(folder)
        if folder in names:
            below = entry.key[len(folder) :].lstrip("/")
            files[f"{names[folder]}/{below}".lstrip("/")] = EventFile(uri, entry.key, entry.size)
    return files


def short_names(uris: Sequence[str]) -> list[str]:
    """Short names that tell URIs apart: the parts of their paths from the first to the last in which they differ.

    The last part of a URI that stands alone.
    """
    paths = [_parts(uri) for uri in uris]
    if len(set(map(tuple, paths))) == 1:
        return [path[-1] for path in paths]
    start = _common([path[:-1] for path in paths])
    paths = [path[start:] for path in paths]
    end = _common([path[:0:-1] for path in paths])
    return ["/".join(path[: len(path) - end]) for path in paths]


def _parts(uri: str) -> list[str]:
    path = redact.split_query(uri)[0]
    path = str(Path(path).absolute()) if "://" not in path else path
    return [part for part in path.replace("://", "/").split("/") if part not in ("", ".", "..")] or ["run"]


def _common(paths: Sequence[Sequence[str]]) -> int:
    """How many first parts all paths have in common."""
    count = 0
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count


def _folder(key: str) -> str:
    return key.rpartition("/")[0]


def _is_skipped(key: str) -> bool:
    parts = key.rstrip("/").split("/")
    return parts[-1] in NO_EVENTS or len(parts) > MOST_LEVELS
