"""Neighbours in an archive: fetched together, since each epoch needs all of them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from job.cluster import ranks
from job.data.cache import SampleCache
from job.data.index.index import Index

NEIGHBOUR_BYTES = 256 << 10
"""Bytes that are fetched for a sample of an archive together with its neighbours.

A shuffled batch of 64 then costs 16 MiB at the beginning of the first epoch, and hardly any request at its end.
"""


class Claim(NamedTuple):
    """Groups of neighbours that a batch needs.

    Attributes:
        samples: sample ids of the groups that no other batch of this process is fetching, the batch's own included.
        elsewhere: the batch's samples that another batch is fetching with its own.
    """

    samples: frozenset[int]
    elsewhere: frozenset[int]


class Neighbours:
    """Groups of neighbouring samples that are fetched once, though many batches need a part of each.

    There are none where the neighbours could not be kept until they are needed (the data does not fit into the cache),
    where other nodes would fetch the same, and where the order of samples keeps neighbours together anyway.
    """

    def __init__(self, index: Index, cache: SampleCache | None) -> None:
        self._rows = len(index)
        info = index.info
        fits = cache is not None and info.mean_bytes * info.rows <= cache.limit
        one_node = ranks.world_size() == ranks.local_world_size()
        wanted = info.run_length == 1 and fits and one_node
        self._group = max(int(NEIGHBOUR_BYTES / max(info.mean_bytes, 1)), 1) if wanted else 1
        self._lock = threading.Lock()
        self._fetching: dict[int, threading.Event] = {}

    @contextmanager
    def claimed(self, samples: Collection[int]) -> Iterator[Claim]:
        """Claim the groups of a batch's samples while the context lasts.

        Args:
            samples: sample ids, all of archives.
        """
        if self._group == 1:
            yield Claim(frozenset(), frozenset())
            return
        groups = {sample // self._group for sample in samples}
        with self._lock:
            own = {group: threading.Event() for group in groups if group not in self._fetching}
            self._fetching |= own
        try:
            yield Claim(
                frozenset(
                    sample
                    for group in own
                    for sample in range(group * self._group, min((group + 1) * self._group, self._rows))
                ),
                frozenset(sample for sample in samples if sample // self._group not in own),
            )
        finally:
            with self._lock:
                for group in own:
                    del self._fetching[group]
            for done in own.values():
                done.set()

    def wait(self, samples: Collection[int]) -> None:
        """Wait until no other batch is fetching the groups of some samples."""
        for group in {sample // self._group for sample in samples}:
            if (done := self._fetching.get(group)) is not None:
                done.wait()
