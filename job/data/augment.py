"""Resizing and seeded augmentation of a sample's pixels."""

from __future__ import annotations

import contextlib
import math
import platform
import random
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from job.data.pixels import Pixels
from job.torch_internals import resize_bytes

ResizeMode = Literal["squash", "crop"]


CROP_FIRST_RATIO = 64
"""Ratio of the sides above which only the part of an image that ``crop`` keeps is resized."""
LONG_SIDE = 65_535
"""Side, in pixels, above which an image is averaged before it is resized: the weights of a resize grow with it."""
_RESIZES_BYTES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in (
    "aarch64",
    "arm64",
)
"""Whether torchvision resizes uint8 as such on this CPU; on others it converts to float and back."""


def resize_into(out: Tensor, pixels: Pixels, mode: ResizeMode, *, flip: bool = False) -> None:
    """:func:`resize` into an image of a batch, with few calls that take the GIL.

    torchvision's function makes nine calls that release the GIL and take it again, this one three. Between them the
    thread may wait for all others.

    Args:
        out: uint8 [1, 3, image_size, image_size], channels last in memory.
        pixels: uint8 [H, W, 3].
        mode: as of :func:`resize`.
        flip: flip horizontally after resizing.
    """
    height, width, _ = pixels.shape
    image_size = out.shape[3]
    if not _RESIZES_BYTES or _is_oblong(height, width, mode):
        image = resize(torch.from_numpy(pixels).permute(2, 0, 1), image_size, mode)[None]
    else:
        # From a view of the shape [1, H, W, 3], torch knows that channels are last: it would copy the pixels otherwise.
        image = torch.from_numpy(pixels.reshape(1, height, width, 3).transpose(0, 3, 1, 2))
        size = _resized(height, width, image_size, mode)
        if size != (height, width):
            if size == (image_size, image_size) and not flip:
                resize_bytes(image, size, out)
                return
            image = resize_bytes(image, size)
        if size != (image_size, image_size):
            top, left = (round((side - image_size) / 2) for side in size)  # as torchvision's center_crop
            image = image[:, :, top : top + image_size, left : left + image_size]
    out.copy_(image.flip(3) if flip else image)


def _is_oblong(height: int, width: int, mode: ResizeMode) -> bool:
    """Whether :func:`resize` takes a detour."""
    shorter, longer = sorted((height, width))
    return longer > (CROP_FIRST_RATIO * shorter if mode == "crop" else LONG_SIDE)


def _resized(height: int, width: int, image_size: int, mode: ResizeMode) -> tuple[int, int]:
    """Height and width after resizing, before the centre is cropped, as torchvision rounds them."""
    if mode == "squash":
        return image_size, image_size
    longer = int(image_size * max(height, width) / min(height, width))
    return (longer, image_size) if width <= height else (image_size, longer)


def resize(image: Tensor, image_size: int, mode: ResizeMode) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, image_size, image_size], bilinear, antialiased.

    ``squash`` ignores the aspect ratio (the tutorial's ``Resize((224, 224))``); ``crop`` resizes the
    shorter side and takes the centre.
    """
    shorter, longer = sorted(image.shape[1:])
    if mode == "crop" and longer > CROP_FIRST_RATIO * shorter:
        return _cropped(image, image_size)
    if mode == "squash" and longer > LONG_SIDE:
        factors = [max(side // (4 * image_size), 1) if side > LONG_SIDE else 1 for side in image.shape[:0:-1]]
        image = _tensor(_pillow(image).reduce((factors[0], factors[1])))
    size = [image_size, image_size] if mode == "squash" else [image_size]
    resized: Tensor = functional.resize(image, size, antialias=True)
    return resized if mode == "squash" else functional.center_crop(resized, [image_size, image_size])


def _cropped(image: Tensor, image_size: int) -> Tensor:
    """Resize only what ``crop`` keeps, by the same weights.

    The whole image, resized, may be thousands of times larger than its centre.
    """
    axis = 1 if image.shape[1] > image.shape[2] else 2
    shorter, longer = sorted(image.shape[1:])
    whole = int(image_size * longer / shorter)  # as torchvision rounds them
    start = round((whole - image_size) / 2)
    scale = longer / whole
    margin = math.ceil(max(scale, 1.0)) + 1  # pixels outside of the window have a weight, too
    first = max(int(start * scale) - margin, 0)
    last = min(math.ceil((start + image_size) * scale) + margin, longer)
    low, high = start * scale - first, min((start + image_size) * scale - first, last - first)
    box = (low, 0, high, shorter) if axis == 2 else (0, low, shorter, high)
    window = image.narrow(axis, first, last - first)
    return _tensor(_pillow(window).resize((image_size, image_size), Image.Resampling.BILINEAR, box=box))


def _pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def seeded(transform: v2.Transform, image: Tensor, seed: int) -> Tensor:
    """``transform(image)`` with random draws that depend only on ``seed``; call it within :func:`own_generators`."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would take 2 ms, and memory, for absent GPUs
    random.seed(seed)
    np.random.seed(seed % 2**32)
    out: Tensor = transform(image)
    return out


@contextlib.contextmanager
def own_generators() -> Iterator[None]:
    """Restore the process's generators, which torchvision draws from, at the end of the context."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        yield
    np.random.set_state(numpy_state)
    random.setstate(python_state)
