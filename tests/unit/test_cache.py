from __future__ import annotations

import contextlib
import copy
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import REPOSITORY, own_messages

from job.data import cache as cache_module
from job.data import cache_table
from job.data.cache import BLOCK_BYTES, IDLE_SECONDS, PENDING_BYTES, SampleCache
from job.data.cache_table import Place, Table


@pytest.fixture(autouse=True)
def patience_with_a_slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk to which other programs write a lot takes longer than a flush waits for it."""
    monkeypatch.setattr(cache_module, "FLUSH_LIMIT_SECONDS", 300.0)


def content(number: int) -> bytes:
    return bytes([number % 251]) * (20_000 + number)


def stored_bytes(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def opened(folder: Path, limit: int) -> SampleCache:
    cache = SampleCache(folder, limit)
    cache.recount()
    return cache


def store(cache: SampleCache, **contents: bytes) -> None:
    for key, each in contents.items():
        cache.put(key, each)
    cache.flush()


def grow_older(folder: Path, seconds: float) -> None:
    for path in folder.glob("*.segment"):
        os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def test_a_stored_sample_is_found_by_another_process(tmp_path: Path) -> None:
    store(opened(tmp_path, 10**9), a=b"content")
    store(opened(tmp_path, 10**9), empty=b"")
    cache = opened(tmp_path, 10**9)
    assert [cache.get(key) for key in ("a", "empty", "b")] == [b"content", b"", None]
    assert [cache.has(key) for key in ("a", "empty", "b")] == [True, True, False]


def test_a_sample_is_found_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "FLUSH_SECONDS", 60.0)
    cache = opened(tmp_path, 10**9)
    cache.put("a", b"content")
    assert not list(tmp_path.glob("*.segment"))
    assert cache.has("a")
    assert cache.get("a") == b"content"
    cache.flush()
    assert copy.copy(cache).get("a") == b"content"  # as in loader processes, by __getstate__


def test_many_samples_share_a_file_and_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,281,167 samples must not be as many files, nor 4 system calls each."""
    writes: list[int] = []
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda file, buffers: writes.append(len(buffers) // 2) or writev(file, buffers))
    monkeypatch.setattr(cache_module, "FLUSH_SECONDS", 10.0)  # on a slow machine a block takes more than the usual time
    cache = opened(tmp_path, 10**9)
    numbers = range(20_000)  # more than the first table holds
    for number in numbers:
        cache.put(str(number), number.to_bytes(4) * 40)
        if number % 1000 == 0:
            cache.flush()
    cache.flush()
    assert sum(writes) == len(numbers)
    assert len(writes) < 100
    assert len(list(tmp_path.iterdir())) < 5
    for reader in (cache, opened(tmp_path, 10**9)):
        assert all(reader.get(str(number)) == number.to_bytes(4) * 40 for number in numbers)


def test_a_reader_follows_a_table_that_grows(tmp_path: Path) -> None:
    writer = opened(tmp_path, 10**9)
    store(writer, first=b"first")
    reader = SampleCache(tmp_path, 10**9)
    assert reader.get("first") == b"first"
    table = (tmp_path / "table").stat()
    for number in range(20_000):
        writer.put(str(number), b"x")
        if number % 1000 == 0:
            writer.flush()
    store(writer, last=b"last")
    assert (tmp_path / "table").stat().st_size > table.st_size
    assert [reader.get(key) for key in ("first", "7", "last")] == [b"first", b"x", b"last"]


@pytest.mark.parametrize("damage", ["cut", "flip", "zeros", "flipped key"])
def test_a_damaged_record_is_a_cache_miss(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(opened(tmp_path, 10**9), a=b"content", b=b"other")
    cache = opened(tmp_path, 10**9)
    (path,) = tmp_path.glob("*.segment")
    whole = path.read_bytes()
    start = whole.index(b"content")
    damaged = {
        "cut": whole[: start + 3],
        "flip": whole.replace(b"content", b"Content"),
        "zeros": bytes(len(whole)),
        "flipped key": bytes([whole[0] ^ 1]) + whole[1:],
    }
    path.write_bytes(damaged[damage])
    assert cache.get("a") is None
    assert f"{path} is damaged at byte 0" in caplog.text
    store(cache, a=b"content")
    assert cache.get("a") == b"content"
    assert opened(tmp_path, 10**9).get("a") == b"content"


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"9" * 400, bytes(1_600_000), "cut", "flip", "removed"])
def test_a_damaged_table_is_replaced(damage: bytes | str, tmp_path: Path) -> None:
    """Records that no table names are deleted, or they would fill the disk unseen."""
    cache = opened(tmp_path, 10**9)
    store(cache, a=bytes(BLOCK_BYTES))
    table = tmp_path / "table"
    whole = table.read_bytes()
    if damage == "removed":
        table.unlink()
    else:
        flipped = whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]
        table.write_bytes({"cut": whole[:-1], "flip": flipped}.get(damage, damage))  # type: ignore[call-overload]
    for process in (cache, SampleCache(tmp_path, 10**9), opened(tmp_path, 10**9)):
        assert process.get("a") in (None, bytes(BLOCK_BYTES))
    store(cache, b=b"content")
    assert [process.get("b") for process in (cache, opened(tmp_path, 10**9))] == [b"content"] * 2
    assert stored_bytes(tmp_path) < len(whole) + 1000


