"""Validation images in TensorBoard's projector, by the features of the backbone."""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from job import storage
from job.data.augment import resize
from job.data.datamodule import image_data
from job.data.index.index import Index
from job.data.sampler import BatchIndices
from job.features.store import FeatureStore
from job.model.module import TransferLearningModel
from job.monitoring.drawing.canvas import jpeg
from job.monitoring.drawing.class_labels import class_labels, shortened
from job.monitoring.drawing.image_grid import join_labels
from job.monitoring.settings import MonitoringSettings
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger

log = logging.getLogger(__name__)

CONFIG = "projector_config.pbtxt"
"""The name by which TensorBoard finds the files."""
COMPONENTS = 50
"""Principal components of the features: t-SNE is commonly begun from as many (van der Maaten & Hinton, 2008)."""
SPRITE_SIZE = 48
"""Height and width of an image, in pixels: 5,000 of them fit into the 8192 x 8192 that a browser can show."""
SPRITE_BYTES = 1024
"""Limit on the JPEG of all images, per image."""
MOST_SECONDS = 300.0
"""Time after which the images that have been read by then are enough: other ranks wait for the end of the run."""
KEY_LENGTH = 120


@dataclass(frozen=True)
class Points:
    """Samples in the projector.

    Attributes:
        samples: sample ids, int64 [N].
        features: of the backbone, float32 [N, F].
        probabilities: of the classes, float32 [N, C].
        sprites: images, uint8 [N, 3, SPRITE_SIZE, SPRITE_SIZE].
    """

    samples: Tensor
    features: Tensor
    probabilities: Tensor
    sprites: Tensor


class Projector(Callback):
    """Writes the files of TensorBoard's projector beside the events, on rank 0, at the end of training.

    An error is logged, and ends nothing.

    Args:
        settings: how many images are shown.
        logger: whose folder the files are written to.
    """

    def __init__(self, settings: MonitoringSettings, logger: BucketTensorBoardLogger) -> None:
        self.settings = settings
        self.logger = logger

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the features, and write the files."""
        if not self.settings.projector or not trainer.is_global_zero:
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy) or pl_module.device.type == "xla":
            log.warning("there are no files for the projector: rank 0 alone cannot compute features on these devices")
            return
        try:
            self._write(trainer, cast("TransferLearningModel", pl_module))
        except Exception as error:
            log.warning("there are no files for the projector: %s: %s", type(error).__name__, error)

    def _write(self, trainer: pl.Trainer, module: TransferLearningModel) -> None:
        index = image_data(trainer).parts["val"]
        points = compute_points(trainer, module, spread_samples(len(index), self.settings.projector))
        count = len(points.samples)
        if count < 2:
            log.warning("there are no files for the projector: %d validation image(s) can be read", count)
            return
        names = [f"projector-{trainer.global_step:08d}-{kind}" for kind in ("vectors.tsv", "labels.tsv", "sprites.jpg")]
        contents = [vectors(points.features), label_table(module, index, points), sprite_sheet(points.sprites)]
        files = {**dict(zip(names, contents, strict=True)), CONFIG: configuration(*names)}  # last what names the others
        for file, content in files.items():
            storage.write_bytes(storage.join(self.logger.uri, file), content, self.logger.before_write)
        log.info("TensorBoard's projector shows %d validation images", count)


def configuration(tensors: str, labels: str, sprites: str) -> bytes:
    """The names of the files, as TensorBoard's ``ProjectorConfig`` (projector_config.proto) in text format."""
    return f"""embeddings {{
  tensor_name: "backbone features"
  tensor_path: "{tensors}"
  metadata_path: "{labels}"
  sprite {{
    image_path: "{sprites}"
    single_image_dim: {SPRITE_SIZE}
    single_image_dim: {SPRITE_SIZE}
  }}
}}
""".encode()


