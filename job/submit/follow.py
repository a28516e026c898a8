"""Follow the logs of a run's pods until it ends."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import threading
import time
from collections.abc import Sequence
from types import TracebackType

import msgspec

from job import typed
from job.errors import EXIT_PREEMPTED
from job.process import logs
from job.process.terminal import clean_lines, say
from job.submit import workload
from job.submit.kubectl import ClusterUnreachable, Kubectl
from job.submit.workload import Pod, Workload, has_active

POLL_SECONDS = 3.0
UNREACHABLE_SECONDS = 600.0
"""How long a cluster may be unreachable before following it ends."""
REMINDER_SECONDS = 60.0
"""Time between two lines about pods that do not run."""
DRAIN_SECONDS = 10.0
"""How long the last lines of a run that has ended are waited for."""
_LONGEST_LINE = 100_000
_MOST_ATTEMPTS = 100
"""To read a container's log; a node that is lost takes the rest of it along."""


class _Record(msgspec.Struct):
    """A line that this package logs in a pod."""

    severity: str
    message: str
    time: str
    stack_trace: str = ""


class _Stream:
    """The log of one container, from its first line on; a connection that breaks is made again.

    Args:
        kubectl: how to call it.
        pod: name of the pod.
        prefix: of each line.
        lines: where lines go.
    """

    def __init__(self, kubectl: Kubectl, pod: str, prefix: str, lines: queue.Queue[str]) -> None:
        self.kubectl = kubectl
        self.pod = pod
        self.prefix = prefix
        self.lines = lines
        self.last_time = ""
        self.attempts = 0
        self.process: subprocess.Popen[str] | None = None
        self.thread: threading.Thread | None = None

    @property
    def is_open(self) -> bool:
        """Whether lines may come."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def is_complete(self) -> bool:
        """Whether all lines of a container that has ended were read, or cannot be."""
        return self.process is not None and (self.process.poll() == 0 or self.attempts >= _MOST_ATTEMPTS)

    def open(self) -> None:
        """Start reading, after the last line that was read."""
        self.attempts += 1
        since = [f"--since-time={self.last_time}"] if self.last_time else []
        # All lines: of several pods kubectl shows the last ten.
        options = ("--follow", "--tail=-1", "--timestamps", *since)
        self.process = subprocess.Popen(
            self.kubectl.command("logs", f"pods/{self.pod}", *options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="backslashreplace",
            start_new_session=True,
        )
        self.thread = threading.Thread(target=self._read, args=(self.process,), name=f"logs-{self.pod}", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End reading."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)

    def _read(self, process: subprocess.Popen[str]) -> None:
        after = self.last_time
        if process.stdout is None:
            return
        while line := process.stdout.readline(_LONGEST_LINE):
            moment, _, text = line.rstrip("\n").partition(" ")
            if _instant(moment) > _instant(after):
                self.last_time = moment
                self.lines.put(f"{self.prefix}{_readable(text)}")


class Streams:
    """The logs of all pods of a run."""

    def __init__(self, kubectl: Kubectl) -> None:
        self.kubectl = kubectl
        self.lines: queue.Queue[str] = queue.Queue(maxsize=10_000)
        self._streams: dict[tuple[str, int], _Stream] = {}
        self._ended: set[tuple[str, int]] = set()

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            stream.close()

    def follow(self, pods: Sequence[Pod]) -> None:
        """Open the logs of containers that have begun and are not read yet."""
        several_slices = any(pod.index[0] for pod in pods)
        for pod in pods:
            container = pod.container
            if container is None or (container.state.running is None and container.state.terminated is None):
                continue
            key = (pod.metadata.uid or pod.metadata.name, container.restart_count)
            if key in self._ended:
                continue
            number = f"{pod.index[0]}.{pod.index[1]}" if several_slices else f"{pod.index[1]}"
            stream = self._streams.setdefault(
                key, _Stream(self.kubectl, pod.metadata.name, f"[node {number}] ", self.lines)
            )
            if stream.is_open:
                continue
            if container.state.terminated is not None and stream.is_complete:
                self._ended.add(key)
            else:
                stream.open()

    def show(self, seconds: float) -> None:
        """Print lines as they come, for some time."""
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                say(self.lines.get(timeout=remaining))

    def drain(self) -> None:
        """Print all lines until the logs end."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline:
            is_open = any(stream.is_open for stream in self._streams.values())
            try:
                say(self.lines.get(timeout=0.1))
            except queue.Empty:
                if not is_open:
                    return


