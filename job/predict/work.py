"""A folder of predictions or embeddings: its index, its parts, and which process computes which part.

A part is the results of a fixed range of samples. Its name is its number, and its file is written whole or not at
all: a part that exists is done, and to compute one twice replaces it by the same rows. So any number of processes may
be killed and started again, also another number of them, without a row lost or doubled, and without a claim, a lock or
a clock. Process r of W begins with the parts r, r + W, r + 2 W, …, and goes on with those that others have left. None
needs another one: where rank 0 does not come, the others list the images themselves, and the first list counts.
"""

from __future__ import annotations

import logging
import random
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from job import storage, typed
from job.cluster import ranks
from job.data.index.file import load_index_info
from job.data.index.store import local_index, publish_index
from job.errors import ConfigError, DataError
from job.predict.precision import Precision
from job.storage import conditional
from job.storage.format_version import MALFORMED
from job.storage.json_files import read_limited

log = logging.getLogger(__name__)

Kind = Literal["predictions", "embeddings"]
"""Content of a folder; each kind has its own file."""
FILES: dict[Kind, str] = {"predictions": "predictions.json", "embeddings": "embeddings.json"}
INDEX_FOLDER = "index"
FORMAT = 1

MOST_SAMPLES = 10_000
"""Samples of the largest part."""
PARTS_PER_PROCESS = 8
"""Parts that a process has at least, so that a restart repeats little, where there are enough samples."""
PATIENCE_SECONDS = 120.0
"""Time after which another rank lists the images, too: rank 0 may have no machine, or list very many."""
POLL_SECONDS = 1.0
REPORT_SECONDS = 60.0

Count = Annotated[int, Meta(ge=0, lt=2**53)]


