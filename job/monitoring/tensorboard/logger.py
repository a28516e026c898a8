"""A TensorBoard logger that loses nothing on an object store.

Objects cannot be appended to: TensorBoard's own writer and Lightning's stock logger rewrite the
object at each flush and end up with the last one only
(https://github.com/Lightning-AI/pytorch-lightning/issues/17037). Here events are staged in local files, each of which
is published once, as an object of its own, and never written again: superseded versions would cost storage in a bucket
with versioning or soft delete, and a retention policy refuses them.
"""

from __future__ import annotations

import logging
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.plugins.text.summary_v2 import text_pb  # type: ignore[import-untyped]

from job import storage
from job.errors import JobError, LeaseError, StorageError, StorageOutage
from job.monitoring.tensorboard.events import PREFIX, EventFiles, EventWriter, number_of, renumbered
from job.monitoring.tensorboard.hparams_summary import plain_values, session_start
from job.process import temporary
from job.process.periodic import Periodic, call_within

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 10.0
"""How old an event may be before the bucket has it, in a young run. TensorBoard itself reloads every 5 s."""

OBJECTS_PER_STEP = 50
MOST_STEPS = 12
"""The interval grows by :data:`PUBLISH_SECONDS` with each 50 objects in the folder, to 12 times that: an hour has about
145 objects, the first day 970, a further one 720. Each checkpoint and each attempt adds one."""

ROTATE_BYTES = 4 << 20
"""Events of this size are published at once."""

