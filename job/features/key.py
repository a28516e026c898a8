"""Name of a set of cached features: a hash of everything that they depend on."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from job.data.dataset import Preprocessing
from job.data.index.index import Index
from job.features.transform_hash import transform_hash
from job.model.classifier import Classifier
from job.model.lora import merged_state


def feature_key(
    net: Classifier,
    weights: str,
    content: str,
    preprocessing: Preprocessing,
    *,
    seed: int,
    precision: str,
    compiled: bool = False,
    device: str | None = None,
) -> str:
    """The name of a folder of features: 20 hexadecimal digits.

    Args:
        net: the network, on the device that computes.
        weights: hash of its backbone's weights, by :func:`weights_hash`.
        content: hash of the samples, by :func:`content_hash`.
        preprocessing: of the samples.
        seed: of the augmentation.
        precision: Lightning's name of it.
        compiled: the backbone is compiled by torch.compile.
        device: kind of the device that computes. Default: torch's type of it.
    """
    spec = net.spec()
    values: tuple[object, ...] = (
        weights,
        content,
        spec["mean"],
        spec["std"],
        preprocessing.cache_key,
        seed if preprocessing.augment is not None else None,
        precision,
        compiled,
        device or net.mean.device.type,
        str(net.memory_format),
        torch.__version__,
    )
    if net.pooling != "auto":
        values += (net.pooling,)
    if preprocessing.augment is not None:  # features of other preprocessing keep the key of earlier releases
        values += (transform_hash(preprocessing.augment),)
    return hashlib.sha256(repr(values).encode()).hexdigest()[:20]


def content_hash(index: Index) -> str:
    """Hash of the places and versions of an index's samples."""
    sources = [(source.uri, source.version) for source in index.sources]
    return hashlib.sha256(repr((sources, index.info.sha256)).encode()).hexdigest()


def weights_hash(backbone: torch.nn.Module) -> str:
    """Hash of a backbone's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in merged_state(backbone).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
