"""A bucket of tar shards of any size, computed while it is read: an fsspec filesystem for tests and benchmarks.

``shards://NAME/1000-classes/1281167-images/1000-shards/{0000..0999}.tar`` are the shards of a data set of the size of
ImageNet in the WebDataset convention. Nothing is stored: headers, labels and sizes of images follow from the path. The
images are JPEGs of 500x375 pixels, of which :data:`PICTURES` differ, with comments that make up the size.

fsspec finds the filesystem by the entry point that :func:`install` writes, so that any command reads from it without
knowing of it. It is set up as fsspec's own filesystems are, by an environment variable:
``FSSPEC_SHARDS={"latency": 0.02, "counts": "/tmp/counts"}``.
"""

from __future__ import annotations

import asyncio
import functools
import io
import os
import re
import tarfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractBufferedFile
from PIL import Image

PICTURES = 16
"""Different pictures."""
PIXELS = (500, 375)
LEAST_BYTES, MOST_BYTES = 52_000, 400_000
MEDIAN_BYTES, SPREAD = 104_000, 0.4
"""Of the log-normal distribution of image sizes, whose mean is 113 kB, as ImageNet's."""
_BLOCK = tarfile.BLOCKSIZE
HEAD_BYTES = 3 * _BLOCK
"""Bytes before an image: the header and the content of its label, and its own header."""
_STEP = 7_919
"""A prime: neighbours have labels this far apart."""
_LONGEST_COMMENT = 65_537
"""Bytes of a JPEG's comment segment with its marker and length."""
_PATH = re.compile(r"([a-z]+)/(\d+)-classes/(\d+)-images/(\d+)-shards(?:/(\d+)\.tar)?")


