"""Reading from a faulty bucket: no sample is lost, repeated or damaged."""

from __future__ import annotations

import gzip
import random
import re
import signal
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp import web
from harness import fault_environment
from proxy import FaultyProxy
from support import REPOSITORY, contents, index_of, picture_files, read, tar_of, zip_of

from job import storage
from job.data import fetch, neighbours
from job.data.cache import SampleCache
from job.data.dataset import ImageDataset, Preprocessing
from job.data.fetch import Fetcher
from job.data.index.index import Index
from job.data.loader import BatchLoader
from job.data.sampler import ResumableBatchSampler
from job.errors import DataError, StorageError, StorageOutage

pytestmark = pytest.mark.integration

FILES = picture_files(["blue", "green", "red"], 40)


@pytest.fixture(scope="session")
def stored(proxy: FaultyProxy) -> dict[str, str]:
    """The same pictures as a folder, a zip and tar shards."""
    storage.write_many("gs://faults/many", FILES)
    return {"folder": "gs://faults/many", **archives("many")}


def archives(name: str) -> dict[str, str]:
    """A zip and tar shards of the pictures.

    A test that counts requests has its own: those that an earlier test has cancelled may arrive late.
    """
    storage.write_bytes(f"gs://faults/{name}.zip", zip_of(FILES))
    keys = sorted(FILES, key=lambda key: key[::-1])
    for shard in range(3):
        members = {f"{n:04d}.{end}": c for n, key in enumerate(keys) if n % 3 == shard for end, c in _sample(key)}
        storage.write_bytes(f"gs://faults/{name}-{shard}.tar", tar_of(members))
    return {"zip": f"gs://faults/{name}.zip", "shards": f"gs://faults/{name}-{{0..2}}.tar"}


def requests_of(name: str, proxy: FaultyProxy) -> int:
    """Number of requests so far for objects with this name."""
    return sum(name in path for _, path in proxy.requests)


def _sample(key: str) -> list[tuple[str, bytes]]:
    return [("jpg", FILES[key]), ("cls", key.split("/")[0].encode())]


def an_epoch(index: Index, workers: int, world_size: int, cache: SampleCache | None = None) -> Counter[bytes]:
    """Count each picture of an epoch, by its pixels and label, over all ranks."""
    counts: Counter[bytes] = Counter()
    for rank in range(world_size):
        sampler = ResumableBatchSampler(
            len(index), 24, rank=rank, world_size=world_size, seed=0, shuffle=True, run_length=3
        )
        for batch in BatchLoader(ImageDataset(index, sampler, Preprocessing(32), cache=cache), workers):
            assert batch["error"] is None
            assert not batch["bad"]
            for image, label, valid in zip(batch["image"], batch["label"].tolist(), batch["mask"], strict=True):
                if valid:
                    counts[image.numpy().tobytes() + bytes([label])] += 1
    return counts


@pytest.fixture(scope="session")
def expected(stored: dict[str, str]) -> Counter[bytes]:
    """Counts of an epoch without faults."""
    return an_epoch(index_of(stored["folder"]), 0, 1)


@pytest.mark.parametrize("kind", ["folder", "zip", "shards"])
def test_every_sample_is_read_once_despite_server_faults(
    kind: str, stored: dict[str, str], expected: Counter[bytes], proxy: FaultyProxy
) -> None:
    """The server refuses, resets, cuts or stalls half of all requests."""
    index = index_of(stored[kind])
    assert len(expected) == len(FILES)
    dice = random.Random(3)
    faults: Counter[str] = Counter()

    def refused(request: web.Request) -> web.StreamResponse | None:
        status = dice.choice([429, 503, 200, 200, 200, 200])
        faults[f"{status}"] += 1
        return None if status == 200 else web.Response(status=status)

    def damaged(request: web.Request) -> str | None:
        damage = dice.choice(["reset", "cut", None, None] + ["stall"] * (dice.random() < 0.05))
        faults[f"{damage}"] += 1
        return damage

    proxy.fault, proxy.damage = refused, damaged  # type: ignore[assignment]
    assert an_epoch(index, workers=2, world_size=1) == expected
    assert min(faults["429"] + faults["503"], faults["reset"], faults["cut"]) >= 1, faults


