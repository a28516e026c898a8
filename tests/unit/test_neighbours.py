"""Neighbours in an archive that are fetched together, from a store whose reads cannot be awaited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import contents, index_of, picture_files, tar_of

from job.data.cache import SampleCache
from job.data.fetch import Fetcher

FILES = dict(sorted(picture_files(["blue", "red"], 5).items()))


class RemoteFile:
    """Takes the place of a :class:`~job.storage.Reader`."""

    is_local = False
    is_async = False

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.requests = 0

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.requests += 1
        return self.content[start:] if length is None else self.content[start : start + length]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "sorted.tar"
    path.write_bytes(tar_of(FILES))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[SampleCache]:
    cache = SampleCache(tmp_path / "cache", 10**9)
    cache.recount()
    yield cache
    cache.flush()


def fetcher_of(archive: Path, cache: SampleCache, file: RemoteFile) -> Fetcher:
    fetcher = Fetcher(index_of(archive), "", cache)
    readers: dict[int, Any] = fetcher._readers
    readers[0] = file
    return fetcher


def fetched(fetcher: Fetcher, *samples: int) -> list[object]:
    return list(contents(fetcher, fetcher.start(np.array(samples)).result()))


def test_neighbours_are_read_once(archive: Path, cache: SampleCache) -> None:
    file = RemoteFile(archive.read_bytes())
    fetcher = fetcher_of(archive, cache, file)
    for number, key in enumerate(fetcher.index.keys):
        assert fetched(fetcher, number) == [FILES[key]]
    assert file.requests == 1


def test_a_response_that_is_cut_short_leaves_no_part_of_a_neighbour(archive: Path, cache: SampleCache) -> None:
    """It is as long as the sample that was asked for; there is no checksum by which a part would be noticed."""
    whole = archive.read_bytes()
    file = RemoteFile(whole)
    fetcher = fetcher_of(archive, cache, file)
    neighbour = fetcher.index[1]
    file.content = whole[: neighbour.offset + neighbour.size // 2]
    first, second = (FILES[key] for key in fetcher.index.keys[:2])
    assert fetched(fetcher, 0) == [first]
    file.content = whole
    assert fetched(fetcher, 1) == [second]


def test_a_part_of_a_sample_in_the_cache_is_a_miss(archive: Path, cache: SampleCache) -> None:
    fetcher = fetcher_of(archive, cache, RemoteFile(archive.read_bytes()))
    cache.put(fetcher._cache_key(fetcher.index[1]), b"part")
    assert fetched(fetcher, 1) == [FILES[fetcher.index.keys[1]]]