@dataclass(frozen=True)
class Shard:
    """One shard of a data set.

    Attributes:
        name: of the data set, at the beginning of its keys.
        classes: number of classes.
        images: of the data set.
        shards: of the data set.
        number: which shard.
    """

    name: str
    classes: int
    images: int
    shards: int
    number: int

    @functools.cached_property
    def first(self) -> int:
        """Number of the first image."""
        return self.images * self.number // self.shards

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """int64 [N], bytes of each image."""
        count = self.images * (self.number + 1) // self.shards - self.first
        rng = np.random.default_rng([*self.name.encode(), self.number])
        return rng.lognormal(np.log(MEDIAN_BYTES), SPREAD, count).clip(LEAST_BYTES, MOST_BYTES).astype(np.int64)

    @functools.cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """int64 [N + 1], first byte of each sample, and the first one after all of them."""
        return np.append(0, np.cumsum(HEAD_BYTES + _padded(self.sizes)))

    @property
    def bytes(self) -> int:
        """Size of the tar file, which ends with two blocks of zeros and whole records."""
        end = int(self.starts[-1]) + 2 * _BLOCK
        return -(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from ``start`` to ``stop``."""
        parts, place = [], start
        sample = int(np.searchsorted(self.starts, start, side="right")) - 1
        while place < stop and sample < len(self.sizes):
            offset, end = place - int(self.starts[sample]), min(stop, int(self.starts[sample + 1]))
            content = self._sample(sample, whole=end - int(self.starts[sample]) > HEAD_BYTES)
            parts.append(content[offset : offset + end - place])
            place, sample = end, sample + 1
        return b"".join((*parts, bytes(stop - place)))

    def label(self, sample: int) -> int:
        """Class of a sample; all classes have equally many, and neighbours have different ones."""
        return (self.first + sample) * _STEP % self.classes

    def _sample(self, sample: int, *, whole: bool) -> bytes:
        """Label and image of a sample, or all that comes before the image's content."""
        number, size = self.first + sample, int(self.sizes[sample])
        label = str(self.label(sample)).encode()
        stem = f"{self.name}-{number:08d}".encode()
        head = _header(stem + b".cls", len(label)) + label.ljust(_BLOCK, b"\0") + _header(stem + b".jpg", size)
        if not whole:
            return head
        return head + _with_comments(picture(number % PICTURES), stem, size).ljust(_padded(size), b"\0")


@functools.lru_cache(2048)
def shard_of(path: str) -> Shard | None:
    """The shard at a path within the filesystem; None for the folder of a data set.

    Raises:
        FileNotFoundError: there is neither.
    """
    match = _PATH.fullmatch(path)
    if match is None or (match[5] and not (len(match[5]) == 4 and int(match[5]) < int(match[4]))):
        raise FileNotFoundError(path)
    return Shard(match[1], *map(int, match.groups()[1:])) if match[5] else None


@functools.lru_cache(PICTURES)
def picture(number: int) -> bytes:
    """A JPEG of less than :data:`LEAST_BYTES` bytes."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    fine = rng.normal(0, 6, (*PIXELS[::-1], 3))
    pixels = np.asarray(coarse.resize(PIXELS, Image.Resampling.BICUBIC), np.float64) + fine
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


class Counts:
    """Requests and bytes of one process, in a file that other processes read at any time.

    Args:
        folder: local folder with a file per process.
    """

    KINDS = ("lookups", "listings", "reads", "bytes")

    def __init__(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._values = np.memmap(Path(folder) / str(os.getpid()), np.int64, "w+", shape=(len(self.KINDS),))

    @classmethod
    def of_process(cls, folder: str) -> Counts:
        """The counts of this process, shared by its filesystems: threads that open one at once make several."""
        with _making_counts:
            key = (os.getpid(), folder)
            return _counts.get(key) or _counts.setdefault(key, cls(folder))

    def add(self, kind: str, size: int = 0) -> None:
        """Count a request."""
        self._values[self.KINDS.index(kind)] += 1
        self._values[-1] += size

    @classmethod
    def total(cls, folder: str | Path) -> dict[str, int]:
        """Sums over all processes, by kind."""
        files = [np.fromfile(file, np.int64) for file in Path(folder).glob("*")]
        sums = np.sum([np.zeros(len(cls.KINDS), np.int64), *(file for file in files if len(file))], axis=0)
        return dict(zip(cls.KINDS, sums.tolist(), strict=True))

    @staticmethod
    def clear(folder: str | Path) -> None:
        """Forget what was counted; no process may count any more."""
        for file in Path(folder).glob("*"):
            file.unlink()


_counts: dict[tuple[int, str], Counts] = {}
_making_counts = threading.Lock()


class ShardFileSystem(AsyncFileSystem):  # type: ignore[misc]
    """The filesystem; read-only.

    Args:
        latency: seconds that each request takes.
        counts: local folder for a :class:`Counts` per process; None: requests are not counted.
    """

    protocol = "shards"
    cachable = True

    def __init__(self, latency: float = 0.0, counts: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.latency = latency
        self._counts = Counts.of_process(counts) if counts else None

    async def _request(self, kind: str, size: int = 0) -> None:
        if self._counts is not None:
            self._counts.add(kind, size)
        await asyncio.sleep(self.latency)

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        await self._request("lookups")
        return _details(self._strip_protocol(path))

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        await self._request("listings")
        path = self._strip_protocol(path)
        if shard_of(path) is not None:
            names = [path]
        else:
            count = int(path.rpartition("/")[2].partition("-")[0])
            names = [f"{path}/{number:04d}.tar" for number in range(count)]
        return [_details(name) for name in names] if detail else names

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)
        shard = shard_of(path)
        if shard is None:
            raise IsADirectoryError(path)
        first, last, _ = slice(start, end).indices(shard.bytes)
        await self._request("reads", max(last - first, 0))
        return shard.read(first, max(first, last))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> AbstractBufferedFile:
        return _File(self, path, mode, **kwargs)


class _File(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        content: bytes = self.fs.cat_file(self.path, start, end)
        return content


def register() -> None:
    """Let fsspec know the filesystem, in this process."""
    fsspec.register_implementation("shards", ShardFileSystem, clobber=True)


def install(folder: Path) -> str:
    """Write an entry point into ``folder``; returns the PYTHONPATH with which all commands know the filesystem."""
    metadata = folder / "generated_shards-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: generated-shards\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[fsspec.specs]\nshards={__name__}:ShardFileSystem\n")
    return os.pathsep.join(filter(None, (str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))


def _details(path: str) -> dict[str, Any]:
    shard = shard_of(path)
    if shard is None:
        return {"name": path, "type": "directory", "size": 0}
    return {"name": path, "type": "file", "size": shard.bytes, "ETag": f'"{shard.number:08x}-{shard.bytes:x}"'}


def _padded(size: Any) -> Any:
    """Bytes that content of this size occupies in a tar file."""
    return -(-size // _BLOCK) * _BLOCK


def _header(name: bytes, size: int) -> bytes:
    """The header of a tar's member."""
    header = bytearray(_template())
    header[: len(name)] = name
    header[124:135] = b"%011o" % size
    header[148:154] = b"%06o" % sum(header)
    header[154:156] = b"\0 "
    return bytes(header)


@functools.lru_cache(1)
def _template() -> bytes:
    """A header without name and size, whose checksum is spaces (POSIX ustar)."""
    header = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
    header[148:156] = b" " * 8
    return bytes(header)


def _with_comments(jpeg: bytes, text: bytes, size: int) -> bytes:
    """A JPEG made as long as ``size`` by comments after its first marker, which begin with ``text``."""
    missing = size - len(jpeg)
    segments = -(-missing // _LONGEST_COMMENT)
    lengths = [missing * (n + 1) // segments - missing * n // segments for n in range(segments)]
    comments = (b"\xff\xfe" + (length - 2).to_bytes(2, "big") + text.ljust(length - 4, b"\0") for length in lengths)
    return b"".join((jpeg[:2], *comments, jpeg[2:]))
