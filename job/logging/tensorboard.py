"""A TensorBoard logger that loses nothing on an object store.

Objects cannot be appended to: TensorBoard's own writer and Lightning's stock logger rewrite the
object at each flush and end up with the last one only
(https://github.com/Lightning-AI/pytorch-lightning/issues/17037). Here events are appended to a local
file, which a thread publishes whole.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml
from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger
from torch.utils.tensorboard import SummaryWriter

from job import storage
from job.errors import StorageError
from job.periodic import Periodic

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 10.0
"""How old an event may be before the bucket has it. TensorBoard itself reloads every 5 s."""

ROTATE_BYTES = 4 << 20
"""Past this size a new event file begins, so that publishing does not cost more and more."""

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for a bucket that does not answer."""


def events_uri(run_dir: str) -> str:
    """``run_dir/tensorboard``, or the folder that Vertex AI reads for the TensorBoard instance of a job."""
    return os.environ.get("AIP_TENSORBOARD_LOG_DIR") or storage.join(run_dir, "tensorboard")


class BucketTensorBoardLogger(Logger):
    """Writes events below ``uri``; rank 0 alone writes.

    On a disk the event file is written in place. Elsewhere it is staged locally and published as
    one object every :data:`PUBLISH_SECONDS`. While the bucket is out of reach the events wait on
    disk; :meth:`finalize` publishes the last of them before the process ends.

    Args:
        uri: folder of the event files, on any fsspec filesystem.
        purge_step: ``global_step`` that this start continues from. TensorBoard drops what an
            earlier start logged at that step or later, so that curves never double back.
        publish_seconds: seconds between two publications, at least 1 (an object may be written once
            a second).
    """

    def __init__(self, uri: str, *, purge_step: int = 0, publish_seconds: float = PUBLISH_SECONDS) -> None:
        super().__init__()
        self.uri = uri
        self.purge_step = purge_step
        self.publish_seconds = max(publish_seconds, 1.0)
        self._writer: SummaryWriter | None = None
        self._staging: Path | None = None
        self._published: dict[Path, tuple[int, float]] = {}
        self._publisher: Periodic | None = None
        self._failing_since: float | None = None
        self._writing = threading.RLock()  # held while events are added, and while the writer is made or exchanged
        self._publishing = threading.RLock()  # held while events are uploaded: logging does not

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
    def experiment(self) -> SummaryWriter:
        """The ``SummaryWriter``, for images, histograms and text."""
        with self._writing:
            if self._writer is None:
                self._open()
            assert self._writer is not None
            return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add one scalar for each metric."""
        with self._writing:
            for key, value in metrics.items():
                self.experiment.add_scalar(key, value, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add the configuration as text."""
        plain = vars(params) if isinstance(params, Namespace) else params
        text = yaml.safe_dump(plain, sort_keys=False)
        with self._writing:
            self.experiment.add_text("config", "```yaml\n" + text + "```", self.purge_step)

    def save(self) -> None:
        """Nothing: Lightning calls this for every line it logs, and training must not wait for a bucket."""

    @rank_zero_only
    def publish(self) -> None:
        """Upload all events so far.

        Raises:
            StorageError: the bucket does not take them; they stay on disk and are tried again.
        """
        with self._publishing:
            if self._writer is not None:
                self._writer.flush()
            for path in self._event_files():
                self._publish(path)

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
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        try:
            storage.retry(self.publish, CLOSE_SECONDS, "the last TensorBoard events wait")
        except StorageError as error:
            message = f"TensorBoard events could not be published and are kept in {self._staging}: {error}"
            if status == "success":
                raise type(error)(message) from error
            log.error(message)

    def _open(self) -> None:
        local = storage.is_local(self.uri)
        if self._staging is None:
            self._staging = Path(
                storage.filesystem(self.uri)[1] if local else tempfile.mkdtemp(prefix="job-tensorboard-")
            )
        self._writer = SummaryWriter(str(self._staging), purge_step=self.purge_step, flush_secs=5)
        if not local and self._publisher is None:
            self._publisher = Periodic("tensorboard-publisher", self.publish_seconds, self._publish_live)

    def _publish_live(self) -> None:
        try:
            self.publish()
            self._rotate()
        except StorageError as error:
            if self._failing_since is None:
                log.warning("TensorBoard events wait in %s until the bucket takes them: %s", self._staging, error)
                self._failing_since = time.monotonic()
        else:
            if self._failing_since is not None:
                seconds = time.monotonic() - self._failing_since
                log.info("TensorBoard events are published again, after %.0f s", seconds)
            self._failing_since = None

    def _rotate(self) -> None:
        """Begin a new file when the newest is large; the old one is published already and never changes again."""
        with self._publishing:
            files = self._event_files()
            if self._writer is None or not files or files[-1].stat().st_size < ROTATE_BYTES:
                return
            with self._writing:
                self._writer.close()
                assert self._staging is not None
                self._writer = SummaryWriter(str(self._staging), flush_secs=5)
            self._publish(files[-1])

    def _event_files(self) -> list[Path]:
        if self._staging is None or storage.is_local(self.uri):
            return []
        return sorted(self._staging.glob("events.out.tfevents.*"))

    def _publish(self, path: Path) -> None:
        size_before, published_at = self._published.get(path, (0, -1.0))
        if path.stat().st_size == size_before:
            return
        # GCS takes one write a second of the same object, and answers 429 beyond.
        time.sleep(max(published_at + 1.0 - time.monotonic(), 0.0))
        content = path.read_bytes()
        storage.write_bytes(storage.join(self.uri, path.name), content)
        self._published[path] = (len(content), time.monotonic())
