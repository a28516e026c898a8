"""Tar shards in a bucket: few bytes, many requests at once, all ranks."""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import os
import random
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch.distributed as dist
from fsspec.asyn import AsyncFileSystem
from support import free_port, index_of, own_messages, picture_files, read, tar_of

from job import storage
from job.cluster import shared_work
from job.cluster.shared_work import Helpers, ProgressBarrier, SharedTasks, from_rank_zero
from job.data.index import parallel, tar_ahead
from job.data.index.access import Access
from job.data.index.build import build
from job.data.index.index import Index
from job.data.index.left_out import LeftOut
from job.data.index.parallel import help_to_list
from job.data.index.sources import ListingContext, Source, resolve, tar_side_index
from job.data.index.sources.archive import Member
from job.data.index.sources.tar_archive import Tar, list_tar
from job.errors import ConfigError, DataError, JobError, RankLost, StorageError, StorageOutage

PICTURE = next(iter(picture_files(["red"], 1).values()))


class CountingFileSystem(AsyncFileSystem):  # type: ignore[misc]
    """Objects in memory, read by ranges that are counted; each request takes a while.

    Attributes:
        objects: content by path.
        reads: (path, first byte, how many) of each read.
        most: most requests that were in flight together, by kind.
    """

    protocol = "counted"
    objects: ClassVar[dict[str, bytes]] = {}
    reads: ClassVar[list[tuple[str, int, int]]] = []
    lookups: ClassVar[list[str]] = []
    latency: ClassVar[float] = 0.0
    in_flight: ClassVar[Counter[str]] = Counter()
    most: ClassVar[Counter[str]] = Counter()

    async def _request(self, kind: str) -> None:
        self.in_flight[kind] += 1
        self.most[kind] = max(self.most[kind], self.in_flight[kind])
        await asyncio.sleep(self.latency)
        self.in_flight[kind] -= 1

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        await self._request("lookup")
        self.lookups.append(path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        content = self.objects[path]
        return {"name": path, "type": "file", "size": len(content), "ETag": str(hash(content))}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        await self._request("read")
        content = self.objects[path][start:end]
        self.reads.append((path, start or 0, len(content)))
        return content

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        await self._request("list")
        names = [name for name in self.objects if name.startswith(f"{path}/")]
        if not names:
            raise FileNotFoundError(path)
        return [
            {"name": name, "type": "file", "size": len(self.objects[name]), "ETag": str(hash(self.objects[name]))}
            for name in names
        ]


@pytest.fixture
def bucket() -> Iterator[type[CountingFileSystem]]:
    """The bucket ``counted://b``, empty."""
    fsspec.register_implementation("counted", CountingFileSystem, clobber=True)
    for attribute in (CountingFileSystem.objects, CountingFileSystem.reads, CountingFileSystem.lookups):
        attribute.clear()
    for counter in (CountingFileSystem.in_flight, CountingFileSystem.most):
        counter.clear()
    CountingFileSystem.latency = 0.0
    CountingFileSystem.clear_instance_cache()
    yield CountingFileSystem
    CountingFileSystem.objects.clear()


def image(size: int) -> bytes:
    return PICTURE.ljust(size, b"\1")


def listed(uri: str) -> list[Member]:
    """The members of a tar file in a bucket."""
    context = ListingContext([], "/nowhere", Access(), labelled=True)
    rows = [row for table in Tar().rows(Source(uri, "tar"), 0, context) for row in table.to_pylist()]
    return [
        Member(row["key"], row["offset"], row["size"], 0, row["class"], row["classes"] and tuple(row["classes"]))
        for row in rows
    ]


def requested(bucket: type[CountingFileSystem]) -> int:
    return sum(size for _, _, size in bucket.reads)


def test_headers_alone_are_read_of_large_images(bucket: type[CountingFileSystem]) -> None:
    content = tar_of({f"{'ab'[n % 2]}/{n:03}.jpg": image(50_000 + n) for n in range(100)})
    bucket.objects["b/s.tar"] = content
    index = index_of("counted://b/s.tar", layout="classes")
    assert (len(index), index.classes) == (100, ("a", "b"))
    assert requested(bucket) < 0.0135 * len(content)  # 1 % are headers, the rest is the end of so small a file
    assert len(bucket.reads) < 105
    assert read(index, [1, 98]) == [image(50_001), image(50_098)]


def test_a_label_is_read_together_with_the_headers_around_it(bucket: type[CountingFileSystem]) -> None:
    files = {}
    for n in range(60):
        files |= {f"{n:03}.cls": b"%d" % (n % 3), f"{n:03}.jpg": image(110_000)}
    content = tar_of(files)
    bucket.objects["b/s.tar"] = content
    assert index_of("counted://b/s.tar", layout="classes").labels.tolist() == [n % 3 for n in range(60)]
    assert requested(bucket) < 0.0175 * len(content)
    assert len(bucket.reads) < 65


def test_small_members_are_read_in_blocks(bucket: type[CountingFileSystem]) -> None:
    content = tar_of({f"a/{n:04}.jpg": image(3000) for n in range(2000)})
    bucket.objects["b/s.tar"] = content
    assert len(index_of("counted://b/s.tar", layout="classes")) == 2000
    assert len(bucket.reads) < 20
    assert requested(bucket) <= 1.01 * len(content)


def test_large_images_behind_small_ones(bucket: type[CountingFileSystem]) -> None:
    files = {f"a/{n:04}.jpg": image(3000) for n in range(2000)}
    small = len(tar_of(files))
    bucket.objects["b/s.tar"] = tar_of(files | {f"b/{n:04}.jpg": image(200_000) for n in range(60)})
    assert len(index_of("counted://b/s.tar", layout="classes")) == 2060
    assert requested(bucket) < small + (5 << 20)  # one block too many, and headers
    assert max(size for _, _, size in bucket.reads) <= 5 << 20


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def random_tar(rng: random.Random, tar_format: int) -> bytes:
    """Members of all kinds and sizes; some hold tar files."""
    buffer = io.BytesIO()
    names: list[str] = []
    globals_ = {"comment": "x"} if rng.random() < 0.3 else {}
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, pax_headers=globals_) as archive:
        for number in range(rng.randint(20, 60)):
            long = "d" * 90 + "/" + "e" * (40 if tar_format == tarfile.USTAR_FORMAT else 200) + "/"
            accent = "\xe9" if rng.random() < 0.2 else ""
            suffix = rng.choice(["jpg", "cls", "txt", "png"])
            name = f"{rng.choice(['', 'a/', 'a.b/', long])}{accent}{number:03}.{suffix}"
            item = tarfile.TarInfo(name)
            item.mtime = 1.5 if tar_format == tarfile.PAX_FORMAT else rng.randrange(1 << 33)
            kind = rng.random()
            if kind < 0.1 and names:
                item.type, item.linkname = tarfile.LNKTYPE, rng.choice(names)
                archive.addfile(item)
            elif kind < 0.15:
                item.type = tarfile.DIRTYPE
                archive.addfile(item)
            else:
                size = rng.choice([0, 3, 511, 512, 513, 40_000, 70_000, 150_000])
                content = b"dog" if name.endswith("cls") else rng.randbytes(size)
                if rng.random() < 0.1:
                    content = tar_of({f"x/{n}.jpg": rng.randbytes(40_000) for n in range(3)})
                item.size = len(content)
                archive.addfile(item, io.BytesIO(content))
                if tar_format != tarfile.USTAR_FORMAT or len(name.encode()) < 100:
                    names.append(name)
    return buffer.getvalue()


