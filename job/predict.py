"""Classify images with a checkpoint, from Python or from the command line."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from job import checkpoint, redact, storage
from job.checkpoint.state import CLASSIFIER_KEY
from job.cluster import ranks
from job.data.augment import ResizeMode, resize
from job.data.dataset import ImageDataset, View
from job.data.decode import decode
from job.data.index.access import from_options
from job.data.index.build import build
from job.data.index.index import Index
from job.data.loader import BatchLoader
from job.data.sampler import BatchOrder
from job.errors import ConfigError, DataError
from job.model.classifier import Classifier, from_spec, mean_over_mirrored
from job.model.spec import decode_spec, net_state
from job.model.task import probabilities
from job.process.terminal import print_table, say
from job.storage.local_cache import default_cache_dir, usable_cache_dir

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ROWS_SHOWN = 20
"""Predictions shown on the terminal; all of them go to --output."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        label: name of the most probable class.
        probabilities: probability by class name, summing to 1.
    """

    label: str
    probabilities: dict[str, float]


class Predictor:
    """A trained network and the preprocessing it was evaluated with; see :func:`load`.

    Attributes:
        mirror: average what is said of each image and of its mirror image.
    """

    def __init__(self, net: Classifier, resize: str) -> None:
        self.net = net.eval()
        self.mirror = False
        self.resize: ResizeMode = "crop" if resize == "crop" else "squash"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the network's outputs."""
        return self.net.classes

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.net.mean.device

    def predict(
        self, images: Iterable[bytes | str | Image.Image | npt.NDArray[np.uint8] | Tensor], batch_size: int = 32
    ) -> list[Prediction]:
        """Classify images.

        Args:
            images: each an encoded image (bytes), a URI or path, a Pillow image, a uint8 array [H, W, 3],
                or a uint8 tensor [3, H, W].
            batch_size: images at a time.

        Raises:
            DataError: one of them is no readable image.
        """
        found: list[Prediction] = []
        batch: list[Tensor] = []
        for image in images:
            image_size = self.net.image_size
            batch.append(resize(_to_tensor(image, image_size), image_size, self.resize))
            if len(batch) == batch_size:
                found += self.predict_batch(torch.stack(batch))
                batch = []
        return found + (self.predict_batch(torch.stack(batch)) if batch else [])

    @torch.inference_mode()
    def predict_batch(self, images: Tensor) -> list[Prediction]:
        """Classify prepared images, uint8 [B, 3, S, S]."""
        images = images.to(self.device)
        rows = probabilities(mean_over_mirrored(self.net, images) if self.mirror else self.net(images)).cpu()
        return [
            Prediction(self.classes[int(row.argmax())], dict(zip(self.classes, row.tolist(), strict=True)))
            for row in rows
        ]


def load(uri: str, device: str | None = None) -> Predictor:
    """The model at ``uri``: a checkpoint file, or a run_dir (its best checkpoint).

    Args:
        device: a torch device; default: CUDA where there is one, else the CPU.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    uri = checkpoint.resolve(redact.remember(uri))
    saved = checkpoint.load(uri)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    net = from_spec(saved[CLASSIFIER_KEY], net_state(saved, uri), source=uri, device_type=torch.device(device).type)
    return Predictor(net.to(device), decode_spec(saved[CLASSIFIER_KEY], uri).resize)


def main(
    ckpt: str,
    input: str,
    output: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    cache_dir: str | None = None,
    max_bad_samples: int = 0,
    mirror: bool = False,
    allow: str | list[str] | None = None,
) -> None:
    """Classify one image, a folder, an archive or everything under a bucket prefix.

    Args:
        ckpt: checkpoint file, or a run_dir, which means its best checkpoint.
        input: URI of an image, a folder or prefix, a .zip, .tar or .tar.gz, shards, or a manifest.
        output: URI of a JSON lines file to write: one object a readable image. With several processes
            (torchrun), each writes its part, ``….part-RANK-of-WORLD``.
        batch_size: images at a time.
        num_workers: loader processes.
        cache_dir: local folder for copies of archives that cannot be read in parts. Default: ~/.cache/job.
        max_bad_samples: unreadable images to tolerate; each is named, and past the limit the exit code says so.
        mirror: average what is said of each image and of its mirror image.
        allow: hosts and URI prefixes that a manifest may name although they are local or internal; a host or prefix,
            or a list of them.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch_size must be at least 1, not {batch_size}.")
    rank, world_size = ranks.rank(), ranks.world_size()
    access = from_options(allow, [input], "--allow")
    cache = str(usable_cache_dir(Path(cache_dir or default_cache_dir()).expanduser()))
    predictor = load(ckpt)
    predictor.mirror = mirror
    bad: list[str] = []
    lines: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        build({"all": [input]}, Path(folder), cache, "images", access=access)
        index = Index(folder, "all", access)
        for sample, prediction in _predict_index(predictor, index, batch_size, num_workers, cache, bad):
            lines.append({"uri": index.uri(sample), **asdict(prediction)})
    if rank == 0:
        _print_table(lines, predictor.classes)
    if output is not None:
        part = output if world_size == 1 else f"{output}.part-{rank:05d}-of-{world_size:05d}"
        storage.write_text(part, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        say(f"{len(lines)} predictions in {part}", file=sys.stderr)
    if len(bad) > max_bad_samples:
        shown = "\n  ".join(bad[:10])
        raise DataError(f"{len(bad)} image(s) could not be read, {max_bad_samples} allowed:\n  {shown}")


def _predict_index(
    predictor: Predictor, index: Index, batch_size: int, num_workers: int, cache_dir: str, bad: list[str]
) -> Iterator[tuple[int, Prediction]]:
    """(sample, prediction) of this rank's share; what cannot be read is added to ``bad``."""
    order = BatchOrder(
        len(index),
        batch_size * ranks.world_size(),
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        seed=0,
        shuffle=False,
    )
    view = View(predictor.net.image_size, predictor.resize)
    at_hand = any(storage.is_process_local(source.uri) for source in index.sources)
    for batch in BatchLoader(ImageDataset(index, order, view, cache_dir=cache_dir), 0 if at_hand else num_workers):
        if batch["error"] is not None:
            raise batch["error"]
        bad += batch["bad"]
        predictions = predictor.predict_batch(batch["image"])
        for sample, valid, prediction in zip(batch["sample"].tolist(), batch["mask"], predictions, strict=True):
            if valid:
                yield sample, prediction


def _print_table(lines: list[dict[str, object]], classes: Sequence[str]) -> None:
    rows = []
    for line in lines[:ROWS_SHOWN]:
        chances = line["probabilities"]
        assert isinstance(chances, dict)
        rows.append((line["uri"], line["label"], f"{chances[line['label']]:.4f}"))
    print_table(["image", "class", "probability"], rows, right=["probability"], fold=True)
    if len(lines) > ROWS_SHOWN:
        counts = {name: sum(line["label"] == name for line in lines) for name in classes}
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        say(f"… and {len(lines) - ROWS_SHOWN} more. In all: {told}")


def _to_tensor(image: bytes | str | Image.Image | npt.NDArray[np.uint8] | Tensor, at_least: int) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if isinstance(image, str):
        try:
            return decode(storage.read_bytes(image), at_least)
        except DataError as error:
            raise DataError(f"{image} {error}.") from error
    if isinstance(image, bytes):
        return decode(image, at_least)
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return decode(buffer.getvalue())
    return torch.from_numpy(image.copy()).permute(2, 0, 1)
