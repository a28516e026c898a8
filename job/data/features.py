"""What a frozen backbone gives for every view of every sample, computed once, on disk and in a bucket.

A store is a folder of chunks, ``PART-NUMBER.safetensors``. A chunk holds all views of some neighbouring
samples, and exists wholly or not at all; the same file lies on every node's disk, where it is mapped into
memory, and in the bucket.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from job import storage
from job.data.dataset import Batch, ImageDataset
from job.data.index import Index
from job.data.order import BatchPlan
from job.data.source import room_needed

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
    """

    def __init__(self, dataset: ImageDataset, folder: Path, uri: str) -> None:
        self.dataset = dataset
        self.index = dataset.index
        assert dataset.view.count is not None, "a sample has pictures without end"
        self.views = dataset.view.count
        self.folder = folder
        self.uri = uri
        self.chunk_size = max(CHUNK_SAMPLES, -(-len(self.index) // MOST_CHUNKS))
        self._raw: list[npt.NDArray[np.uint8]] = []  # [samples, views, bytes]: numpy knows no bfloat16
        self._dtype = torch.float32
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
        ours = {self._name(chunk): chunk for chunk in range(len(self))}
        return {ours[entry.key] for entry in storage.list_files(self.uri) if entry.key in ours}

    def on_disk(self) -> set[int]:
        """Chunks that lie on this node, their checksums verified; a damaged one is removed."""
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
        metadata = {"bad": json.dumps(bad), "crc32": str(_checksum(tensors))}
        self._write(chunk, safetensors.torch.save(tensors, metadata))

    def publish(self, chunk: int) -> None:
        """Upload a chunk."""
        storage.upload(self._path(chunk), storage.join(self.uri, self._name(chunk)))

    def fetch(self, chunk: int) -> bool:
        """Download a chunk; False if it turned out to be damaged, and was removed from the bucket."""
        uri = storage.join(self.uri, self._name(chunk))
        self._write(chunk, storage.read_bytes(uri))
        if self._is_sound(chunk):
            return True
        storage.remove(uri)
        return False

    def open(self) -> list[str]:
        """Map all chunks; returns a line for each unreadable sample, as a batch's ``bad``."""
        self._raw, self._bad = [], {}
        valid = []
        for chunk in range(len(self)):
            with safetensors.safe_open(self._path(chunk), framework="pt") as file:
                features = file.get_tensor("features")
                self._raw.append(features.view(torch.uint8).numpy())
                self._dtype = features.dtype
                valid.append(file.get_tensor("valid"))
                self._bad |= {int(sample): line for sample, line in json.loads(file.metadata()["bad"]).items()}
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

    def _write(self, chunk: int, content: bytes) -> None:
        with room_needed(self.folder, "keep the backbone's features"):
            storage.write_bytes(str(self._path(chunk)), content)

    def _name(self, chunk: int) -> str:
        return f"{self.index.part}-{chunk:06d}.safetensors"

    def _path(self, chunk: int) -> Path:
        return self.folder / self._name(chunk)

    def _is_sound(self, chunk: int) -> bool:
        path = self._path(chunk)
        if not path.exists():
            return False
        if chunk in self._sound:
            return True
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("features", "valid")}
                if _checksum(tensors) == int(file.metadata()["crc32"]):
                    self._sound.add(chunk)
                    return True
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError):
            pass
        log.warning("%s is damaged and is computed or fetched again", path)
        path.unlink(missing_ok=True)
        return False


def content_hash(index: Index) -> str:
    """What tells an index from another by the places and versions of its samples."""
    sources = hashlib.sha256(repr([(source.uri, source.version) for source in index.sources]).encode())
    with (Path(index.folder) / f"{index.part}.arrow").open("rb") as file:
        return hashlib.file_digest(file, lambda: sources).hexdigest()


def weights_hash(backbone: torch.nn.Module) -> str:
    """What tells a backbone's weights, and the names they have, from others."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(_raw(tensors[name]), checksum)
    return checksum


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
