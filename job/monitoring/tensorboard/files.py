"""The filesystem that TensorBoard reads: the event files of some runs, from any storage, as one tree of names.

TensorBoard's own access to storage has three limits: the fast loader knows no endpoints but Google's and keeps
replaced files open; the slow one takes the endpoint of ``s3://`` from another variable than training does, lists all
objects of a run with its checkpoints and features at each reload, and calls runs by the path of the event folder. Here
everything goes through :mod:`job.storage`, as in training.
"""

from __future__ import annotations

import fnmatch
import logging
import posixpath
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.tensorflow_stub import errors  # type: ignore[import-untyped]
from tensorboard.compat.tensorflow_stub.io.gfile import StatData  # type: ignore[import-untyped]

from job import storage
from job.errors import JobError
from job.monitoring.tensorboard.event_folders import EVENT_FILE, EventFile, find_event_files

log = logging.getLogger(__name__)

SCHEME = "runs"
ROOT = f"{SCHEME}://"
"""The path that TensorBoard gets as its log directory."""


class RunFiles:
    """A filesystem of TensorBoard's gfile (``register_filesystem``), read-only: ``runs://NAME/FILE``.

    TensorBoard begins each of its reloads by looking whether the log directory exists. Then all runs are searched
    again, and everything else until the next reload is answered from that, without a request.

    Args:
        folders: URI by label: the name of a run, or the folder of several. An empty label shows the runs below the URI
            by their own names.
    """

    def __init__(self, folders: Mapping[str, str]) -> None:
        self.folders = dict(folders)
        self._files: dict[str, EventFile] = {}
        self._children: dict[str, set[str]] = {"": set()}
        self._failing: set[str] = set()
        self._found: dict[str, dict[str, EventFile]] = {label: {} for label in folders}
        self._is_closed = False

    @property
    def runs(self) -> list[str]:
        """Names of the runs, sorted."""
        return sorted({posixpath.dirname(path) for path in self._files if EVENT_FILE in posixpath.basename(path)})

    def close(self) -> None:
        """End each thread of TensorBoard that uses the files from here on, since TensorBoard itself ends none.

        While the interpreter ends, they would fail: no pool takes tasks any more.
        """
        self._is_closed = True

    def refresh(self) -> None:
        """Search all runs again; those that cannot be listed stay as they were."""
        for label, uri in self.folders.items():
            try:
                self._found[label] = find_event_files(uri)
            except Exception as error:  # none may end TensorBoard's only thread that reads
                self._require_open()
                if label not in self._failing:
                    reason = error if isinstance(error, JobError) else repr(error)
                    log.warning("the events of %s cannot be listed; what is known of them stays: %s", uri, reason)
                self._failing.add(label)
            else:
                self._failing.discard(label)
        files: dict[str, EventFile] = {}
        for label, run_files in self._found.items():
            for path, file in run_files.items():
                # Events that lie in the URI itself have no name of their own.
                prefix = label or ("" if "/" in path else storage.basename(self.folders[label]))
                files[posixpath.join(prefix, path)] = file
        children: dict[str, set[str]] = {"": set()}
        for path in files:
            while path:
                parent, name = posixpath.split(path)
                children.setdefault(parent, set()).add(name)
                path = parent
        self._files, self._children = files, children

    def exists(self, filename: Any) -> bool:
        """Whether there is a file or folder; of the log directory, at the beginning of a reload."""
        self._require_open()
        path = _path(filename)
        if not path:
            self.refresh()
        return path in self._files or path in self._children

    def isdir(self, filename: Any) -> bool:
        """Whether it is a folder."""
        return _path(filename) in self._children

    def listdir(self, filename: Any) -> list[str]:
        """Names in a folder."""
        path = _path(filename)
        if path not in self._children:
            raise errors.NotFoundError(None, None, f"no folder {filename}")
        return sorted(self._children[path])

    def glob(self, filename: Any) -> list[str]:
        """Files and folders that match a pattern."""
        names = [*self._files, *self._children]
        return sorted(ROOT + name for name in fnmatch.filter(names, _path(filename)))

    def join(self, path: str, *paths: str) -> str:
        """A path below another one."""
        return posixpath.join(path, *paths)

    def stat(self, filename: Any) -> StatData:
        """The size of a file."""
        return StatData(self._file(filename).size)

    def read(
        self,
        filename: Any,
        binary_mode: bool = False,
        size: int | None = None,
        continue_from: dict[str, int] | None = None,
    ) -> tuple[bytes | str, dict[str, int]]:
        """At most ``size`` bytes from where the last read ended, and where this one does.

        Raises:
            OSError: the file cannot be read now; TensorBoard tries again at the next reload.
        """
        self._require_open()
        file, offset = self._file(filename), (continue_from or {}).get("offset", 0)
        length = max(file.size - offset, 0) if size is None else min(max(file.size - offset, 0), size)
        try:
            data = storage.Reader(file.folder).read(file.key, offset, length) if length else b""
        except Exception as error:
            self._require_open()
            raise OSError(str(error)) from error
        position = {"offset": offset + len(data)}
        return (data if binary_mode else data.decode(errors="replace")), position

    def _require_open(self) -> None:
        """Raise SystemExit, which ends a thread without a message, after :meth:`close`."""
        if self._is_closed:
            raise SystemExit

    def _file(self, filename: Any) -> EventFile:
        try:
            return self._files[_path(filename)]
        except KeyError:
            raise errors.NotFoundError(None, None, f"no file {filename}") from None


def _path(filename: Any) -> str:
    text = filename.decode() if isinstance(filename, bytes) else str(filename)
    return text.removeprefix(ROOT).strip("/")