@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_are_those_that_tarfile_finds(
    tar_format: str, bucket: type[CountingFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a bucket, where several walks begin in the middle, some of them in a nested tar, and from a disk."""
    monkeypatch.setattr(tar_ahead, "SEGMENT", 256 << 10)
    monkeypatch.setattr(tar_ahead, "LEAST_GAPS", 1)
    rng = random.Random(tar_format)
    for _ in range(12):
        content = random_tar(rng, FORMATS[tar_format])
        bucket.objects["b/s.tar"] = content
        found = {member.key: (member.offset, member.size) for member in listed("counted://b/s.tar")}
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            files = {item.name: item for item in archive}
            expected = {}
            for name, item in files.items():
                target = files[item.linkname] if item.islnk() else item
                while target.islnk():
                    target = files[target.linkname]
                if target.isfile() and not name.endswith("cls"):
                    expected[name] = (target.offset_data, target.size)
        assert found == expected
        assert listed("counted://b/s.tar") == list(list_tar("s.tar", io.BytesIO(content)))


def test_a_large_tar_is_walked_at_several_places_at_once(
    bucket: type[CountingFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_ahead, "SEGMENT", 4 << 20)
    monkeypatch.setattr(tar_ahead, "SCAN", 8 << 10)
    content = tar_of({f"a/{n:04}.jpg": image(60_000) for n in range(640)})
    bucket.objects["b/s.tar"] = content
    bucket.latency = 0.005
    members = listed("counted://b/s.tar")
    assert [member.key for member in members] == [f"a/{n:04}.jpg" for n in range(640)]
    assert bucket.most["read"] >= 8
    assert len(bucket.reads) < 640 * 1.25
    assert requested(bucket) < 0.025 * len(content)
    reads = Counter(bucket.reads)
    assert sum(count for count in reads.values() if count > 1) < 5


def test_damaged_shards_are_refused_wherever_a_walk_meets_the_damage(
    bucket: type[CountingFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_ahead, "SEGMENT", 256 << 10)
    content = tar_of({f"a/{n:04}.jpg": image(60_000) for n in range(40)})
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        offsets = [item.offset for item in archive]
    for number in (0, 5, 20, 39):
        damaged = bytearray(content)
        damaged[offsets[number] + 148 : offsets[number] + 156] = b"0000000\0"
        bucket.objects["b/s.tar"] = bytes(damaged)
        with pytest.raises(DataError, match=r"counted://b/s\.tar is not a readable archive"):
            listed("counted://b/s.tar")
    bucket.objects["b/s.tar"] = content[: offsets[30]]
    with pytest.raises(DataError, match="cut short"):
        listed("counted://b/s.tar")


def test_a_thousand_shards_are_looked_up_and_listed_many_at_once(
    bucket: type[CountingFileSystem], tmp_path: Path
) -> None:
    bucket.latency = 0.05
    for n in range(1000):
        bucket.objects[f"b/s-{n:04}.tar"] = tar_of({f"{n:04}.jpg": PICTURE, f"{n:04}.cls": b"%d" % (n % 7)})
    info = build({"train": ["counted://b/s-{0000..0999}.tar"]}, tmp_path, str(tmp_path), "classes")
    assert info.parts["train"].rows == 1000
    assert [source.uri for source in info.sources] == [f"counted://b/s-{n:04}.tar" for n in range(1000)]
    assert Index(tmp_path, "train").keys == [f"{n:04}.jpg" for n in range(1000)]
    assert min(bucket.most["lookup"], bucket.most["read"]) > 200


def test_the_first_shard_that_cannot_be_read_is_named(bucket: type[CountingFileSystem], tmp_path: Path) -> None:
    for n in range(20):
        bucket.objects[f"b/s-{n:02}.tar"] = tar_of({f"{n}.jpg": PICTURE, f"{n}.cls": b"0"})
    bucket.objects["b/s-07.tar"] = bucket.objects["b/s-12.tar"] = b"no tar" * 500
    with pytest.raises(DataError, match=r"s-07\.tar is not a readable archive"):
        build({"train": ["counted://b/s-{00..19}.tar"]}, tmp_path, str(tmp_path), "classes")
    with pytest.raises(StorageError, match=r"s-20\.tar"):
        resolve("counted://b/s-{00..29}.tar").sources()


def test_a_shard_that_is_replaced_while_it_is_listed_is_refused(bucket: type[CountingFileSystem]) -> None:
    bucket.objects["b/s.tar"] = tar_of({"0.jpg": PICTURE, "0.cls": b"0"})
    (source,) = resolve("counted://b/s.tar").sources()
    bucket.objects["b/s.tar"] = tar_of({"0.jpg": PICTURE * 2, "0.cls": b"0"})
    with pytest.raises(DataError, match="was replaced while it was listed"):
        list(Tar().rows(source, 0, ListingContext([], "/nowhere", Access(), labelled=True)))


def index_on_rank(rank: int, port: int, folder: str, shards: int) -> None:
    """Index shards on this rank of two, and save what it has read."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    read, has_read = CountingFileSystem._cat_file, [Path(folder, f"has-read-{each}") for each in range(2)]

    async def read_when_both_do(self: CountingFileSystem, *args: Any, **options: Any) -> bytes:
        """Wait until the other rank, which may start late, has taken its share."""
        has_read[rank].touch()
        deadline = time.monotonic() + 120
        while not all(path.exists() for path in has_read) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return await read(self, *args, **options)

    CountingFileSystem._cat_file = read_when_both_do

    def make(helpers: Helpers | None) -> str:
        assert helpers is not None
        Path(folder, "index").mkdir()
        roots = {"train": [f"counted://b/s-{{00..{shards - 1}}}.tar"]}
        return str(build(roots, Path(folder, "index"), folder, "classes", helpers=helpers).parts["train"].rows)

    try:
        result = from_rank_zero(make, partial(help_to_list, cache_dir=folder))
    except JobError as error:
        result = f"{type(error).__name__}: {error}"
    reads = sorted({path for path, _, _ in CountingFileSystem.reads})
    Path(folder, str(rank)).write_text(json.dumps([result, reads]))
    dist.barrier()
    dist.destroy_process_group()


def run_on_two_ranks(function: Callable[..., None], *args: Any) -> None:
    """Call ``function(rank, port, *args)`` in two processes, which must end well."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=(rank, port, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0


def on_two_ranks(folder: Path, shards: int) -> list[tuple[str, set[str]]]:
    """What each rank returned, and the shards that it has read."""
    run_on_two_ranks(index_on_rank, str(folder), shards)
    results = [json.loads((folder / str(rank)).read_text()) for rank in range(2)]
    return [(result, set(reads)) for result, reads in results]


def test_two_ranks_share_the_shards(bucket: type[CountingFileSystem], tmp_path: Path) -> None:
    for n in range(40):
        files = {"notes.bin": b""}
        for i in range(5):
            files |= {f"{n:02}.{i}.jpg": PICTURE, f"{n:02}.{i}.cls": b"%d" % i}
        bucket.objects[f"b/s-{n:02}.tar"] = tar_of(files)
    alone = index_of("counted://b/s-{00..39}.tar", layout="classes")
    bucket.reads.clear()
    (first, own), (second, others) = on_two_ranks(tmp_path, 40)
    assert first == second == "200"
    assert own.isdisjoint(others)
    assert len(own | others) == 40
    assert min(len(own), len(others)) >= 10
    together = Index(tmp_path / "index", "train")
    assert together.fingerprint() == alone.fingerprint()
    assert together.rows(range(200)) == alone.rows(range(200))
    left_out = json.loads((tmp_path / "index" / "index.json").read_text())["left_out"]
    assert [(kind["kind"], kind["count"]) for kind in left_out] == [("files without an image's suffix", 40)]


def test_a_shard_that_another_rank_cannot_read_ends_all_ranks_with_its_error(
    bucket: type[CountingFileSystem], tmp_path: Path
) -> None:
    for n in range(10):
        bucket.objects[f"b/s-{n:02}.tar"] = tar_of({f"{n}.jpg": PICTURE, f"{n}.cls": b"0"})
    for n in (8, 9):
        bucket.objects[f"b/s-{n:02}.tar"] = b"no tar" * 500
    (first, _), (second, _) = on_two_ranks(tmp_path, 10)
    assert first == second
    assert first.startswith("DataError: counted://b/s-08.tar is not a readable archive")


def return_on_rank(rank: int, port: int, folder: str) -> None:
    """Take the result of rank 0 on this rank of two; rank 0 ends at once, and the store with it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    shared_work.LONGEST_POLL = 1.0

    def slow(helpers: Helpers | None) -> str:
        time.sleep(0.5)
        return "done"

    Path(folder, str(rank)).write_text(from_rank_zero(slow, lambda job, tasks: None))
    os._exit(0)


def test_all_ranks_have_the_result_before_rank_zero_may_end(tmp_path: Path) -> None:
    run_on_two_ranks(return_on_rank, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["done", "done"]


class MemoryStore:
    """The parts of torch's store that shared work uses, in one process."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def set(self, key: str, value: Any) -> None:
        self.values[key] = value if isinstance(value, bytes) else value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def add(self, key: str, value: int) -> int:
        self.values[key] = self.values.get(key, 0) + value
        return self.values[key]

    def delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None


def test_results_of_any_size_go_through_the_store_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_work, "LARGEST_VALUE", 1000)
    store = MemoryStore()
    tasks = SharedTasks(store, "t", 3, lambda: None)
    assert [tasks.claim() for _ in range(4)] == [0, 1, 2, None]
    for number, result in enumerate((b"", b"x" * 1000, b"y" * 2500)):
        assert tasks.result(number) is None
        tasks.finish(number, result)
        assert tasks.result(number) == result
        assert tasks.result(number) is None
    assert store.values.keys() == {"t/claimed"}


def test_a_rank_waits_as_long_as_some_rank_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(shared_work.time, "monotonic", lambda: now)
    store = MemoryStore()
    waiting, busy = Helpers(store), Helpers(store)
    for _ in range(10):
        now += 1000
        busy.tick()
        waiting.require_progress()
    now += 1000
    waiting.require_progress()
    now += 300
    with pytest.raises(RankLost, match="has made progress for 1200 s"):
        waiting.require_progress()


def test_a_barrier_waits_as_long_as_some_rank_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now, store = 0.0, MemoryStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(shared_work, "_has_other_ranks", lambda: True)
    monkeypatch.setattr(shared_work, "_store_of_this_call", lambda: store)
    monkeypatch.setattr(shared_work.time, "monotonic", lambda: now)
    early, late = ProgressBarrier(), ProgressBarrier()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 1000
        late.tick()
        if now == 10_000:
            store.add("arrived", 1)

    monkeypatch.setattr(shared_work.time, "sleep", sleep)
    early.wait()
    assert now == 10_000

    def hang(seconds: float) -> None:
        nonlocal now
        now += 1000

    monkeypatch.setattr(shared_work.time, "sleep", hang)
    store.values.clear()
    with pytest.raises(RankLost, match="has made progress for 1200 s"):
        ProgressBarrier().wait()


@pytest.mark.parametrize("error", [DataError("a"), ConfigError("b"), StorageOutage("c"), ValueError("d")])
def test_errors_of_other_ranks_are_of_the_same_kind(error: Exception) -> None:
    copy = shared_work.Failure.of(error).exception()
    if isinstance(error, JobError):
        assert (type(copy), str(copy)) == (type(error), str(error))
    else:
        assert str(copy) == "another rank failed (ValueError: d). See its log."


def test_the_listing_of_a_shard_counts_what_is_left_out(bucket: type[CountingFileSystem]) -> None:
    bucket.objects["b/s.tar"] = tar_of({"a.jpg": PICTURE, "a.seg.png": b"", "a.cls": b"0", "b.cls": b"1"})
    left_out = LeftOut()
    context = ListingContext([], "/nowhere", Access(), labelled=True, left_out=left_out)
    list(Tar().rows(Source("counted://b/s.tar", "tar"), 0, context))
    assert {kind.kind for kind in left_out.kinds()} == {
        "other images of WebDataset samples",
        "labels with no image of their name beside them",
    }


def side_index(content: bytes) -> bytes:
    """As NVIDIA DALI's wds2idx writes it."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for item in archive:
            stem, _, suffix = item.name.partition(".")
            samples.setdefault(stem, []).append(f"{suffix} {item.offset_data} {item.size} {item.name}")
    return "\n".join([f"v1.2 {len(samples)}", *map(" ".join, samples.values()), ""]).encode()


def shard_of(*, labels: bool, size: int = 60_000) -> bytes:
    files = {}
    for n in range(100):
        folder = "ab"[n // 50]
        files |= {f"{folder}/{n:03}.cls": b"%d" % n} if labels else {}
        files |= {f"{folder}/{n:03}.jpg": image(size)}
    return tar_of(files)


@pytest.mark.parametrize("labels", [False, True])
def test_an_index_file_beside_a_shard_is_used(
    labels: bool, bucket: type[CountingFileSystem], caplog: pytest.LogCaptureFixture
) -> None:
    content = shard_of(labels=labels)
    bucket.objects["b/s.tar"] = content
    expected = listed("counted://b/s.tar")
    bucket.objects["b/s.idx"] = side_index(content)
    bucket.reads.clear()
    bucket.latency = 0.005
    assert listed("counted://b/s.tar") == expected
    assert not own_messages(caplog)
    assert len(bucket.reads) < (125 if labels else 25)  # one per label; some headers
    assert bucket.most["read"] >= 10


@pytest.mark.parametrize("count", [1, 2])
def test_index_files_of_several_shards(count: int, bucket: type[CountingFileSystem], tmp_path: Path) -> None:
    """One of which has none."""
    for n in range(3):
        bucket.objects[f"b/s-{n}.tar"] = shard_of(labels=False)
        if n < count:
            bucket.objects[f"b/s-{n}.idx"] = side_index(bucket.objects[f"b/s-{n}.tar"])
    info = build({"train": ["counted://b/s-{0..2}.tar"]}, tmp_path, str(tmp_path), "classes")
    assert info.parts["train"].rows == 300
    reads = Counter(path for path, _, _ in bucket.reads)
    assert [reads[f"b/s-{n}.tar"] < 25 for n in range(3)] == [n < count for n in range(3)]


def test_an_index_file_that_does_not_fit_its_shard_is_not_used(
    bucket: type[CountingFileSystem], caplog: pytest.LogCaptureFixture
) -> None:
    content = shard_of(labels=True)
    fitting = side_index(content)
    lines = fitting.splitlines(keepends=True)
    middle = lines[50].replace(b"a/049", b"a/999")
    links = io.BytesIO()
    with tarfile.open(fileobj=links, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("0.jpg"))
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("2.jpg"))
    stale = {
        "another shard": (content, side_index(shard_of(labels=True, size=61_000))),
        "a longer shard": (shard_of(labels=True)[:-10240] + content, fitting),
        "another name": (content, b"".join([*lines[:50], middle, *lines[51:]])),
        "a missing sample": (content, b"".join([*lines[:50], *lines[51:]])),
        "a missing end": (content, b"".join(lines[:-1])),
        "a link": (links.getvalue(), b"v1.2 2\njpg 512 0 0.jpg\njpg 1536 0 2.jpg\n"),
        "an old version": (content, fitting.replace(b"v1.2", b"v1.0")),
        "no text": (content, b"\xff\x80" * 1000),
        "no numbers": (content, b"v1.2 1\njpg x y 0.jpg\n"),
        "nothing": (content, b""),
        "negative sizes": (content, b"v1.2 1\njpg 512 -5 0.jpg\n"),
        "a large offset": (content, b"v1.2 1\njpg 512 99999999999999999999 0.jpg\n"),
    }
    for reason, (shard, index) in stale.items():
        bucket.objects.clear()
        bucket.objects["b/s.tar"] = shard
        expected = listed("counted://b/s.tar")
        bucket.objects["b/s.idx"] = index
        caplog.clear()
        assert listed("counted://b/s.tar") == expected, reason
        assert "counted://b/s.idx is not used" in caplog.text, reason


def test_the_check_of_an_index_file_ends_at_the_first_difference(bucket: type[CountingFileSystem]) -> None:
    content = shard_of(labels=True)
    bucket.objects["b/s.tar"] = content
    listed("counted://b/s.tar")
    by_headers = len(bucket.reads)
    bucket.objects["b/s.idx"] = side_index(content).replace(b"a/000.cls", b"a/999.cls")
    bucket.latency = 0.005
    bucket.reads.clear()
    listed("counted://b/s.tar")
    assert len(bucket.reads) <= by_headers + 2 * tar_side_index.REQUESTS


def test_labels_of_an_index_file_that_are_not_held_are_read_again(
    bucket: type[CountingFileSystem], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = shard_of(labels=True)
    bucket.objects["b/s.tar"] = content
    expected = listed("counted://b/s.tar")
    bucket.objects["b/s.idx"] = side_index(content)
    monkeypatch.setattr(tar_side_index, "MOST_HELD", 50)
    bucket.reads.clear()
    assert listed("counted://b/s.tar") == expected
    assert not own_messages(caplog)
    assert 150 < len(bucket.reads) < 200


def test_shards_in_a_gcs_bucket(gcs: str, tmp_path: Path) -> None:
    for n in range(12):
        content = tar_of({f"{'ab'[i % 2]}/{n}.{i}.jpg": image(60_000 + i) for i in range(10)})
        (tmp_path / f"s-{n:02}.tar").write_bytes(content)
        storage.write_bytes(f"{gcs}/indexed/s-{n:02}.tar", content)
    there, here = (index_of(f"{root}/s-{{00..11}}.tar", layout="classes") for root in (f"{gcs}/indexed", tmp_path))
    assert there.fingerprint() == here.fingerprint()
    assert [row[:4] for row in there.rows(range(120))] == [row[:4] for row in here.rows(range(120))]
    assert read(there, [7, 119]) == [image(60_007), image(60_009)]


@pytest.mark.parametrize("on_disk", [False, True])
def test_archives_that_wait_for_the_one_before_them_are_few(
    on_disk: bool, bucket: type[CountingFileSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "MOST_WAITING", 2)
    monkeypatch.setattr(parallel, "WALKS", 4)
    for n in range(40):
        content = tar_of({f"{'ab'[n % 2]}/{n}.jpg": PICTURE} if n else {f"a/{i}.jpg": PICTURE for i in range(500)})
        bucket.objects[f"b/s-{n:02}.tar"] = content
        (tmp_path / f"s-{n:02}.tar").write_bytes(content)
    root = tmp_path if on_disk else "counted://b"
    assert len(index_of(f"{root}/s-{{00..39}}.tar", layout="classes")) == 539
    bucket.objects["b/s-01.tar"] = b"no tar" * 100
    (tmp_path / "s-01.tar").write_bytes(b"no tar" * 100)
    with pytest.raises(DataError, match=r"s-01\.tar is not a readable archive"):
        index_of(f"{root}/s-{{00..39}}.tar", layout="classes")
