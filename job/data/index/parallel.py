"""List many archives at once: over connections, and over the ranks of the job."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import pyarrow as pa

from job import storage, typed
from job.cluster.shared_work import Failure, SharedTasks
from job.data.index.access import Access
from job.data.index.left_out import LeftOut, LeftOutKind
from job.data.index.sources import ListingContext, Source, format_of
from job.data.index.sources.archive import SEGMENTS, Archive
from job.data.index.sources.columns import Columns

THREADS = 8
"""Archives that are listed at once where a thread waits for each."""
WALKS = 512
"""Archives that are listed at once where requests are awaited: each has one in flight."""
FEW_WALKS = 16
"""The same for a listing with a time limit, so that some archives are complete when it has passed."""
MOST_WAITING = 1024
"""Archives whose members are held until those of the archives before them are there."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class ArchiveTask:
    """An archive to list.

    Attributes:
        source: the archive.
        number: of the source in the index.
        labelled: its labels are needed.
    """

    source: Source
    number: int
    labelled: bool


class Listed(NamedTuple):
    """What is in an archive.

    Attributes:
        tables: its members, in tables of :data:`job.data.index.sources.base.LISTING`.
        left_out: members that are no files.
        error: why it could not be listed.
    """

    tables: list[pa.Table]
    left_out: list[LeftOutKind]
    error: BaseException | None = None


