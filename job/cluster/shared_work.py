"""Work of rank 0 that the other ranks share: they take tasks from it while they wait for its result. And a barrier.

It goes through the store of the process group, so that no collective operation waits, and ends the job, while one rank
takes long.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec

from job import typed
from job.cluster import ranks
from job.errors import JobError, RankLost
from job.process.signals import Stopped

QUIET_SECONDS = 1200.0
"""Time without progress on any rank after which a rank gives up."""
TICK_SECONDS = 2.0
"""Least time between two signs of progress that a rank gives."""
LONGEST_POLL = 0.2
FAREWELL_SECONDS = 5.0
"""How long rank 0, which serves the store and may end, waits until the other ranks have read the outcome."""
LARGEST_VALUE = 4 << 20
"""Bytes of one value in the store: torch's refuses 8 MiB."""

_calls = itertools.count()


class SharedTasks:
    """Numbered tasks, each of which one rank performs.

    Args:
        store: of the process group.
        name: prefix of its keys.
        count: number of tasks.
        tick: gives a sign of progress.

    Attributes:
        ranks: number of ranks.
    """

    def __init__(self, store: Any, name: str, count: int, tick: Callable[[], None]) -> None:
        self._store = store
        self._name = name
        self.count = count
        self.ranks = ranks.world_size()
        self.tick = tick

    def claim(self) -> int | None:
        """Number of a task for this rank; None: all are taken."""
        self.tick()
        number = self._store.add(f"{self._name}/claimed", 1) - 1
        return number if number < self.count else None

    def cancel(self) -> None:
        """Take all tasks that nobody has begun."""
        self._store.add(f"{self._name}/claimed", self.count)

    def finish(self, number: int, result: bytes) -> None:
        """Hand the result of a task to rank 0."""
        _put(self._store, f"{self._name}/{number}", result)
        self.tick()

    def result(self, number: int) -> bytes | None:
        """On rank 0, the result of another rank, once; None: there is none yet."""
        return _take(self._store, f"{self._name}/{number}")


class Helpers:
    """The other ranks, as rank 0 sees them while they wait for it.

    Attributes:
        count: number of ranks, this one included.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._pulse = _Pulse(store)
        self._batches = itertools.count()
        self.count = ranks.world_size()

    def begin(self, job: bytes, count: int) -> SharedTasks:
        """Let all ranks take numbered tasks.

        Args:
            job: description for :data:`Perform`.
            count: number of tasks.
        """
        number = next(self._batches)
        _put(self._store, f"batch/{number}", msgspec.msgpack.encode((job, count)))
        return SharedTasks(self._store, f"tasks/{number}", count, self._pulse.tick)

    def tick(self) -> None:
        """Give a sign of progress: the other ranks give up without one for :data:`QUIET_SECONDS`."""
        self._pulse.tick()

    def require_progress(self) -> None:
        """While waiting for the other ranks, check that one of them makes progress.

        Raises:
            RankLost: none does.
        """
        self._pulse.require("no other rank")


class ProgressBarrier:
    """A barrier at the end of work that takes ranks differently long; it waits as long as one of them makes progress.

    It is created on all ranks when the work begins, and used once. A collective operation must follow it: rank 0 serves
    the store.
    """

    def __init__(self) -> None:
        store = _store_of_this_call() if _has_other_ranks() else None
        self._store, self._pulse = store, None if store is None else _Pulse(store)

    def tick(self) -> None:
        """Give a sign of progress."""
        if self._pulse is not None:
            self._pulse.tick()

    def wait(self) -> None:
        """Wait until all ranks are here.

        Raises:
            RankLost: no rank has made progress for :data:`QUIET_SECONDS`.
        """
        if self._store is None or self._pulse is None:
            return
        self._store.add("arrived", 1)
        pause = 0.01
        while self._store.add("arrived", 0) < ranks.world_size():
            self._pulse.require("no other rank")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL)


Perform = Callable[[bytes, SharedTasks], None]
"""Performs tasks on a rank other than 0 until none is left: (description of the job, the tasks)."""


class Failure(msgspec.Struct, frozen=True):
    """An exception of another rank, without the code that a pickle could run: any process may reach the store.

    Attributes:
        kind: name of a class of :class:`~job.errors.JobError`.
        message: its message.
        stopped: exit code, if it is a :class:`~job.process.signals.Stopped` instead.
    """

    kind: str
    message: str
    stopped: int | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """A failure from its exception."""
        return cls(type(error).__name__, str(error), error.exit_code if isinstance(error, Stopped) else None)

    def exception(self) -> BaseException:
        """The exception; a RuntimeError for one that is no JobError."""
        if self.stopped is not None:
            return Stopped(self.message, self.stopped)
        kinds = {kind.__name__: kind for kind in _subclasses(JobError)}
        if self.kind in kinds:
            return kinds[self.kind](self.message)
        return RuntimeError(f"another rank failed ({self.kind}: {self.message}). See its log.")


class _Outcome(msgspec.Struct, frozen=True):
    result: str = ""
    failure: Failure | None = None


def from_rank_zero(function: Callable[[Helpers | None], str], perform: Perform) -> str:
    """Call ``function`` on rank 0, and return its result on all ranks; the others perform tasks of it meanwhile.

    Args:
        function: gets None where there are no other ranks.
        perform: see :data:`Perform`.

    Raises:
        JobError: the exception of ``function``, on every rank.
    """
    if not _has_other_ranks():
        return function(None)
    store = _store_of_this_call()
    if ranks.rank() > 0:
        return _help(store, perform)
    try:
        outcome = _Outcome(function(Helpers(store)))
    except (JobError, Stopped) as error:
        _put(store, "outcome", msgspec.msgpack.encode(_Outcome(failure=Failure.of(error))))
        if isinstance(error, JobError):  # a signal that stops this process mostly stops all
            _await_readers(store)
        raise
    _put(store, "outcome", msgspec.msgpack.encode(outcome))
    _await_readers(store)
    return outcome.result


def _has_other_ranks() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and ranks.world_size() > 1


def _store_of_this_call() -> Any:
    """A connection to the store, with keys that no other call has; called on all ranks in the same order."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    from job.torch_internals import connect_default_store

    # The group's own is busy while a collective operation, of the watchdog's say, waits for a key.
    return PrefixStore(f"job.shared_work/{next(_calls)}", connect_default_store())


