"""Cached backbone features of every variant of every sample, on disk and in a bucket.

A store is a folder of chunks, ``PART-NUMBER.safetensors``. A chunk holds all variants of some neighbouring
samples; the same file lies on every node's disk, where it is mapped into memory, and in the bucket. Its manifest
``PART-NUMBER.json`` is written last, with SHA-256, shape and unreadable samples: a chunk without one does not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from job import storage
from job.data.bad_samples import BadSample
from job.data.dataset import Batch, ImageDataset
from job.data.index.file import hash_file
from job.data.sampler import BatchIndices
from job.errors import DataError, StorageError
from job.features.file import DTYPES, LONGEST_LINE, MANIFEST_BYTES, ChunkInfo, DamagedChunk, NewerFormat, read_tensors
from job.storage.local_cache import locked, private_folder, report_disk_full

log = logging.getLogger(__name__)

FOLDER = "features"
"""Folder of all features, in run_dir and in --data.cache_dir."""
CHUNK_SAMPLES = 256
"""Samples that a killed process has to compute again, at most."""
MOST_CHUNKS = 4096
"""Chunks per part: each is a file that stays mapped."""


class FeatureStore:
    """The features of one part.

    Args:
        dataset: the samples, their variants and labels.
        folder: on this node; several processes share it.
        uri: folder through which nodes and attempts share chunks; None: they are on this node's disk only.
        width: features per variant that the backbone computes; chunks of another width are computed again.
        dtype: type of a feature.
    """

    def __init__(self, dataset: ImageDataset, folder: Path, uri: str | None, width: int, dtype: torch.dtype) -> None:
        self.dataset = dataset
        self.index = dataset.index
        assert dataset.preprocessing.variants is not None, "the number of variants is unlimited"
        self.variants = dataset.preprocessing.variants
        self.folder = folder
        self.uri = uri
        self.chunk_size = max(CHUNK_SAMPLES, -(-len(self.index) // MOST_CHUNKS))
        self._raw: list[npt.NDArray[np.uint8]] = []  # [samples, variants, bytes]: numpy has no bfloat16
        self.width = width
        self._dtype = dtype
        self._valid = torch.empty(0, self.variants, dtype=torch.bool)  # [samples, variants]
        self._bad: dict[int, str] = {}
        self._intact: set[int] = set()

    def __len__(self) -> int:
        return -(-len(self.index) // self.chunk_size)

    def samples(self, chunk: int) -> range:
        """Ids of the samples in a chunk."""
        return range(chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, len(self.index)))

    def published(self) -> set[int]:
        """Chunks in the bucket."""
        if self.uri is None or not storage.exists(self.uri):
            return set()
        chunks = {self._manifest_name(chunk): chunk for chunk in range(len(self))}
        return {chunks[entry.key] for entry in storage.list_files(self.uri) if entry.key in chunks}

    def on_disk(self) -> set[int]:
        """Chunks on this node, with verified hashes; a damaged one is removed."""
        return {chunk for chunk in range(len(self)) if self._is_intact(chunk)}

    def save(self, chunk: int, features: Tensor, valid: Tensor, bad: dict[int, str]) -> None:
        """Write a chunk to this node's disk, unless another process has done so by now.

        Args:
            chunk: its number.
            features: float [rows, F], one row per variant; the variants of a sample are neighbours.
            valid: bool [rows]; False for an unreadable sample.
            bad: reason per unreadable sample, by sample id.

        Raises:
            StorageError: the disk is full.
        """
        shape = (len(self.samples(chunk)), self.variants, -1)
        tensors = {"features": features.reshape(shape).contiguous(), "valid": valid.reshape(shape[:2]).contiguous()}
        content = safetensors.torch.save(tensors)
        info = ChunkInfo(
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            samples=shape[0],
            views=self.variants,
            width=tensors["features"].shape[2],
            dtype=str(features.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            bad={sample: line[:LONGEST_LINE] for sample, line in bad.items()},
        )
        self._write(chunk, content, msgspec.json.encode(info))

    def publish(self, chunk: int, before_write: Callable[[], None] = storage.unconditionally) -> None:
        """Upload a chunk.

        Args:
            chunk: its number.
            before_write: called immediately before each write; raises if this job may not write there.
        """
        if self.uri is None:
            return
        storage.upload(self._path(chunk), storage.join(self.uri, self._name(chunk)), before_write)
        storage.upload(self._manifest_path(chunk), storage.join(self.uri, self._manifest_name(chunk)), before_write)

    def fetch(self, chunk: int, before_write: Callable[[], None] = storage.unconditionally) -> bool:
        """Download a chunk; returns False for a damaged one, which is removed from the bucket.

        Args:
            chunk: its number.
            before_write: called immediately before it is removed; raises if this job may not write there.

        Raises:
            DataError: a newer release wrote it.
        """
        assert self.uri is not None, "there is no bucket to fetch from"
        uri, manifest = (storage.join(self.uri, name) for name in (self._name(chunk), self._manifest_name(chunk)))
        try:
            info, text = self._read_manifest(chunk, manifest)
            content = storage.read_bounded(uri, info.bytes)
            if len(content) != info.bytes or hashlib.sha256(content).hexdigest() != info.sha256:
                raise DamagedChunk("its SHA-256 differs from the one beside it")
            self._write(chunk, content, text)
            if self._is_intact(chunk):
                return True
        except NewerFormat:
            raise
        except DataError as error:
            log.warning("%s is damaged and is computed or fetched again: %s", uri, error)
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            log.warning("%s is missing and is computed again", uri)
        for damaged in (manifest, uri):
            before_write()
            storage.remove(damaged)
        return False

    def open(self) -> list[BadSample]:
        """Map all chunks into memory; returns the unreadable samples.

        Raises:
            DataError: one has changed since :meth:`on_disk`.
        """
        self._raw, self._bad = [], {}
        valid = []
        for chunk in range(len(self)):
            info, _ = self._read_manifest(chunk, str(self._manifest_path(chunk)))
            tensors = read_tensors(self._path(chunk), info)
            self._raw.append(tensors["features"].view(torch.uint8).numpy())
            valid.append(tensors["valid"])
            self._bad |= info.bad
        self._valid = torch.cat(valid)
        return [BadSample(self.index.part, sample, line) for sample, line in sorted(self._bad.items())]

    def load(self, chunk: int) -> tuple[Tensor, Tensor]:
        """A chunk on this node, mapped into memory: features, float [samples, variants, F], and which are valid, bool.

        Raises:
            DataError: it has changed since :meth:`on_disk`.
        """
        info, _ = self._read_manifest(chunk, str(self._manifest_path(chunk)))
        tensors = read_tensors(self._path(chunk), info)
        return tensors["features"], tensors["valid"]

    @property
    def valid(self) -> Tensor:
        """Which variants could be computed, bool [samples, variants]; known after :meth:`open`."""
        return self._valid

    def batch(self, indices: BatchIndices) -> Batch:
        """The batch that the dataset returns for ``indices``, with features in place of pixels."""
        samples = torch.from_numpy(indices.samples)
        variants = [self.dataset.variant(indices, row) for row in range(len(samples))]
        places = [divmod(sample, self.chunk_size) for sample in samples.tolist()]
        raw = np.stack([self._raw[chunk][row, variant] for (chunk, row), variant in zip(places, variants, strict=True)])
        batch = Batch(
            features=torch.from_numpy(raw).view(self._dtype),
            label=torch.from_numpy(self.index.labels_of(indices.samples)),
            mask=torch.from_numpy(indices.valid) & self._valid[samples, torch.tensor(variants)],
            sample=samples,
            global_size=indices.global_size,
            bad=[
                BadSample(self.index.part, sample, self._bad[sample])
                for sample in indices.samples[indices.valid].tolist()
                if sample in self._bad
            ],
            error=None,
        )
        if self.index.has_several_labels:
            batch["labels"] = torch.from_numpy(self.index.multi_hot_of(indices.samples))
        return batch

    def _write(self, chunk: int, content: bytes, manifest: bytes) -> None:
        with report_disk_full(self.folder, "keep the backbone's features"):
            private_folder(self.folder.parent)
            private_folder(self.folder)
            with self._locked():
                if self._check_or_remove(chunk):
                    return  # another process may be uploading it
                # Without its manifest the chunk does not exist, however this process ends.
                self._manifest_path(chunk).unlink(missing_ok=True)
                for path, data in ((self._path(chunk), content), (self._manifest_path(chunk), manifest)):
                    storage.write_bytes(str(path), data)
                    path.chmod(0o600)

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Exclude other processes of this node, since a chunk is two files."""
        return locked(self.folder / "chunks")

    def _name(self, chunk: int) -> str:
        return f"{self.index.part}-{chunk:06d}.safetensors"

    def _manifest_name(self, chunk: int) -> str:
        return f"{self.index.part}-{chunk:06d}.json"

    def _path(self, chunk: int) -> Path:
        return self.folder / self._name(chunk)

    def _manifest_path(self, chunk: int) -> Path:
        return self.folder / self._manifest_name(chunk)

    def _is_intact(self, chunk: int) -> bool:
        if not self._manifest_path(chunk).exists():
            return False
        # Without the lock: the ranks of a node hash their chunks at the same time.
        if chunk in self._intact or self._damage(chunk) is None:
            self._intact.add(chunk)
            return True
        # Another process may have written it meanwhile, or removed the folder.
        reported = report_disk_full(self.folder, "keep the backbone's features")
        with reported, contextlib.suppress(FileNotFoundError), self._locked():
            return self._check_or_remove(chunk)
        return False

    def _check_or_remove(self, chunk: int) -> bool:
        """Whether a chunk is on this node and intact; a damaged one is removed. Called within :meth:`_locked`."""
        path, manifest = self._path(chunk), self._manifest_path(chunk)
        if not manifest.exists():
            return False
        if (damage := self._damage(chunk)) is not None:
            log.warning("%s is damaged and is computed or fetched again: %s", path, damage)
            manifest.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            return False
        self._intact.add(chunk)
        return True

    def _damage(self, chunk: int) -> Exception | None:
        """The reason why a chunk on this node cannot be used.

        Raises:
            NewerFormat: a newer release wrote it.
        """
        path = self._path(chunk)
        try:
            info, _ = self._read_manifest(chunk, str(self._manifest_path(chunk)))
            if path.stat().st_size != info.bytes or hash_file(path) != info.sha256:
                raise DamagedChunk("its SHA-256 differs from the one beside it")
            read_tensors(path, info)
        except NewerFormat:
            raise
        except (DataError, StorageError, OSError) as error:
            return error
        return None

    def _read_manifest(self, chunk: int, uri: str) -> tuple[ChunkInfo, bytes]:
        """The manifest of a chunk, which must have the samples and the width that this store expects."""
        text = storage.read_bounded(uri, MANIFEST_BYTES)
        info = ChunkInfo.from_json(uri, text)
        samples = self.samples(chunk)
        actual = (info.samples, info.views, info.width, DTYPES[info.dtype])
        expected = (len(samples), self.variants, self.width, self._dtype)
        if actual != expected:
            raise DamagedChunk(f"it holds {actual}, {expected} is needed (samples, variants, features, type)")
        if any(sample not in samples for sample in info.bad):
            raise DamagedChunk("it names samples that it does not hold")
        return info, text