def test_a_process_without_file_descriptors_does_not_empty_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store(opened(tmp_path, 10**9), a=b"content")
    other = SampleCache(tmp_path, 10**9)
    open_regular, refused = cache_table.open_regular, []

    def refuse_once(path: Path, flags: int) -> int:
        if not refused:
            refused.append(path)
            raise OSError(errno.EMFILE, "Too many open files")
        return open_regular(path, flags)

    monkeypatch.setattr(cache_table, "open_regular", refuse_once)
    store(other, b=b"content")
    assert refused == [tmp_path / "table"]
    assert "Too many open files" in caplog.text
    assert opened(tmp_path, 10**9).get("a") == b"content"


def test_a_reader_that_opens_an_earlier_table_does_not_divert_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, table = Table(tmp_path / "table"), Table(tmp_path / "table")
    assert other.open()
    open_regular, is_open, go_on = cache_table.open_regular, threading.Event(), threading.Event()

    def open_slowly(path: Path, flags: int) -> int:
        file = open_regular(path, flags)
        if threading.current_thread() is reader:
            is_open.set()
            assert go_on.wait(60)
        return file

    monkeypatch.setattr(cache_table, "open_regular", open_slowly)
    reader = threading.Thread(target=table.find, args=(1,))
    reader.start()
    assert is_open.wait(60)
    other.add(((number << 48, Place(0, 0, 1)) for number in range(1, 10_000)), lambda: [0])  # grows: another file
    assert not table.open()
    go_on.set()
    reader.join()
    table.add([(1, Place(0, 2, 3))], lambda: [0])
    assert Table(tmp_path / "table").find(1) == table.find(1) == Place(0, 2, 3)


def test_damaged_slots_are_cache_misses(tmp_path: Path) -> None:
    store(opened(tmp_path, 10**9), **{str(number): content(number) for number in range(200)})
    table = tmp_path / "table"
    whole = bytearray(table.read_bytes())
    dice = random.Random(0)
    for place in range(64, len(whole)):
        if whole[place] and dice.random() < 0.1:
            whole[place] ^= 1 << dice.randrange(8)
    table.write_bytes(whole)
    cache = opened(tmp_path, 10**9)
    found = [cache.get(str(number)) for number in range(200)]
    assert all(each in (None, content(number)) for number, each in enumerate(found))
    assert None in found


def test_the_least_recently_used_are_evicted(tmp_path: Path) -> None:
    cache = opened(tmp_path, 5 * BLOCK_BYTES)
    block = b"x" * BLOCK_BYTES
    for number in range(4):
        store(cache, **{str(number): block})
        grow_older(tmp_path, 10 + IDLE_SECONDS)
    assert SampleCache(tmp_path, cache.limit).get("0") == block
    store(cache, **{"4": block})
    assert cache.get("0") == block
    assert cache.get("1") is None
    assert cache.get("4") == block
    assert stored_bytes(tmp_path) <= cache.limit


