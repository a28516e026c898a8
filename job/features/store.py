"""What a frozen backbone gives for every view of every sample, computed once, on disk and in a bucket.

A store is a folder of chunks, ``PART-NUMBER.safetensors``. A chunk holds all views of some neighbouring
samples; the same file lies on every node's disk, where it is mapped into memory, and in the bucket. Beside it lies
``PART-NUMBER.json``, written last, with its SHA-256, shape and unreadable samples: a chunk without it does not exist.
"""

from __future__ import annotations

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
from job.data.dataset import Batch, ImageDataset
from job.data.index.file import hash_file
from job.data.index.index import Index
from job.data.sampler import BatchPlan
from job.errors import DataError, StorageError
from job.features.file import DTYPES, LONGEST_LINE, MANIFEST_BYTES, ChunkInfo, DamagedChunk, NewerFormat, read_tensors
from job.storage.local_cache import private_folder, report_disk_full

log = logging.getLogger(__name__)

CHUNK_SAMPLES = 256
"""What a process that is killed has to compute again, at most."""
MOST_CHUNKS = 4096
"""Of a part: each is a file that stays mapped."""


class FeatureStore:
    """The features of one part.

    Args:
        dataset: tells samples, views and labels.
        folder: on this node; several processes share it.
        uri: where nodes and starts find one another's chunks.
        width: features per view that the backbone computes; chunks of another width are computed again.
        dtype: their type.
    """

    def __init__(self, dataset: ImageDataset, folder: Path, uri: str, width: int, dtype: torch.dtype) -> None:
        self.dataset = dataset
        self.index = dataset.index
        assert dataset.view.count is not None, "a sample has pictures without end"
        self.views = dataset.view.count
        self.folder = folder
        self.uri = uri
        self.chunk_size = max(CHUNK_SAMPLES, -(-len(self.index) // MOST_CHUNKS))
        self._raw: list[npt.NDArray[np.uint8]] = []  # [samples, views, bytes]: numpy knows no bfloat16
        self.width = width
        self._dtype = dtype
        self._valid = torch.empty(0, self.views, dtype=torch.bool)  # [samples, views]
        self._bad: dict[int, str] = {}
        self._sound: set[int] = set()

    def __len__(self) -> int:
        return -(-len(self.index) // self.chunk_size)

    def samples(self, chunk: int) -> range:
        """Ids of the samples in a chunk."""
        return range(chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, len(self.index)))

    def published(self) -> set[int]:
        """Chunks that lie in the bucket."""
        if not storage.exists(self.uri):
            return set()
        ours = {self._manifest_name(chunk): chunk for chunk in range(len(self))}
        return {ours[entry.key] for entry in storage.list_files(self.uri) if entry.key in ours}

    def on_disk(self) -> set[int]:
        """Chunks that lie on this node, their hashes verified; a damaged one is removed."""
        return {chunk for chunk in range(len(self)) if self._is_sound(chunk)}

    def save(self, chunk: int, features: Tensor, valid: Tensor, bad: dict[int, str]) -> None:
        """Write a chunk to this node's disk.

        Args:
            features: float [rows, F], a row a view, the views of a sample being neighbours.
            valid: bool [rows]; False where there is no image.
            bad: why, by sample id.

        Raises:
            StorageError: the disk is full.
        """
        shape = (len(self.samples(chunk)), self.views, -1)
        tensors = {"features": features.reshape(shape).contiguous(), "valid": valid.reshape(shape[:2]).contiguous()}
        content = safetensors.torch.save(tensors)
        info = ChunkInfo(
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            samples=shape[0],
            views=self.views,
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
        storage.upload(self._path(chunk), storage.join(self.uri, self._name(chunk)), before_write)
        storage.upload(self._manifest_path(chunk), storage.join(self.uri, self._manifest_name(chunk)), before_write)

    def fetch(self, chunk: int, before_write: Callable[[], None] = storage.unconditionally) -> bool:
        """Download a chunk; False if it turned out to be damaged, and was removed from the bucket.

        Args:
            before_write: called immediately before it is removed; raises if this job may not write there.

        Raises:
            DataError: a newer release wrote it.
        """
        uri, manifest = (storage.join(self.uri, name) for name in (self._name(chunk), self._manifest_name(chunk)))
        try:
            info, text = self._read_manifest(chunk, manifest)
            content = storage.read_bounded(uri, info.bytes)
            if len(content) != info.bytes or hashlib.sha256(content).hexdigest() != info.sha256:
                raise DamagedChunk("its SHA-256 differs from the one beside it")
            self._write(chunk, content, text)
            if self._is_sound(chunk):
                return True
        except NewerFormat:
            raise
        except DataError as error:
            log.warning("%s is damaged and is computed or fetched again: %s", uri, error)
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            log.warning("%s is not there and is computed again", uri)
        for damaged in (manifest, uri):
            before_write()
            storage.remove(damaged)
        return False

    def open(self) -> list[str]:
        """Map all chunks; returns a line for each unreadable sample, as a batch's ``bad``.

        Raises:
            DataError: one is not what :meth:`on_disk` found.
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
        return sorted(self._bad.values())

    def batch(self, plan: BatchPlan) -> Batch:
        """The batch that the dataset makes of ``plan``, with features in place of pixels."""
        samples = torch.from_numpy(plan.samples)
        views = [self.dataset.number(plan, row) for row in range(len(samples))]
        places = [divmod(sample, self.chunk_size) for sample in samples.tolist()]
        raw = np.stack([self._raw[chunk][place, view] for (chunk, place), view in zip(places, views, strict=True)])
        return Batch(
            features=torch.from_numpy(raw).view(self._dtype),
            label=torch.from_numpy(self.index.labels_of(plan.samples)),
            mask=torch.from_numpy(plan.valid) & self._valid[samples, torch.tensor(views)],
            sample=samples,
            global_size=plan.global_size,
            bad=[self._bad[sample] for sample in plan.samples[plan.valid].tolist() if sample in self._bad],
            error=None,
        )

    def _write(self, chunk: int, content: bytes, manifest: bytes) -> None:
        with report_disk_full(self.folder, "keep the backbone's features"):
            private_folder(self.folder.parent)
            private_folder(self.folder)
            # Without its manifest the chunk does not exist, however this process ends.
            self._manifest_path(chunk).unlink(missing_ok=True)
            for path, data in ((self._path(chunk), content), (self._manifest_path(chunk), manifest)):
                storage.write_bytes(str(path), data)
                path.chmod(0o600)

    def _name(self, chunk: int) -> str:
        return f"{self.index.part}-{chunk:06d}.safetensors"

    def _manifest_name(self, chunk: int) -> str:
        return f"{self.index.part}-{chunk:06d}.json"

    def _path(self, chunk: int) -> Path:
        return self.folder / self._name(chunk)

    def _manifest_path(self, chunk: int) -> Path:
        return self.folder / self._manifest_name(chunk)

    def _is_sound(self, chunk: int) -> bool:
        path, manifest = self._path(chunk), self._manifest_path(chunk)
        if not manifest.exists():
            return False
        if chunk in self._sound:
            return True
        try:
            info, _ = self._read_manifest(chunk, str(manifest))
            if path.stat().st_size != info.bytes or hash_file(path) != info.sha256:
                raise DamagedChunk("its SHA-256 differs from the one beside it")
            read_tensors(path, info)
        except NewerFormat:
            raise
        except (DataError, StorageError, OSError) as error:
            log.warning("%s is damaged and is computed or fetched again: %s", path, error)
            manifest.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            return False
        self._sound.add(chunk)
        return True

    def _read_manifest(self, chunk: int, uri: str) -> tuple[ChunkInfo, bytes]:
        """The manifest of a chunk, which must be of the samples and of the width that this store expects."""
        text = storage.read_bounded(uri, MANIFEST_BYTES)
        info = ChunkInfo.from_json(uri, text)
        samples = self.samples(chunk)
        found = (info.samples, info.views, info.width, DTYPES[info.dtype])
        expected = (len(samples), self.views, self.width, self._dtype)
        if found != expected:
            raise DamagedChunk(f"it holds {found}, {expected} is needed (samples, views, features, type)")
        if any(sample not in samples for sample in info.bad):
            raise DamagedChunk("it names samples that it does not hold")
        return info, text


def content_hash(index: Index) -> str:
    """What tells an index from another by the places and versions of its samples."""
    sources = [(source.uri, source.version) for source in index.sources]
    return hashlib.sha256(repr((sources, index.info.sha256)).encode()).hexdigest()


def weights_hash(backbone: torch.nn.Module) -> str:
    """What tells a backbone's weights, and the names they have, from others."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
