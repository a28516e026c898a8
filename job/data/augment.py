"""Resizing and seeded augmentation of a sample's pixels."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

ResizeMode = Literal["squash", "crop"]


def resize(image: Tensor, image_size: int, mode: ResizeMode) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, image_size, image_size], bilinear, antialiased.

    ``squash`` ignores the aspect ratio (the tutorial's ``Resize((224, 224))``); ``crop`` resizes the
    shorter side and takes the centre.
    """
    size = [image_size, image_size] if mode == "squash" else [image_size]
    resized: Tensor = functional.resize(image, size, antialias=True)
    return resized if mode == "squash" else functional.center_crop(resized, [image_size, image_size])


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
