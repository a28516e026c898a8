"""Cached features are verified by hash, shape and dtype; damaged ones are recomputed with a warning."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from support import index_of, picture_files, write_files

from job.data.bad_samples import BadSample
from job.errors import Preempted
from job.features.callback import FeatureCache, FeatureSettings
from job.features.file import NewerFormat
from job.features.store import FeatureStore
from job.storage.local_cache import locked

Change = Callable[[bytes, dict[str, Any]], bytes]


def store_of(tmp_path: Path, width: int = 12, dtype: torch.dtype = torch.float32, node: str = "a") -> FeatureStore:
    index = index_of(write_files(tmp_path / "data", picture_files(["blue", "red"], 8)))
    dataset = SimpleNamespace(index=index, preprocessing=SimpleNamespace(variants=2))
    return FeatureStore(dataset, tmp_path / node / "features" / "x", str(tmp_path / "bucket"), width, dtype)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """A store whose only chunk lies on node a and in the bucket."""
    store_on_a = store_of(tmp_path)
    store_on_a.save(0, torch.arange(32 * 12, dtype=torch.float32), torch.ones(32, dtype=torch.bool), {3: "no image"})
    store_on_a.publish(0)
    return store_on_a


def hashed(content: bytes, info: dict[str, Any]) -> bytes:
    info.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    return content


def tensors(**changed: torch.Tensor) -> bytes:
    kept = {"features": torch.zeros(16, 2, 12), "valid": torch.ones(16, 2, dtype=torch.bool)}
    return safetensors.torch.save({**kept, **changed})


def huge(content: bytes) -> bytes:
    """Return a file of the same size, with a header that claims terabytes."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["features"]["shape"] = [16, 2, 12 << 36]
    text = json.dumps(header).replace(" ", "").encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