def _help(store: Any, perform: Perform) -> str:
    pulse, pause, batch = _Pulse(store), 0.01, 0
    while (content := _peek(store, "outcome")) is None:
        if (job := _peek(store, f"batch/{batch}")) is not None:
            description, count = typed.from_msgpack(job, tuple[bytes, int])
            perform(description, SharedTasks(store, f"tasks/{batch}", count, pulse.tick))
            batch, pause = batch + 1, 0.01
        pulse.require("rank 0")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_POLL)
    outcome = typed.from_msgpack(content, _Outcome)
    with contextlib.suppress(RuntimeError):  # torch's DistNetworkError: rank 0 has not waited so long
        store.add("readers", 1)
    if outcome.failure is not None:
        raise outcome.failure.exception()
    return outcome.result


def _await_readers(store: Any) -> None:
    """Wait until all other ranks have read the outcome, or are busy: the store ends with this process."""
    deadline = time.monotonic() + FAREWELL_SECONDS
    while store.add("readers", 0) < ranks.world_size() - 1 and time.monotonic() < deadline:
        time.sleep(0.01)


class _Pulse:
    """A counter in the store that grows as long as some rank makes progress."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._ticked_at = float("-inf")
        self._seen, self._seen_at = -1, time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked_at >= TICK_SECONDS:
            self._ticked_at = now
            self._store.add("pulse", 1)

    def require(self, who: str) -> None:
        """Raise RankLost if nobody has made progress for :data:`QUIET_SECONDS`."""
        value, now = self._store.add("pulse", 0), time.monotonic()
        if value != self._seen:
            self._seen, self._seen_at = value, now
        elif now - self._seen_at > QUIET_SECONDS:
            raise RankLost(f"{who} has made progress for {QUIET_SECONDS:.0f} s. See the logs of the other ranks.")


def _subclasses(kind: type[JobError]) -> set[type[JobError]]:
    return {kind}.union(*(_subclasses(each) for each in kind.__subclasses__()))


def _put(store: Any, key: str, content: bytes) -> None:
    parts = range(0, max(len(content), 1), LARGEST_VALUE)
    for number, start in enumerate(parts):
        store.set(f"{key}/{number}", content[start : start + LARGEST_VALUE])
    store.set(key, str(len(parts)))


def _peek(store: Any, key: str) -> bytes | None:
    if not store.check([key]):
        return None
    return b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key))))


def _take(store: Any, key: str) -> bytes | None:
    if (content := _peek(store, key)) is None:
        return None
    for number in range(int(store.get(key))):
        store.delete_key(f"{key}/{number}")
    store.delete_key(key)
    return content