class Tasks:
    """The tasks of one process, which nobody else takes."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self.count = count

    def claim(self) -> int | None:
        """Number of a task; None: all are taken."""
        with self._lock:
            self._next += 1
            return self._next - 1 if self._next <= self.count else None

    def cancel(self) -> None:
        """Take all that nobody has begun."""
        with self._lock:
            self._next = self.count


def list_archives(tasks: Sequence[ArchiveTask], context: ListingContext) -> Iterator[list[pa.Table]]:
    """The members of archives, in order; several are listed at once, on all ranks.

    After the time limit, archives that are not finished are empty, except for the first one, of which a part is listed.

    Args:
        tasks: the archives.
        context: settings of the listing.

    Raises:
        JobError: the first archive that cannot be listed.
    """
    helpers = context.helpers if len(tasks) > 1 else None
    columns, access = context.columns, context.access
    if _loop(tasks) is not None:  # the first archive stands for all
        archive = format_of(tasks[0].source)
        assert isinstance(archive, Archive)
        context = replace(context, has_side_indexes=archive.has_side_index(tasks[0].source))
    job = msgspec.msgpack.encode(_Job(list(tasks), columns, access, context.has_side_indexes))
    shared = helpers.begin(job, len(tasks)) if helpers else None
    claims: Tasks | SharedTasks = shared or Tasks(len(tasks))
    done: dict[int, Listed] = {}
    changed, ended = threading.Condition(), threading.Event()

    def finish(number: int, listed: Listed) -> None:
        with changed:
            done[number] = listed
            changed.notify()

    def may_begin() -> bool:
        return ended.is_set() or len(done) < MOST_WAITING

    ranks = helpers.count if helpers else 1
    running = _start(tasks, context, claims.claim, finish, ranks, may_begin)
    try:
        for number in range(len(tasks)):
            while number not in done and not (number and context.time_limit.is_over()):
                running.require_alive()
                if shared is not None and helpers is not None:
                    if (content := shared.result(number)) is not None:
                        done[number] = _from_bytes(content)
                        break
                    helpers.require_progress()
                with changed:
                    if number not in done:
                        changed.wait(POLL_SECONDS)
            listed = done.pop(number, Listed([], []))
            for each in listed.left_out:
                context.left_out.add(each.kind, each.example, each.count)
            if listed.error is not None:
                raise listed.error
            context.progress.share_done = (number + 1 + len(done)) / len(tasks)
            yield listed.tables
    finally:
        claims.cancel()
        ended.set()  # those that wait to begin another one find that there is none
        running.stop()


class _Job(msgspec.Struct, frozen=True):
    tasks: list[ArchiveTask]
    columns: Columns
    access: Access
    has_side_indexes: bool


def help_to_list(job: bytes, shared: SharedTasks, cache_dir: str) -> None:
    """List archives for rank 0 until none is left.

    Args:
        job: the tasks, and the settings of the listing.
        shared: numbers of the tasks.
        cache_dir: see :class:`~job.data.index.sources.base.ListingContext`.
    """
    settings = typed.from_msgpack(job, _Job)
    tasks = settings.tasks
    context = ListingContext(
        [],
        cache_dir,
        settings.access,
        labelled=True,
        columns=settings.columns,
        tick=shared.tick,
        has_side_indexes=settings.has_side_indexes,
    )

    def finish(number: int, listed: Listed) -> None:
        shared.finish(number, _to_bytes(listed))

    running = _start(tasks, context, shared.claim, finish, shared.ranks)
    try:
        while not running.is_done():
            running.join(POLL_SECONDS)
        running.require_alive()
    finally:
        running.stop()


class _Running:
    """Archives that are being listed in the background."""

    def __init__(self, futures: Sequence[Future[None]], pool: ThreadPoolExecutor | None) -> None:
        self._futures = futures
        self._pool = pool

    def is_done(self) -> bool:
        return all(future.done() for future in self._futures)

    def join(self, seconds: float) -> None:
        wait(self._futures, seconds)

    def require_alive(self) -> None:
        """Raise what has ended a worker: a lost store, say."""
        for future in self._futures:
            if future.done():
                future.result()

    def stop(self) -> None:
        """Give up what has not been finished."""
        for future in self._futures:
            future.cancel()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _start(
    tasks: Sequence[ArchiveTask],
    context: ListingContext,
    claim: Callable[[], int | None],
    finish: Callable[[int, Listed], None],
    ranks: int,
    may_begin: Callable[[], bool] = lambda: True,
) -> _Running:
    """Begin to list archives until ``claim`` returns None.

    Args:
        tasks: the archives.
        context: settings of the listing.
        claim: returns the number of a task that nobody else performs.
        finish: gets the result of a task.
        ranks: number of ranks that share the tasks.
        may_begin: whether another task may be claimed now.
    """
    share = -(-len(tasks) // ranks)
    if (loop := _loop(tasks)) is None:
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="list")

        def work() -> None:
            while (number := claim()) is not None:
                finish(number, _listed(tasks[number], context))
                while not may_begin():
                    time.sleep(POLL_SECONDS)

        return _Running([pool.submit(work) for _ in range(min(THREADS, share))], pool)

    walks = max(min(FEW_WALKS if context.time_limit.exists else WALKS, share), 1)

    async def walk() -> None:
        while (number := claim()) is not None:
            finish(number, await _listed_async(tasks[number], context, SEGMENTS // walks))
            while not may_begin():
                await asyncio.sleep(POLL_SECONDS)

    async def all_walks() -> None:
        await asyncio.gather(*(walk() for _ in range(walks)))

    return _Running([asyncio.run_coroutine_threadsafe(all_walks(), loop)], None)


def _loop(tasks: Sequence[ArchiveTask]) -> asyncio.AbstractEventLoop | None:
    """The event loop in which the archives can be listed; None: some cannot."""
    if not all(format_of(task.source).lists_async and not task.source.whole for task in tasks):
        return None
    in_folders = {storage.split(task.source.uri)[0]: task.source.uri for task in tasks}
    readers = [storage.Reader(uri) for uri in in_folders.values()]
    return readers[0].loop if readers and all(reader.is_async for reader in readers) else None


def _listed(task: ArchiveTask, context: ListingContext) -> Listed:
    left_out = LeftOut()
    own = replace(context, left_out=left_out, labelled=task.labelled)
    try:
        return Listed(list(format_of(task.source).rows(task.source, task.number, own)), left_out.kinds())
    except Exception as error:
        return Listed([], left_out.kinds(), error)


async def _listed_async(task: ArchiveTask, context: ListingContext, segments: int) -> Listed:
    left_out = LeftOut()
    own = replace(context, left_out=left_out, labelled=task.labelled)
    archive = format_of(task.source)
    assert isinstance(archive, Archive)
    try:
        tables = [table async for table in archive.tables_async(task.source, task.number, own, segments)]
        return Listed([pa.concat_tables(tables)] if tables else [], left_out.kinds())
    except Exception as error:
        return Listed([], left_out.kinds(), error)


class _Message(msgspec.Struct, frozen=True):
    """What :class:`Listed` is to another rank.

    Attributes:
        rows: the tables as an Arrow stream; empty: there are none.
    """

    rows: bytes
    left_out: list[LeftOutKind]
    failure: Failure | None


def _to_bytes(listed: Listed) -> bytes:
    sink = pa.BufferOutputStream()
    if listed.tables:
        with pa.ipc.new_stream(sink, listed.tables[0].schema) as writer:
            for table in listed.tables:
                writer.write_table(table)
    failure = None if listed.error is None else Failure.of(listed.error)
    return msgspec.msgpack.encode(_Message(sink.getvalue().to_pybytes(), listed.left_out, failure))


def _from_bytes(content: bytes) -> Listed:
    message = typed.from_msgpack(content, _Message)
    tables = []
    if message.rows:
        with pa.ipc.open_stream(message.rows) as reader:
            tables = [reader.read_all()]
    return Listed(tables, message.left_out, message.failure.exception() if message.failure else None)