DAMAGE: dict[str, Change] = {
    "flipped bit": lambda content, info: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "cut": lambda content, info: content[:-1],
    "longer": lambda content, info: content + b"x",
    "empty": lambda content, info: b"",
    "other shape": lambda content, info: hashed(tensors(features=torch.zeros(16, 2, 11)), info),
    "other type": lambda content, info: hashed(tensors(features=torch.zeros(16, 2, 12, dtype=torch.int32)), info),
    "no mask": lambda content, info: hashed(tensors(valid=torch.ones(16, 2)), info),
    "one tensor more": lambda content, info: hashed(tensors(more=torch.ones(3)), info),
    "huge header": lambda content, info: hashed(huge(content), info),
    "no safetensors": lambda content, info: hashed(b"\xff" * len(content), info),
    "rows": lambda content, info: (info.update(samples=15), content)[1],
    "width": lambda content, info: (info.update(width=24), content)[1],
    "huge width": lambda content, info: (info.update(width=1 << 40), content)[1],
    "dtype": lambda content, info: (info.update(dtype="int8"), content)[1],
    "hash": lambda content, info: (info.update(sha256="0" * 64), content)[1],
    "bad of others": lambda content, info: (info.update(bad={"99": "x"}), content)[1],
    "bad without end": lambda content, info: (info.update(bad={"3": "x" * 9000}), content)[1],
    "bad of no shape": lambda content, info: (info.update(bad=[["x"]]), content)[1],
    "one field more": lambda content, info: (info.update(more=1), content)[1],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_chunk_is_not_used(
    damage: str, store: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (store.folder, tmp_path / "bucket"):
        chunk, manifest = folder / "train-000000.safetensors", folder / "train-000000.json"
        info = json.loads(manifest.read_bytes())
        chunk.write_bytes(DAMAGE[damage](chunk.read_bytes(), info))
        manifest.write_text(json.dumps(info))
    assert store_of(tmp_path).on_disk() == set()
    assert "is damaged and is computed or fetched again" in caplog.text
    caplog.clear()
    assert store_of(tmp_path).published() == {0}
    assert not store_of(tmp_path, node="b").fetch(0)
    assert "is damaged and is computed or fetched again" in caplog.text
    assert store_of(tmp_path).published() == set()
    assert not list((tmp_path / "bucket").iterdir())


def test_processes_may_compute_the_same_chunk_at_once(tmp_path: Path) -> None:
    """Two ranks that find one chunk missing both compute it; what differs in the last bit must not be mixed."""
    start = threading.Barrier(4)

    def compute(number: int) -> None:
        for attempt in range(10):
            mine = store_of(tmp_path / str(attempt))
            start.wait(timeout=60)
            mine.save(0, torch.full((32 * 12,), float(number)), torch.ones(32, dtype=torch.bool), {})
            mine.publish(0)
            assert mine.on_disk() == {0}

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(compute, number) for number in range(4)]:
            done.result()
    for attempt in range(10):
        assert store_of(tmp_path / str(attempt), node="b").fetch(0)


def test_features_of_another_backbone_are_not_used(store: FeatureStore, tmp_path: Path) -> None:
    assert store_of(tmp_path).on_disk() == {0}
    assert store_of(tmp_path).open() == [BadSample("train", 3, "no image")]
    assert store_of(tmp_path, node="b").fetch(0)
    assert oct((tmp_path / "b/features/x/train-000000.safetensors").stat().st_mode & 0o777) == "0o600"
    assert oct((tmp_path / "b/features").stat().st_mode & 0o777) == "0o700"
    assert not store_of(tmp_path, width=6, node="c").fetch(0)


def test_an_unfinished_chunk_is_ignored(store: FeatureStore, tmp_path: Path) -> None:
    for folder in (store.folder, tmp_path / "bucket"):
        (folder / "train-000000.json").unlink()
    assert store_of(tmp_path).on_disk() == store_of(tmp_path).published() == set()
    (tmp_path / "bucket" / "train-000000.json").write_text("[" * 100_000)
    assert not store_of(tmp_path, node="b").fetch(0)


def test_a_newer_format_is_neither_used_nor_removed(store: FeatureStore, tmp_path: Path) -> None:
    manifest = tmp_path / "bucket" / "train-000000.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "format": 2, "more": 1}))
    with pytest.raises(NewerFormat, match=r"newer release.*--features\.uri"):
        store_of(tmp_path, node="b").fetch(0)
    assert manifest.exists()


def test_a_chunk_larger_than_its_manifest_says_is_not_read(store: FeatureStore, tmp_path: Path) -> None:
    with (tmp_path / "bucket" / "train-000000.safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    assert not store_of(tmp_path, node="b").fetch(0)


def test_chunks_are_verified_by_several_processes_at_once(store: FeatureStore, tmp_path: Path) -> None:
    with locked(store.folder / "chunks"):  # another process writes a chunk
        assert store_of(tmp_path).on_disk() == {0}


def test_chunks_that_another_run_removes_are_missing(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists

    def removed(path: Path) -> bool:
        was_there = exists(path)
        shutil.rmtree(store.folder, ignore_errors=True)
        return was_there

    monkeypatch.setattr(Path, "exists", removed)
    assert store_of(tmp_path).on_disk() == set()


@pytest.mark.parametrize("published", [{0, 1, 2}, set()])
def test_a_signal_stops_the_copies_between_chunks(published: set[int]) -> None:
    """Gigabytes of features would outlast the time that a preempted process has."""
    copied: list[int] = []
    preemption = SimpleNamespace(requested=False)

    def copy(chunk: int, before_write: object) -> bool:
        copied.append(chunk)
        preemption.requested = len(copied) == 2
        return True

    store = SimpleNamespace(
        published=lambda: published, on_disk=lambda: {0, 1, 2} - published, fetch=copy, publish=copy
    )
    cache = FeatureCache(FeatureSettings(), preemption, SimpleNamespace(), SimpleNamespace(require_held=None))  # type: ignore[arg-type]
    with pytest.raises(Preempted):
        cache._missing({"train": store})  # type: ignore[dict-item]
    assert copied == [0, 1]
