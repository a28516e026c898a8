"""TensorBoard event files: a sequence of small files, of which only the newest grows.

TensorBoard reads the files of a folder in order of their names and never returns to an earlier one
(``tensorboard.backend.event_processing.directory_watcher``). A complete file is therefore never written again, and
each file's name sorts after those of all earlier ones.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import uuid
from pathlib import Path
from typing import IO, Any

import google_crc32c
from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch.utils.tensorboard import FileWriter, SummaryWriter

PREFIX = "events.out.tfevents."
FILE_VERSION = "brain.Event:2"


class EventFiles:
    """Appends events to the newest file of a folder; what :meth:`cut` completes is never touched again.

    Safe between threads. Has the methods that ``torch.utils.tensorboard.FileWriter`` calls of its event writer.

    Args:
        folder: existing folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last = max((number_of(path.name) for path in folder.iterdir()), default=0)
        self._suffix = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._path: Path | None = None
        self._bytes = 0

    @property
    def waiting_bytes(self) -> int:
        """Size of the file that grows."""
        return self._bytes

    def add_event(self, event: Event) -> None:
        """Append an event; the first one of a file follows the header that makes it one."""
        with self._lock:
            if self._file is None:
                self._open()
            self._append(event)

    def cut(self) -> None:
        """Complete the newest file; the next event opens another one."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file, self._path, self._bytes = None, None, 0

    def complete(self) -> list[Path]:
        """The files that do not change any more, in order."""
        with self._lock:
            return sorted(path for path in self.folder.glob(f"{PREFIX}*") if path != self._path)

    def flush(self) -> None:
        """Hand all events over to the operating system."""
        with self._lock:
            if self._file is not None:
                self._file.flush()

    def close(self) -> None:
        """Complete the newest file."""
        self.cut()

    def reopen(self) -> None:
        """Nothing: the next event opens a file."""

    def get_logdir(self) -> str:
        """The folder."""
        return str(self.folder)

    def _open(self) -> None:
        self._last = max(int(time.time()), self._last + 1)  # a clock may be behind that of an earlier attempt
        self._path = self.folder / f"{PREFIX}{self._last:010d}.{self._suffix}"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a program that cleans up /tmp may have removed it
        self._file = self._path.open("xb")
        source = SourceMetadata(writer="job.monitoring.tensorboard.events")
        self._append(Event(wall_time=time.time(), file_version=FILE_VERSION, source_metadata=source))

    def _append(self, event: Event) -> None:
        assert self._file is not None
        record = _record(event.SerializeToString())
        self._file.write(record)
        self._bytes += len(record)


class EventWriter(SummaryWriter):
    """torch's writer of scalars, images, histograms and text, into :class:`EventFiles`.

    Overrides one private method of torch, since the class opens files itself otherwise;
    tests/unit/test_events.py notices when that changes.

    Args:
        files: where the events go.
        purge_step: TensorBoard drops what earlier files have at this step or later.
    """

    def __init__(self, files: EventFiles, purge_step: int) -> None:
        self._event_files = files
        super().__init__(str(files.folder))
        files.add_event(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_encoded_image(self, tag: str, content: bytes, size: tuple[int, int], global_step: int) -> None:
        """Add the content of a PNG or JPEG file as it is; ``add_image`` would encode pixels as PNG.

        Args:
            tag: data identifier.
            content: of the file.
            size: width and height, in pixels.
            global_step: step value to record.
        """
        image = Summary.Image(width=size[0], height=size[1], colorspace=3, encoded_image_string=content)
        self.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), global_step)

    def add_summary(self, summary: Summary, step: int) -> None:
        """Add what a plugin of TensorBoard shows."""
        self._event_files.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _get_file_writer(self) -> FileWriter:
        attributes: Any = self  # torch declares them as None
        if attributes.file_writer is None:
            writer: Any = FileWriter.__new__(FileWriter)
            writer.event_writer = self._event_files
            attributes.file_writer, attributes.all_writers = writer, {self._event_files.get_logdir(): writer}
        file_writer: FileWriter = attributes.file_writer
        return file_writer


def number_of(name: str) -> int:
    """The number in the name of an event file, which decides the order of reading; 0 for another file."""
    number, _, _ = name.removeprefix(PREFIX).partition(".")
    valid = name.startswith(PREFIX) and number.isascii() and number.isdecimal() and len(number) < 16
    return int(number) if valid else 0


def renumbered(name: str, number: int) -> str:
    """The name of an event file with another number."""
    return f"{PREFIX}{number:010d}.{name.removeprefix(PREFIX).partition('.')[2]}"


def _record(data: bytes) -> bytes:
    """A TFRecord: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _masked_crc(length), data, _masked_crc(data)))


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
