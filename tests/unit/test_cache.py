from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import REPOSITORY, own_messages

from job.data.cache import ACCOUNTED_BYTES, SampleCache


def content(number: int) -> bytes:
    return bytes([number % 251]) * (20_000 + number)


def stored_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("??/*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def opened(folder: Path, limit: int) -> SampleCache:
    cache = SampleCache(folder, limit)
    cache.recount()
    return cache


def test_a_stored_sample_is_found_by_another_process(tmp_path: Path) -> None:
    opened(tmp_path, 10**9).put("a", b"content")
    opened(tmp_path, 10**9).put("empty", b"")
    cache = opened(tmp_path, 10**9)
    assert [cache.get(key) for key in ("a", "empty", "b")] == [b"content", b"", None]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_a_cache_miss(damage: str, tmp_path: Path) -> None:
    cache = opened(tmp_path, 10**9)
    cache.put("a", b"content")
    (path,) = tmp_path.glob("??/*")
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-3], "flip": b"X" + whole[1:], "empty": b""}[damage])
    assert cache.get("a") is None
    cache.put("a", b"content")
    assert cache.get("a") == b"content"


def test_the_least_recently_used_are_evicted(tmp_path: Path) -> None:
    cache = opened(tmp_path, 9 * ACCOUNTED_BYTES // 2)
    block = b"x" * ACCOUNTED_BYTES
    for number in range(4):
        cache.put(str(number), block)
        for path in tmp_path.glob("??/*"):  # ages that no clock's resolution blurs
            os.utime(path, (path.stat().st_mtime - 10,) * 2)
    assert cache.get("0") == block
    cache.put("4", block)
    assert cache.get("0") == block
    assert cache.get("1") is None
    assert cache.get("4") == block


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
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
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
    assert limit / 2 < largest <= limit + 5 * (ACCOUNTED_BYTES + 21_000)
    cache = opened(tmp_path / "cache", limit)
    assert stored_bytes(tmp_path / "cache") <= limit
    assert all(cache.get(str(number)) in (None, content(number)) for number in range(400))


def test_stale_temporary_files_are_deleted(tmp_path: Path) -> None:
    cache = opened(tmp_path, 10**9)
    cache.put("a", b"content")
    (path,) = tmp_path.glob("??/*")
    for age, name in ((0, ".being-written"), (7200, ".left-behind")):
        (path.parent / name).write_bytes(b"half")
        os.utime(path.parent / name, (time.time() - age,) * 2)
    cache.recount()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([".being-written", path.name])


def test_an_unwritable_disk_disables_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = SampleCache(Path("/proc/cache"), 10**9)
    cache.put("a", b"content")
    cache.put("b", b"content")
    assert cache.get("a") is None
    assert len(own_messages(caplog)) == 1
    assert "--data.cache_dir" in caplog.text
