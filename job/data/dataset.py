"""Batches from batch plans: fetch together, decode, resize, augment; uint8 on the way out."""

from __future__ import annotations

import io
import random
import warnings
from typing import Literal, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from job import storage
from job.data.index import Index
from job.data.order import BatchPlan, sample_seed
from job.errors import ConfigError, DataError, JobError

ResizeMode = Literal["squash", "crop"]


class Batch(TypedDict):
    """One rank's share of a global batch of B samples.

    Keys:
        image: uint8 [B, 3, S, S], RGB.
        label: int64 [B]; -1 where there is none.
        mask: bool [B]; False for a padded or unreadable sample, which must count for nothing.
        sample: int64 [B], sample ids.
        global_size: samples of the whole global batch, the divisor of its mean loss.
        bad: one line for each unreadable sample: its URI and the cause.
        error: what kept the whole batch from being read. A worker process reports it as data,
            since an exception would reach the user wrapped in the worker's traceback.
    """

    image: Tensor
    label: Tensor
    mask: Tensor
    sample: Tensor
    global_size: int
    bad: list[str]
    error: str


class ImageDataset(Dataset[Batch]):
    """Reads what a :class:`~job.data.order.BatchPlan` names.

    The augmentation of a sample depends on (seed, epoch, sample id) alone.

    Args:
        transform: turns uint8 [3, H, W] into uint8 [3, image_size, image_size].
    """

    def __init__(self, index: Index, transform: torch.nn.Module, *, image_size: int, seed: int = 0) -> None:
        self.index = index
        self.transform = transform
        self.image_size = image_size
        self.seed = seed

    def __getitem__(self, plan: BatchPlan) -> Batch:
        batch = Batch(
            image=torch.zeros(len(plan.samples), 3, self.image_size, self.image_size, dtype=torch.uint8),
            label=torch.tensor([self.index.labels[i] for i in plan.samples]),
            mask=torch.from_numpy(plan.valid.copy()),
            sample=torch.from_numpy(plan.samples),
            global_size=plan.global_size,
            bad=[],
            error="",
        )
        try:
            self._read_into(batch, plan)
        except JobError as error:
            batch["error"] = str(error)
        return batch

    def _read_into(self, batch: Batch, plan: BatchPlan) -> None:
        contents = storage.read_many(self.index.root, [self.index.keys[i] for i in plan.samples])
        for row, (sample, content) in enumerate(zip(plan.samples.tolist(), contents, strict=True)):
            try:
                image = decode(content)
            except DataError as error:
                if batch["mask"][row]:
                    batch["bad"].append(f"{self.index.uri(sample)} {error}")
                batch["mask"][row] = False
            else:
                batch["image"][row] = self._transform(image, plan.epoch, sample)

    def _transform(self, image: Tensor, epoch: int, sample: int) -> Tensor:
        # torchvision draws from the process's generators: seed them for this sample, then put them back.
        numpy_state, python_state = np.random.get_state(), random.getstate()
        with torch.random.fork_rng(devices=[]):
            seed = sample_seed(self.seed, epoch, sample)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            out: Tensor = self.transform(image)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        expected = (3, self.image_size, self.image_size)
        if out.shape != expected or out.dtype != torch.uint8:
            raise ConfigError(
                f"--data.augment returned {out.dtype} {tuple(out.shape)} where uint8 {expected} is needed: end it "
                "with a resize or crop to --data.image_size, and leave normalisation to the model."
            )
        return out


def resize_transform(image_size: int, mode: ResizeMode) -> v2.Compose:
    """uint8 [3, H, W] to uint8 [3, image_size, image_size], bilinear, antialiased.

    ``squash`` ignores the aspect ratio (the tutorial's ``Resize((224, 224))``); ``crop`` resizes the
    shorter side and takes the centre.
    """
    if mode == "squash":
        return v2.Compose([v2.Resize([image_size, image_size], antialias=True)])
    return v2.Compose([v2.Resize([image_size], antialias=True), v2.CenterCrop([image_size])])


def decode(content: bytes) -> Tensor:
    """An encoded image as uint8 [3, H, W], RGB, upright by its EXIF orientation.

    Transparency is laid on white; 16-bit greyscale is scaled to 8 bits.

    Raises:
        DataError: empty, not an image, truncated, or a decompression bomb.
    """
    if not content:
        raise DataError("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                image = ImageOps.exif_transpose(opened)
                pixels = np.asarray(_to_rgb(image))
    except UnidentifiedImageError as error:
        raise DataError(f"is no image of a known format (it starts with {content[:12]!r})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"is refused as a decompression bomb: more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise DataError(f"is damaged: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # Pillow clips instead of scaling.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