def test_segments_in_use_are_not_evicted(tmp_path: Path) -> None:
    """Epochs of more samples than fit read the cached ones from the cache, instead of replacing them one by another."""
    cache = opened(tmp_path, 50 * 20_000 + 500_000)
    first = {str(number): content(number) for number in range(100)}
    for key, each in first.items():
        store(cache, **{key: each})
    kept = [key for key, each in first.items() if cache.get(key) == each]
    assert 30 < len(kept) < 70
    for key, each in reversed(first.items()):
        store(cache, **{key: each})
    assert [key for key, each in first.items() if cache.get(key) == each] == kept
    assert stored_bytes(tmp_path) <= cache.limit


def test_a_smaller_limit_applies_at_once(tmp_path: Path) -> None:
    store(opened(tmp_path, 10**8), **{str(number): content(number) for number in range(200)})
    assert stored_bytes(tmp_path) > 4_000_000
    opened(tmp_path, 10**6)
    assert stored_bytes(tmp_path) <= 10**6


def test_what_waits_for_a_slow_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    written: list[int] = []
    writev = os.writev

    def write_slowly(file: int, buffers: list[bytes]) -> int:
        go_on.wait(300)
        written.append(writev(file, buffers))
        return written[-1]

    monkeypatch.setattr(os, "writev", write_slowly)
    cache = opened(tmp_path, 10**9)
    block = bytes(1 << 20)
    for number in range(200):
        cache.put(str(number), block)
    assert not written  # put has waited for no write
    held = sum(cache.has(str(number)) for number in range(200))
    assert PENDING_BYTES <= held << 20 <= PENDING_BYTES + 2 * BLOCK_BYTES
    go_on.set()
    cache.flush()
    assert sum(cache.get(str(number)) == block for number in range(200)) == held


def test_processes_continue_unfinished_segments(tmp_path: Path) -> None:
    """A run that starts a hundred times does not leave a hundred files."""
    for number in range(20):
        cache = SampleCache(tmp_path, 10**9)
        store(cache, **{str(number): content(number)})
        assert cache._writing is not None
        cache._writing.close()  # as at the end of a process: its thread may hold the cache for a moment longer
    assert len(list(tmp_path.glob("*.segment"))) == 1
    one, other = SampleCache(tmp_path, 10**9), SampleCache(tmp_path, 10**9)
    store(one, one=b"one")
    store(other, other=b"other")
    assert len(list(tmp_path.glob("*.segment"))) == 2
    assert opened(tmp_path, 10**9).get("one") == b"one"
    assert all(opened(tmp_path, 10**9).get(str(number)) == content(number) for number in range(20))


