"""Pixels of the images that Python code holds: paths, files, Pillow images, arrays and tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from job import storage
from job.data.decode import decode, from_pillow
from job.data.pixels import MAX_IMAGE_PIXELS
from job.errors import DataError, StorageError

PythonImage = bytes | str | Path | IO[bytes] | Image.Image | npt.NDArray[Any] | Tensor
"""One image: an encoded image (bytes, or a file open for reading), a path or URI, a Pillow image, an array [H, W] or
[H, W, C], a tensor [C, H, W]. C is 1 (grey), 3 (RGB) or 4 (RGBA). Values are uint8, or floats from 0 to 1."""


def is_one_image(images: PythonImage | Iterable[PythonImage]) -> TypeGuard[PythonImage]:
    """Whether this is not several images; an array or tensor of four dimensions is a batch of them."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim != 4
    one = (bytes, bytearray, memoryview, str, os.PathLike, Image.Image)
    return isinstance(images, one) or hasattr(images, "read") or not isinstance(images, Iterable)


def pixels_of_each(
    images: Iterable[PythonImage], at_least: int = 0, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Iterator[Tensor]:
    """Yield uint8 [3, H, W] of each image; see :func:`pixels_of`.

    Raises:
        DataError: one of them is no readable image; the message says which.
    """
    for number, image in enumerate(images):
        try:
            yield pixels_of(image, at_least, max_image_pixels)
        except DataError as error:
            raise DataError(f"image {number}: {error}") from error


def pixels_of(image: PythonImage, at_least: int = 0, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Tensor:
    """uint8 [3, H, W] of one image, upright, transparency on white.

    Args:
        image: see :data:`PythonImage`.
        at_least: a large encoded image may come out reduced, as long as neither side falls below this many pixels.
        max_image_pixels: height times width of the largest encoded image.

    Raises:
        DataError: it is no readable image.
    """
    if isinstance(image, (str, os.PathLike)):
        return _from_uri(os.fspath(image), at_least, max_image_pixels)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    content = image.read() if hasattr(image, "read") else image
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise DataError(
            f"an object of type {type(image).__name__} is no image. Give a path or URI, the bytes of an image file, a "
            "Pillow image, an array or a tensor."
        )
    try:
        return decode(bytes(content), at_least, max_image_pixels)
    except DataError as error:
        raise DataError(f"an encoded image {error}.") from error


def _from_uri(uri: str, at_least: int, max_image_pixels: int) -> Tensor:
    try:
        return decode(storage.read_bytes(uri), at_least, max_image_pixels)
    except DataError as error:
        raise DataError(f"{uri} {error}.") from error
    except StorageError:
        filesystem, path = storage.filesystem(uri)
        if filesystem.isdir(path):
            raise DataError(
                f"{uri} is a folder. Give the images in it, or run python -m job predict --input {uri}."
            ) from None
        raise


def _from_pillow(image: Image.Image) -> Tensor:
    try:
        return from_pillow(image)
    except DataError as error:
        raise DataError(f"the Pillow image {error}.") from error


def _from_array(image: npt.NDArray[Any]) -> Tensor:
    if 0 in image.shape or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
        hint = " Transpose it: channels come last in arrays." if image.ndim == 3 and image.shape[0] in (1, 3) else ""
        raise DataError(f"an array of shape {image.shape} is no image [H, W] or [H, W, 3].{hint}")
    if image.dtype.kind == "f":
        image = _from_floats(torch.from_numpy(np.array(image, np.float32))).numpy()
    if image.dtype != np.uint8:
        raise DataError(f"an array of {image.dtype} is no image: give uint8, or floats from 0 to 1.")
    return _from_pillow(Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image))


def _from_tensor(image: Tensor) -> Tensor:
    image = image.detach().cpu()
    if 0 in image.shape or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in (1, 3, 4)):
        hint = " Permute it: channels come first in tensors." if image.ndim == 3 and image.shape[2] in (1, 3) else ""
        raise DataError(f"a tensor of shape {tuple(image.shape)} is no image [3, H, W].{hint}")
    if image.is_floating_point():
        image = _from_floats(image)
    if image.dtype != torch.uint8:
        raise DataError(f"a tensor of {image.dtype} is no image: give uint8, or floats from 0 to 1.")
    if image.ndim == 3 and image.shape[0] == 3:
        return image
    return _from_array((image if image.ndim == 2 else image.permute(1, 2, 0)).numpy())


def _from_floats(image: Tensor) -> Tensor:
    """uint8 of floats from 0 to 1, scaled as torchvision does."""
    low, high = (float(value) for value in image.aminmax())
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"floats from {low:.3g} to {high:.3g} are no image: give uint8, or floats from 0 to 1, not yet normalised."
        )
    scaled: Tensor = F.to_dtype(image, torch.uint8, scale=True)
    return scaled