class Work(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of ``predictions.json`` or ``embeddings.json``: what the parts of the folder are computed from.

    Attributes:
        request: input, model and options; an attempt with others is refused.
        samples: number of images.
        samples_per_part: number of images in each part but the last.
        index: folder of the list of images.
        format: version of the file.
    """

    request: dict[str, str | int | float | None]
    samples: Count
    samples_per_part: Annotated[int, Meta(ge=1, le=2**31)]
    index: Annotated[str, Meta(pattern=r"\Aindex(-[0-9]{1,9})?\Z")] = "index"
    format: Annotated[int, Meta(ge=1)] = FORMAT

    @property
    def precision(self) -> Precision:
        """Precision of the parts."""
        return "bf16" if self.request.get("precision") == "bf16" else "fp32"

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.samples // self.samples_per_part)

    def samples_of(self, part: int) -> range:
        """Sample ids of a part."""
        first = part * self.samples_per_part
        return range(first, min(first + self.samples_per_part, self.samples))

    def name_of(self, part: int) -> str:
        """File name of a part."""
        return f"part-{part:05d}-of-{self.parts:05d}.{self.request['format']}"


def samples_per_part(samples: int, world_size: int, batch_size: int) -> int:
    """A multiple of the batch size that gives each process several parts, if there are enough samples."""
    wanted = min(-(-samples // (world_size * PARTS_PER_PROCESS)), MOST_SAMPLES)
    return max(-(-wanted // batch_size), 1) * batch_size


def prepare(
    folder: str,
    request: dict[str, Any],
    list_images: Callable[[Path], None],
    batch_size: int,
    cache_dir: Path,
    *,
    adopted: Collection[str] = (),
    kind: Kind = "predictions",
) -> tuple[Work, Path]:
    """The work in ``folder``, and its index on this node.

    Rank 0 lists the images where no earlier attempt has done so; the other ranks wait for it, but not forever.

    Args:
        folder: of the results.
        request: input, model and options.
        list_images: writes the index of the input into a local folder.
        batch_size: images per batch.
        cache_dir: of the node.
        adopted: entries of the request that an earlier attempt, or rank 0, has decided.
        kind: of the results.

    Raises:
        ConfigError: the folder holds results of another kind, of another input or model, or with other options.
        DataError: ``predictions.json``, ``embeddings.json`` or the index is damaged.
    """
    for other, file in FILES.items():
        if other != kind and storage.exists(storage.join(folder, file)):
            raise ConfigError(f"{folder} holds {other}. Choose another --output.")
    work, rank = read(folder, kind), ranks.rank()
    started = reported = time.monotonic()
    while work is None:
        waited = time.monotonic() - started
        if rank == 0 or waited >= PATIENCE_SECONDS:
            if rank:
                log.warning("rank %d lists the images, since rank 0 has not done so for %.0f s", rank, waited)
            work = _list(folder, request, list_images, batch_size, kind)
            break
        if time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            log.warning("rank %d waits for rank 0, which lists the images", rank)
        time.sleep(POLL_SECONDS)
        work = read(folder, kind)
    if work.request != request:
        changed = [
            f"{name} was {work.request.get(name)}, is {request.get(name)}"
            for name in sorted(work.request.keys() | request.keys())
            if work.request.get(name) != request.get(name) and name not in adopted
        ]
        if changed:
            raise ConfigError(f"{folder} holds other {kind}: {'; '.join(changed)}. Choose another --output.")
    return work, local_index(storage.join(folder, work.index), cache_dir)


def _list(
    folder: str, request: dict[str, Any], list_images: Callable[[Path], None], batch_size: int, kind: Kind
) -> Work:
    """List the images, unless another rank has done so in the meantime; returns what is in the folder then."""
    index = f"{INDEX_FOLDER}-{ranks.rank()}" if ranks.rank() else INDEX_FOLDER
    with tempfile.TemporaryDirectory(prefix="job-index-") as scratch:
        list_images(Path(scratch))
        (part,) = load_index_info(Path(scratch)).parts.values()
        publish_index(Path(scratch), storage.join(folder, index))
    samples = samples_per_part(part.rows, ranks.world_size(), batch_size)
    content = msgspec.json.format(msgspec.json.encode(Work(request, part.rows, samples, index)), indent=2)
    conditional.write_if(storage.join(folder, FILES[kind]), content, None)
    work = read(folder, kind)
    assert work is not None  # this rank's, or that of another one
    return work


def remaining(folder: str, work: Work) -> Iterator[int]:
    """Yield the part to compute next, until there are all: this rank's own in order, then those that others left."""
    while missing := sorted(set(range(work.parts)) - done(folder, work)):
        yield next_part(missing, ranks.rank(), ranks.world_size())


def next_part(missing: Sequence[int], rank: int, world_size: int) -> int:
    """The part that a rank computes next.

    Of the parts of others it takes any: ranks that help rarely take the same one. The first part that a rank has left
    is the last choice, since that rank may be computing it.

    Args:
        missing: parts that do not exist, in order; at least one.
        rank: of this process.
        world_size: number of processes.
    """
    firsts: dict[int, int] = {}
    for part in missing:
        firsts.setdefault(part % world_size, part)
    if rank in firsts:
        return firsts[rank]
    return random.choice(sorted(set(missing) - set(firsts.values())) or missing)


def done(folder: str, work: Work) -> set[int]:
    """Numbers of the parts that exist."""
    names = {work.name_of(part): part for part in range(work.parts)}
    return {names[entry.key] for entry in storage.list_files(folder) if entry.key in names}


def read(folder: str, kind: Kind = "predictions") -> Work | None:
    """What an earlier attempt left; None where there is nothing.

    Raises:
        DataError: its file is damaged, or a newer version wrote it.
    """
    uri = storage.join(folder, FILES[kind])
    if not storage.exists(uri):
        return None
    try:
        work = typed.from_json(read_limited(uri), Work)
    except MALFORMED as error:
        raise DataError(f"{uri} is damaged: {error}. Choose another --output.") from error
    if work.format > FORMAT:
        raise DataError(f"{uri} was written by a newer version of job: format {work.format}, not {FORMAT}.")
    return work