def test_killed_writers_leave_the_cache_intact_and_bounded(tmp_path: Path) -> None:
    """Four processes write and read more than fits; two are killed at random moments."""
    limit = 3_000_000
    opened(tmp_path / "cache", limit)
    code = (
        "import random, sys; sys.path.insert(0, 'tests/unit'); sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from test_cache import SampleCache, content\n"
        f"cache, dice = SampleCache(Path({str(tmp_path / 'cache')!r}), {limit}), random.Random(int(sys.argv[1]))\n"
        "print('up', flush=True)\n"
        "while True:\n"
        "    number = dice.randrange(400)\n"
        "    found = cache.get(str(number))\n"
        "    assert found in (None, content(number)), number\n"
        "    cache.put(str(number), content(number))\n"
    )
    largest = 0

    def start(seed: int) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", code, str(seed)]
        return subprocess.Popen(line, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)

    writers = [start(seed) for seed in range(4)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "up\n"
        for number in range(4):
            began = time.monotonic()
            while time.monotonic() < began + 1 or (largest <= limit / 2 and time.monotonic() < began + 60):
                largest = max(largest, stored_bytes(tmp_path / "cache"))
            assert [writer.poll() for writer in writers] == [-signal.SIGKILL] * min(number, 2) + [None] * (
                4 - min(number, 2)
            )
            if number < 2:
                writers[number].kill()
                writers[number].wait()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert limit / 2 < largest <= limit
    cache = opened(tmp_path / "cache", limit)
    assert stored_bytes(tmp_path / "cache") <= limit
    assert all(cache.get(str(number)) in (None, content(number)) for number in range(400))


def test_stale_temporary_files_are_deleted(tmp_path: Path) -> None:
    store(opened(tmp_path, 10**9), a=b"content")
    expected = sorted(tmp_path.iterdir())
    (tmp_path / ".table-abc").write_bytes(b"half")
    assert opened(tmp_path, 10**9).get("a") == b"content"
    assert sorted(tmp_path.iterdir()) == expected


def test_files_of_earlier_versions_are_deleted_and_no_others(tmp_path: Path) -> None:
    old = ["ab/" + "0" * 30, "ab/." + "1" * 32 + "-12-345", "cd/" + "f" * 30, "total", "total.lock"]
    others = ["ab/notes.txt", "ef/photo.jpg", "photos/" + "0" * 30, "readme", "a.segment", "1234567.segment"]
    for name in (*old, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "ff").symlink_to(tmp_path / "photos")
    opened(tmp_path, 10**9)
    deadline = time.monotonic() + 60
    while any((tmp_path / name).exists() for name in old) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [name for name in old if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in others)
    assert (tmp_path / "ff").is_symlink()
    assert not (tmp_path / "cd").exists()


@pytest.mark.parametrize("kind", ["missing", "another folder in its place"])
def test_an_unwritable_disk_disables_the_cache(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path("/proc/cache") if kind == "missing" else tmp_path / "table.lock"
    folder.exists() or kind == "missing" or folder.mkdir()
    cache = SampleCache(folder if kind == "missing" else tmp_path, 10**9)
    store(cache, a=b"content", b=b"content")
    store(cache, c=b"content")
    assert cache.get("a") is None
    assert len(own_messages(caplog)) == 1
    assert "--data.cache_dir" in caplog.text


def test_a_full_disk_disables_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel writes what fits, and reports nothing until the next write."""
    cache = opened(tmp_path, 10**9)
    store(cache, a=b"content")
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda file, buffers: writev(file, buffers[:1]))
    store(cache, b=b"content", c=b"content")
    store(cache, d=b"content")
    assert caplog.text.count("is full") == 1
    assert [cache.get(key) for key in "abcd"] == [b"content", None, None, None]
    monkeypatch.undo()
    other = opened(tmp_path, 10**9)
    store(other, b=b"content")
    assert [other.get(key) for key in "ab"] == [b"content"] * 2


def test_a_process_that_ends_writes_what_it_has_put(tmp_path: Path) -> None:
    opened(tmp_path, 10**9)
    code = (
        "from pathlib import Path; from job.data.cache import SampleCache\n"
        f"SampleCache(Path({str(tmp_path)!r}), 10**9).put('a', b'content')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    assert opened(tmp_path, 10**9).get("a") == b"content"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_segment_that_is_no_file_is_a_cache_miss(kind: str, tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache", 10**8)
    store(cache, a=b"content")
    (segment,) = (tmp_path / "cache").glob("*.segment")
    segment.rename(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    if kind == "link":
        segment.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(segment)
    else:
        segment.mkdir()
    other = SampleCache(cache.folder, cache.limit)
    assert other.get("a") is None
    store(other, a=b"content")
    assert opened(cache.folder, cache.limit).get("a") == b"content"
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_an_unexpected_error_of_the_writer_disables_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(cache: SampleCache, block: dict[bytes, bytes]) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr(SampleCache, "_write", fail)
    cache = opened(tmp_path, 10**9)
    cache.put("a", b"content")
    cache.flush()
    cache.put("b", b"content")
    assert cache.get("a") is cache.get("b") is None
    (message,) = own_messages(caplog)
    assert "cannot be written (MemoryError: no memory left)" in message


def test_without_a_thread_to_write_nothing_is_cached_until_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    cache = opened(tmp_path, 10**9)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        cache.put("a", b"lost")
        cache.flush()
        assert cache.get("a") is None
    store(cache, b=b"kept")
    assert opened(tmp_path, 10**9).get("b") == b"kept"