def follow(kubectl: Kubectl, run: str) -> int:
    """Print the logs of all pods of a run, those that replace others included, until it ends.

    Returns:
        Its exit code: 0, the pods' own, or 143 if it was stopped or deleted.

    Raises:
        ConfigError: there is no such run.
        ClusterUnreachable: the cluster has not answered for ten minutes; the run goes on.
    """
    found = workload.require(kubectl, run)
    codes: dict[str, int] = {}
    announced = Announcements(run)
    last_answer = time.monotonic()
    with Streams(kubectl) as streams:
        while True:
            try:
                current = workload.find(kubectl, run)
                pods = workload.pods(kubectl, found)
                last_answer = time.monotonic()
            except ClusterUnreachable as error:
                if time.monotonic() - last_answer > UNREACHABLE_SECONDS:
                    raise
                announced.problem("cluster", str(error).splitlines()[0])
                streams.show(POLL_SECONDS)
                continue
            streams.follow(pods)
            for pod in pods:
                if pod.exit_code is not None:
                    codes[pod.metadata.uid or pod.metadata.name] = pod.exit_code
            # Pods of a stopped run still save, and log that they do.
            if current is None or current.has_ended or (current.state == "is stopped" and not has_active(pods)):
                streams.drain()
                return _end(run, current, list(codes.values()))
            announced.state(current, pods)
            streams.show(POLL_SECONDS)


class Announcements:
    """Lines about what keeps a run from running: each when it is new, and then every minute."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._shown: dict[str, tuple[str, float]] = {}

    def state(self, current: Workload, pods: Sequence[Pod]) -> None:
        """Say what the run waits for."""
        if current.state == "waits in its queue":
            self.problem("queue", f"{self.run} waits in the queue {current.queue}")
        elif not pods:
            self.problem("pods", f"{self.run} has no pods yet")
        for pod in pods:
            if pod.status.phase in ("Pending", "Failed") and pod.problem:
                self.problem(pod.metadata.name, f"{pod.metadata.name} {pod.status.phase.lower()}: {pod.problem}")

    def problem(self, subject: str, text: str) -> None:
        """Log a line, unless it was logged within the last minute."""
        before, moment = self._shown.get(subject, ("", 0.0))
        is_failure = " failed: " in text
        if text != before or (not is_failure and time.monotonic() - moment > REMINDER_SECONDS):
            self._shown[subject] = (text, time.monotonic())
            logs.report(text, level=20)


def _end(run: str, current: Workload | None, codes: list[int]) -> int:
    if current is None:
        logs.report(f"job: {run} was deleted; what it saved is in its run_dir.", level=30)
        return EXIT_PREEMPTED
    if current.ending is None:
        logs.report(f"job: {run} was stopped; the command that started it lets it go on.", level=30)
        return EXIT_PREEMPTED
    code = workload.exit_code(current, codes)
    if code:
        logs.report(f"job: {run} has failed with exit code {code}. {current.ending.text}")
    else:
        logs.report(f"{run} is complete.", level=20)
    return code


def _instant(moment: str) -> tuple[str, str]:
    """A time as Kubernetes writes it, without zeros at the end of the fraction, in a form that can be compared."""
    second, _, fraction = moment.removesuffix("Z").partition(".")
    return second, fraction.ljust(9, "0")


def _readable(line: str) -> str:
    """A line of a pod's log: of one that is JSON, time and message; unless this process logs JSON, too."""
    if line.startswith("{") and not logs.is_json():
        with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
            record = typed.from_json(line, _Record)
            warning = "" if record.severity in ("INFO", "DEBUG") else f"{record.severity}: "
            trace = f"\n{record.stack_trace}" if record.stack_trace else ""
            return f"{record.time[11:19]} {warning}{record.message}{trace}"
    return clean_lines(line)