FLUSH_SECONDS = 5.0
"""How long an event stays in memory where the event file is written in place."""

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for a bucket that does not answer."""


class BucketTensorBoardLogger(Logger):
    """Writes events below ``uri``; rank 0 alone writes.

    On a disk one event file is written in place. Elsewhere events are staged in a temporary folder and published as a
    new object after :data:`PUBLISH_SECONDS`, and less often in a long run. While the bucket is out of reach the events
    wait on disk; :meth:`finalize` publishes the last of them before the process ends.

    Args:
        uri: folder of the event files, on any fsspec filesystem.
        purge_step: ``global_step`` that this attempt continues from. TensorBoard drops what an
            earlier attempt logged at that step or later, so that curves never double back.
        publish_seconds: seconds between two publications in a young run, at least 1.
        before_write: called immediately before each write to ``uri``; raises if this job may not write there.
    """

    def __init__(
        self,
        uri: str,
        *,
        purge_step: int = 0,
        publish_seconds: float = PUBLISH_SECONDS,
        before_write: Callable[[], None] = storage.unconditionally,
    ) -> None:
        super().__init__()
        self.uri = uri
        self._is_local = storage.is_local(uri)
        self.purge_step = purge_step
        self.publish_seconds = max(publish_seconds, 1.0)
        self.before_write = before_write
        self._writer: EventWriter | None = None
        self._files: EventFiles | None = None
        self._names: dict[Path, str] = {}
        self._last_number: int | None = None
        self._objects = 0
        self._published_at = time.monotonic()
        self._publisher: Periodic | None = None
        self._failing_since: float | None = None
        self._opening = threading.RLock()
        self._publishing = threading.RLock()

    @property
    def name(self) -> str:
        """Kind of logger; part of no path."""
        return "tensorboard"

    @property
    def version(self) -> str:
        """Empty: a run_dir holds one run."""
        return ""

    @property
    def save_dir(self) -> None:
        """None: Lightning must not make local folders out of a bucket's URI."""
        return

    @property
    @rank_zero_experiment
    def experiment(self) -> EventWriter:
        """The ``SummaryWriter``, for images, histograms and text."""
        with self._opening:
            if self._writer is None:
                self._writer = self._open()
            return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add one scalar for each metric."""
        for key, value in metrics.items():
            self.experiment.add_scalar(key, value, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write the row of this run in the HPARAMS tab; TensorBoard keeps the first one that it reads."""
        plain = dict(vars(params) if isinstance(params, Namespace) else params)
        self.add_summary(session_start(plain_values(plain)), self.purge_step)

    @rank_zero_only
    def add_summary(self, summary: Summary, step: int) -> None:
        """Add what a plugin of TensorBoard shows."""
        self.experiment.add_summary(summary, step)

    @rank_zero_only
    def add_text(self, tag: str, markdown: str, step: int) -> None:
        """Add Markdown under this very tag, where ``SummaryWriter.add_text`` would append to it."""
        self.add_summary(text_pb(tag, markdown), step)

    def save(self) -> None:
        """Nothing: Lightning calls this for every line it logs, and training must not wait for a bucket."""

    @rank_zero_only
    def publish(self) -> None:
        """Upload all events so far.

        Raises:
            StorageError: the bucket does not take them; they stay on disk and are tried again.
            LeaseError: another job writes to the run_dir.
        """
        files = self._files
        if files is None:
            return
        with self._publishing:
            if self._is_local:
                files.flush()
                return
            files.cut()
            for path in files.complete():
                self._publish(path, self._object_name(path))
            self._published_at = time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Publish the last event and stop; further events would open a new file.

        Raises:
            StorageError: the bucket took nothing for :data:`CLOSE_SECONDS`, and the run itself had not
                failed. The message names the local folder where the events are kept.
        """
        if self._publisher is not None:
            self._publisher.stop()
            self._publisher = None
        if self._writer is None or self._files is None:
            return
        self._writer.close()
        self._writer = None
        try:
            call_within(CLOSE_SECONDS + 10, self._publish_rest, "publishing the last TensorBoard events")
        except LeaseError as error:
            log.warning("the last TensorBoard events are not published: %s", error)
        except (StorageError, TimeoutError) as error:
            folder = self._files.folder
            message = f"TensorBoard events could not be published and are kept in {folder}: {error}"
            if not self._is_local:
                temporary.keep(folder, f"TensorBoard events of {self.uri} that could not be published.")
            if status == "success":
                kind = type(error) if isinstance(error, JobError) else StorageOutage
                raise kind(message) from error
            log.error(message)
            return
        if not self._is_local:
            temporary.remove(self._files.folder)
            self._files = None

    def _open(self) -> EventWriter:
        local = self._is_local
        if self._files is None:
            folder = Path(storage.filesystem(self.uri)[1]) if local else temporary.folder("tensorboard")
            folder.mkdir(parents=True, exist_ok=True)
            self._files = EventFiles(folder)
        if self._publisher is None:
            seconds = FLUSH_SECONDS if local else min(self.publish_seconds, FLUSH_SECONDS)
            self._publisher = Periodic("tensorboard-publisher", seconds, self._publish_when_due)
        return EventWriter(self._files, self.purge_step)

    def _publish_when_due(self) -> None:
        files = self._files
        if files is None:
            return
        due = time.monotonic() - self._published_at >= self._interval() or files.waiting_bytes >= ROTATE_BYTES
        if not due and not self._is_local:
            return
        try:
            self.publish()
        except LeaseError:
            return  # ends the run
        except StorageError as error:
            if self._failing_since is None:
                log.warning("TensorBoard events are kept in %s and uploaded later: %s", files.folder, error)
                self._failing_since = time.monotonic()
        else:
            if self._failing_since is not None:
                seconds = time.monotonic() - self._failing_since
                log.info("TensorBoard events are published again, after %.0f s", seconds)
            self._failing_since = None

    def _interval(self) -> float:
        return self.publish_seconds * min(1 + self._objects / OBJECTS_PER_STEP, MOST_STEPS)

    def _publish_rest(self) -> None:
        storage.retry(self.publish, CLOSE_SECONDS, "the last TensorBoard events wait")
        assert self._files is not None
        if not self._is_local:  # add_scalars and add_hparams write into folders of their own
            for path in sorted(path for path in self._files.folder.glob("*/**/*") if path.is_file()):
                self._publish(path, str(path.relative_to(self._files.folder)))

    def _object_name(self, path: Path) -> str:
        """A name that sorts after all event files in the bucket; the same one at each try."""
        if path not in self._names:
            if self._last_number is None:
                entries = storage.list_files(self.uri) if storage.exists(self.uri) else []
                self._objects = sum(entry.key.startswith(PREFIX) for entry in entries)
                self._last_number = max((number_of(entry.key) for entry in entries), default=0)
            self._last_number = max(number_of(path.name), self._last_number + 1)
            self._names[path] = renumbered(path.name, self._last_number)
        return self._names[path]

    def _publish(self, path: Path, name: str) -> None:
        """Upload one file, and delete it once the store has it."""
        uri = storage.join(self.uri, name)
        try:
            storage.write_bytes(uri, path.read_bytes(), self.before_write)
        except StorageError:
            # An upload whose answer was lost is refused the second time by a retention policy.
            if not _is_stored(uri, path):
                raise
        else:
            storage.require_same(uri, storage.info(uri), path)
        path.unlink()
        self._names.pop(path, None)
        self._objects += 1


def _is_stored(uri: str, path: Path) -> bool:
    try:
        storage.require_same(uri, storage.info(uri), path)
    except StorageError:
        return False
    return True
