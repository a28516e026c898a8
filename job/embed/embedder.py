"""A frozen backbone that computes one vector per image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from job.data.augment import ResizeMode
from job.data.dataset import Preprocessing
from job.data.pixels import MAX_IMAGE_PIXELS
from job.errors import DivergedError
from job.features.key import weights_hash
from job.features.network import bare_backbone
from job.model.classifier import Classifier
from job.model.pooling import Pooling
from job.predict.precision import Precision, automatic_precision
from job.predict.predictor import load

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Embedding:
    """The vector of one image.

    Attributes:
        vector: float32 [F].
    """

    vector: Vectors

    def as_json(self) -> dict[str, Any]:
        """The entries of a JSON line."""
        return {"vector": [float(f"{value:.9g}") for value in self.vector.tolist()]}


class Embedder:
    """A backbone and the preprocessing that it was evaluated with.

    Args:
        net: the network, whose head is not used, on the device that computes.
        resize: how images are made square.
        max_image_pixels: height times width of the largest image to decode.
        precision: "bf16" computes by autocast, "fp32" in float32.

    Attributes:
        width: F, the number of features per image.
        fingerprint: 16 hexadecimal digits that are the same for the same backbone, weights and preprocessing.
    """

    def __init__(
        self,
        net: Classifier,
        resize: ResizeMode,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        precision: Precision = "fp32",
    ) -> None:
        self.net = net.eval()
        self.precision: Precision = precision
        self.preprocessing = Preprocessing(net.image_size, resize, max_image_pixels=max_image_pixels)
        spec = net.spec()
        parts: tuple[object, ...] = (
            net.name,
            weights_hash(net.backbone),
            spec["mean"],
            spec["std"],
            net.image_size,
            resize,
        )
        if net.pooling != "auto":  # others keep the fingerprint of earlier releases
            parts += (net.pooling,)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        size = net.image_size
        self.width = int(self.features(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1])

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return self.net.mean.device

    @property
    def row_fields(self) -> dict[str, Any]:
        """Entries that all rows with a vector have."""
        return {"model": self.fingerprint}

    def features(self, images: Tensor) -> Tensor:
        """Features, float [B, F] on :attr:`device`, of prepared images, uint8 [B, 3, S, S].

        On CUDA this does not wait for the device.
        """
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.net.features(images)

    def vectors(self, features: Tensor) -> Vectors:
        """Features as float32 [B, F] in host memory.

        Raises:
            DivergedError: they are not finite.
        """
        vectors: Vectors = features.float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise DivergedError("the backbone's features are not finite: use other weights, or --precision fp32.")
        return vectors

    def predict_batch(self, images: Tensor) -> Sequence[Embedding]:
        """Embeddings of prepared images, uint8 [B, 3, S, S].

        Raises:
            DivergedError: they are not finite.
        """
        return [Embedding(vector) for vector in self.vectors(self.features(images))]


def of_checkpoint(uri: str, max_image_pixels: int, precision: Literal["auto"] | Precision) -> Embedder:
    """The backbone of a checkpoint or of a run's best one, with the preprocessing that it was evaluated with."""
    predictor = load(uri)
    return Embedder(predictor.net, predictor.resize, max_image_pixels, _precision(predictor.net, precision))


def of_backbone(
    name: str,
    weights: str,
    *,
    pooling: Pooling,
    image_size: int,
    resize: ResizeMode,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    max_image_pixels: int,
    precision: Literal["auto"] | Precision,
) -> Embedder:
    """A pretrained backbone; see :func:`job.features.network.bare_backbone`."""
    net = bare_backbone(name, weights, pooling=pooling, image_size=image_size, mean=mean, std=std)
    return Embedder(net, resize, max_image_pixels, _precision(net, precision))


def _precision(net: Classifier, chosen: Literal["auto"] | Precision) -> Precision:
    return automatic_precision(net.mean.device) if chosen == "auto" else chosen