def spread_samples(size: int, most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` sample ids of ``size``, evenly spread over classes, which are neighbours in an index.

    Their order is random, and the same each time: a part of them is evenly spread, too.
    """
    chosen = np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))
    return np.random.default_rng(0).permutation(chosen)


def compute_points(trainer: pl.Trainer, module: TransferLearningModel, samples: npt.NDArray[np.int64]) -> Points:
    """Read images, and compute their features, unless they are cached, on this rank.

    Args:
        trainer: whose precision is used.
        module: whose network computes, by the weights that are in it.
        samples: sample ids of the validation part, int64 [N].

    Raises:
        JobError: the images cannot be read.
    """
    data, net, began = image_data(trainer), module.net, time.monotonic()
    cached, was_training = data.features.get("val"), module.training
    batch_size = min(max(data.global_batch_size // trainer.world_size, 1), len(samples))
    parts: list[tuple[Tensor, ...]] = []
    module.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for batch in data.selected_loader("val", samples, batch_size):
                if batch["error"] is not None:
                    raise batch["error"]
                readable = batch["mask"]
                ids, images = batch["sample"][readable], batch["image"][readable]
                if not len(ids):
                    continue
                features = net.features(images.to(module.device)) if cached is None else _cached(cached, ids)
                probabilities = module.task.probabilities(net.head(features.to(module.device)))
                sprites = torch.stack([resize(image, SPRITE_SIZE, "squash") for image in images])
                parts.append((ids, features.float().cpu(), probabilities.float().cpu(), sprites))
                if time.monotonic() - began > MOST_SECONDS:
                    log.info(
                        "the projector has fewer images than wanted: reading them takes longer than %.0f s",
                        MOST_SECONDS,
                    )
                    break
    finally:
        module.train(was_training)
    if not parts:
        return Points(torch.empty(0), torch.empty(0, 0), torch.empty(0, 0), torch.empty(0))
    return Points(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def vectors(features: Tensor) -> bytes:
    """The first principal components of features, float [N, F], as tab-separated values."""
    centred = torch.nan_to_num(features - features.mean(0))
    if centred.shape[1] > COMPONENTS:
        _, axes = torch.linalg.eigh(centred.T @ centred)  # in the order of their variance, the largest last
        centred = centred @ axes[:, -COMPONENTS:].flip(1)
    buffer = io.BytesIO()
    np.savetxt(buffer, centred.numpy(), fmt="%.5g", delimiter="\t")
    return buffer.getvalue()


def label_table(module: TransferLearningModel, index: Index, points: Points) -> bytes:
    """True and predicted classes of each sample, and its name, as tab-separated values with a header."""
    labels, samples = class_labels(module.net.classes), points.samples.numpy()
    if index.has_several_labels:
        thresholds = torch.tensor(module.metrics.thresholds or [0.5] * len(labels))
        true, decided = torch.from_numpy(index.multi_hot_of(samples)) > 0, points.probabilities >= thresholds
        rows, chosen = ([_names(row, labels) for row in each] for each in (true, decided))
        right = (true == decided).all(dim=1).tolist()
        confidences = [""] * len(rows)
    else:
        rows = [labels[number] for number in index.labels_of(samples).tolist()]
        confidence, predicted = points.probabilities.max(dim=1)
        right = (predicted.numpy() == index.labels_of(samples)).tolist()
        chosen = [labels[number] for number in predicted.tolist()]
        confidences = [f"{value:.3f}" for value in confidence.tolist()]
    keys = [shortened(row.key, KEY_LENGTH) for row in index.rows(samples.tolist())]
    answers = ["yes" if each else "no" for each in right]
    lines = ["\t".join(cells) for cells in zip(rows, chosen, answers, confidences, keys, strict=True)]
    return "\n".join(["class\tpredicted\tright\tconfidence\tfile", *lines, ""]).encode()


def sprite_sheet(sprites: Tensor) -> bytes:
    """Images, uint8 [N, 3, S, S], in rows of a square, as a JPEG."""
    columns = math.ceil(math.sqrt(len(sprites)))
    sheet = torch.zeros(columns * columns, *sprites.shape[1:], dtype=torch.uint8)
    sheet[: len(sprites)] = sprites
    side = columns * sprites.shape[-1]
    pixels = sheet.reshape(columns, columns, *sprites.shape[1:]).permute(0, 3, 1, 4, 2).reshape(side, side, 3)
    return jpeg(Image.fromarray(pixels.numpy()), max(SPRITE_BYTES * len(sprites), 64 << 10))


def _cached(store: FeatureStore, samples: Tensor) -> Tensor:
    ids = samples.numpy()
    features: Tensor = store.batch(BatchIndices(0, 0, ids, np.ones(len(ids), np.bool_), len(ids)))["features"]
    return features


def _names(row: Tensor, labels: Sequence[str]) -> str:
    return join_labels([labels[number] for number in row.nonzero()[:, 0].tolist()])