def test_stragglers_are_hedged(stored: dict[str, str], proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request of one object in thirty never ends: only a hedged request can return it."""
    index = index_of(stored["folder"])
    requested: set[str] = set()
    stalled: list[str] = []

    def damaged(request: web.Request) -> str | None:
        if request.path in requested:
            return None
        requested.add(request.path)
        if len(requested) % 30:
            return None
        stalled.append(request.path)
        return "stall"

    fetcher = Fetcher(index, "")
    fetcher.start(torch.arange(60).numpy()).result()  # from here on it knows what is late
    monkeypatch.setattr(fetch, "ATTEMPT_SECONDS", 3600.0)
    monkeypatch.setattr(fetch, "HEDGE_SHARE", 1.0)  # a busy machine is late with others, too
    proxy.damage = damaged  # type: ignore[assignment]
    results = contents(fetcher, fetcher.start(torch.arange(len(FILES)).numpy()).result())
    assert results == [FILES[key] for key in index.keys]
    assert len(stalled) == len(FILES) // 30


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "manifest"])
def test_a_flipped_bit_is_requested_again(
    listed: bool,
    proxy: FaultyProxy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first response for a third of the objects is damaged; the checksum comes with the response."""
    folder = f"gs://faults/flipped-{listed}"  # of its own, as in archives
    storage.write_many(folder, FILES)
    storage.write_bytes("gs://faults/flipped-none.jpg", b"")
    manifest = tmp_path / "manifest.csv"
    rows = [f"{folder}/{key},{key.split('/')[0]}\n" for key in FILES] + ["gs://faults/flipped-none.jpg,red\n"]
    manifest.write_text("uri,label\n" + "".join(rows))
    index = index_of(folder) if listed else index_of(manifest)
    flipped: list[str] = []

    def damaged(request: web.Request) -> str | None:
        if request.path in flipped or "alt=media" not in request.path_qs or zlib.crc32(request.path.encode()) % 3:
            return None
        flipped.append(request.path)
        return "flip"

    monkeypatch.setattr(fetch, "HEDGE_SHARE", -1.0)  # a busy machine's second requests are not counted
    before = requests_of("flipped-", proxy)
    proxy.damage = damaged  # type: ignore[assignment]
    results = read(index, list(range(len(index))))
    assert sorted(map(bytes, results)) == sorted([*FILES.values(), *([] if listed else [b""])])  # type: ignore[arg-type]
    damaged_files = [path for path in flipped if not path.endswith("none.jpg")]
    assert len(damaged_files) > 10
    assert requests_of("flipped-", proxy) - before == len(index) + len(damaged_files)
    assert f"mismatches so far: {len(damaged_files)}" in caplog.text


def test_an_object_damaged_in_the_store_is_one_bad_sample(stored: dict[str, str], proxy: FaultyProxy) -> None:
    """Two equal responses with a wrong checksum are one bad sample, not a transfer error."""
    index = index_of(stored["folder"])
    proxy.damage = lambda request: "flip" if "alt=media" in request.path_qs else None
    (error,) = read(index, [0])
    assert isinstance(error, DataError)
    assert re.search(r"does not match its CRC32C .* damaged in the store", str(error))
    with pytest.raises(StorageError, match="damaged in the store"):
        storage.Reader(f"{stored['folder']}/{index.keys[0]}").read("")


def test_a_copy_of_an_archive_is_downloaded_again(
    proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage.write_bytes("gs://faults/packed.tar.gz", gzip.compress(tar_of(FILES)))
    flips = iter(["flip"])
    proxy.damage = lambda request: next(flips, None) if "alt=media" in request.path_qs else None  # type: ignore
    copy = tmp_path / "copy"
    storage.download_verified("gs://faults/packed.tar.gz", copy)
    assert gzip.decompress(copy.read_bytes()) == tar_of(FILES)
    assert "It is downloaded again" in caplog.text
    proxy.damage = lambda request: "flip" if "alt=media" in request.path_qs else None
    with pytest.raises(StorageOutage, match="does not match its CRC32C"):
        storage.download_verified("gs://faults/packed.tar.gz", copy)


@pytest.mark.parametrize("kind", ["zip", "shards"])
def test_adjacent_members_share_a_request(
    kind: str, stored: dict[str, str], proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(archives("adjacent")[kind])
    monkeypatch.setattr(fetch, "HEDGE_SHARE", -1.0)  # a busy machine's second requests are not counted
    before = requests_of("adjacent", proxy)
    results = read(index, list(range(len(index))))
    assert 0 < requests_of("adjacent", proxy) - before <= len(index.sources)
    assert sorted(c for c in results if isinstance(c, bytes)) == sorted(FILES.values())


def test_the_second_epoch_makes_no_requests(
    expected: Counter[bytes], proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "HEDGE_SHARE", -1.0)  # a second request may arrive when the epoch has ended
    cache = SampleCache(tmp_path / "cache", 10**9)
    cache.recount()
    index = index_of(archives("two-epochs")["shards"])
    assert an_epoch(index, workers=2, world_size=2, cache=cache) == expected
    before = requests_of("two-epochs", proxy)
    assert before > 0
    assert an_epoch(index, workers=1, world_size=3, cache=cache) == expected
    assert requests_of("two-epochs", proxy) == before


def test_an_epoch_that_was_killed_resumes_at_another_world_size(
    stored: dict[str, str], expected: Counter[bytes], tmp_path: Path
) -> None:
    """SIGKILL of a loading process with its workers; the rest of the epoch by 3 ranks with other workers."""
    index = index_of(stored["zip"])
    code = (
        "import sys, time\n"
        "from job.data.dataset import ImageDataset, Preprocessing\n"
        "from job.data.index.index import Index\n"
        "from job.data.loader import BatchLoader\n"
        "from job.data.sampler import ResumableBatchSampler\n"
        "if __name__ == '__main__':\n"
        f"    index = Index({index.folder!r}, {index.part!r})\n"
        "    sampler = ResumableBatchSampler(len(index), 24, rank=0, world_size=1, seed=0, shuffle=True)\n"
        "    loader = BatchLoader(ImageDataset(index, sampler, Preprocessing(32)), 2)\n"
        "    for batch in loader:\n"
        "        print(loader.state_dict()['batch'], *batch['sample'].tolist(), flush=True)\n"
        "        time.sleep(0.2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=fault_environment()
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    samples = [int(sample) for line in lines for sample in line[1:]]
    for rank in range(3):
        sampler = ResumableBatchSampler(len(index), 24, rank=rank, world_size=3, seed=0, shuffle=True)
        loader = BatchLoader(ImageDataset(index, sampler, Preprocessing(32)), 1)
        loader.load_state_dict({"batch": int(lines[-1][0])})
        for batch in loader:
            samples += batch["sample"][batch["mask"]].tolist()
    assert sorted(samples) == list(range(len(index)))


def test_an_unavailable_bucket_is_an_outage(
    stored: dict[str, str], proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transient error, whose exit code requests a restart."""
    monkeypatch.setattr("job.data.fetch.RETRY_SECONDS", 2.0)
    monkeypatch.setattr("job.data.fetch.ATTEMPT_SECONDS", 2.0)
    index = index_of(stored["folder"])
    sampler = ResumableBatchSampler(len(index), 24, rank=0, world_size=1, seed=0, shuffle=True)
    proxy.answer_503_for(3600)
    error = ImageDataset(index, sampler, Preprocessing(32))[sampler.batch(0, 0)]["error"]
    assert isinstance(error, StorageOutage)
    assert "gs://faults/many/" in str(error)


def test_an_image_that_changes_under_the_run_is_one_bad_sample(proxy: FaultyProxy) -> None:
    storage.write_many("gs://faults/changing", picture_files(["blue", "red"], 2))
    index = index_of("gs://faults/changing")
    storage.write_bytes("gs://faults/changing/red/001.jpg", b"shorter")
    results = read(index, [0, 1, 2, 3])
    assert [type(each) for each in results] == [bytes, bytes, bytes, DataError]
    assert "has changed since it was listed: 7 bytes" in str(results[3])
    storage.remove("gs://faults/changing/red/001.jpg")
    assert str(read(index, [3])[0]) == "does not exist"


@pytest.mark.parametrize("kind", ["zip", "class-sorted tar"])
def test_neighbours_in_an_archive_are_fetched_once(
    kind: str,
    expected: Counter[bytes],
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shuffled first epoch needs few requests, and none twice; the second none at all."""
    if kind == "zip":
        index = index_of(archives("once")["zip"])
    else:
        storage.write_bytes("gs://faults/once-sorted.tar", tar_of(dict(sorted(FILES.items()))))
        index = index_of("gs://faults/once-sorted.tar")
    monkeypatch.setattr(neighbours, "NEIGHBOUR_BYTES", int(10 * index.info.mean_bytes))
    monkeypatch.setattr(fetch, "GAP_BYTES", 2000)
    monkeypatch.setattr(fetch, "HEDGE_SHARE", -1.0)  # a busy machine's second requests are not counted
    cache = SampleCache(tmp_path / "cache", 10**9)
    cache.recount()
    before = requests_of("once", proxy)
    assert an_epoch(index, workers=2, world_size=1, cache=cache) == expected
    assert 0 < requests_of("once", proxy) - before <= len(FILES) / 10 + 1
    before = requests_of("once", proxy)
    assert an_epoch(index, workers=1, world_size=2, cache=cache) == expected
    assert requests_of("once", proxy) == before


def test_a_batch_that_ends_between_a_lookup_and_the_claim_is_noticed(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch misses the cache, then the first one fills it, then the second one claims the group."""
    index = index_of(archives("noticed")["zip"])
    monkeypatch.setattr(fetch, "HEDGE_SHARE", -1.0)
    cache = SampleCache(tmp_path / "cache", 10**9)
    cache.recount()
    fetcher = Fetcher(index, "", cache)
    claimed = fetcher._neighbours.claimed

    def claimed_late(samples: list[int]) -> AbstractContextManager[neighbours.Claim]:
        monkeypatch.setattr(fetcher._neighbours, "claimed", claimed)
        fetcher.start(np.array([0])).result()
        return claimed(samples)

    monkeypatch.setattr(fetcher._neighbours, "claimed", claimed_late)
    before = requests_of("noticed", proxy)
    assert contents(fetcher, fetcher.start(np.array([1])).result()) == [FILES[index.keys[1]]]
    assert requests_of("noticed", proxy) - before == 1


def test_neighbours_are_left_alone_where_they_could_not_be_kept(
    stored: dict[str, str], proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that does not fit into the cache, or that other nodes read, too, is read by what is needed."""
    index = index_of(stored["zip"])
    monkeypatch.setattr(fetch, "GAP_BYTES", 2000)

    def received(limit: int) -> int:
        cache = SampleCache(tmp_path / f"cache-{limit}", limit)
        cache.recount()
        Fetcher(index, "", cache).start(np.array([0, 60, 119])).result()
        return sum(cache.has(key) for key in [Fetcher(index, "")._cache_key(index[n]) for n in range(len(index))])

    assert received(10**9) > 20
    assert received(100_000) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert received(10**9 + 1) == 0


def test_a_damaged_neighbour_is_not_kept(proxy: FaultyProxy, tmp_path: Path) -> None:
    """It is an error when its own turn comes, and only then."""
    files = picture_files(["blue", "red"], 10)
    content = bytearray(zip_of(files))
    content[content.index(files["blue/003.jpg"]) + 100] ^= 1
    storage.write_bytes("gs://faults/damaged.zip", bytes(content))
    index = index_of("gs://faults/damaged.zip")
    cache = SampleCache(tmp_path / "cache", 10**9)
    cache.recount()
    fetcher = Fetcher(index, "", cache)
    number = index.keys.index("blue/003.jpg")
    others = [n for n in range(len(index)) if n != number]
    assert contents(fetcher, fetcher.start(np.array([0])).result()) == [files[index.keys[0]]]
    before = requests_of("damaged.zip", proxy)
    assert contents(fetcher, fetcher.start(np.array(others)).result()) == [files[index.keys[n]] for n in others]
    assert requests_of("damaged.zip", proxy) == before
    (error,) = contents(fetcher, fetcher.start(np.array([number])).result())
    assert isinstance(error, DataError)
