"""Kinds of images that Python code holds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from job import storage
from job.data.decode import decode
from job.data.python_images import is_one_image, pixels_of, pixels_of_each
from job.errors import DataError, StorageError

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated_jpeg() -> bytes:
    """40 x 32 pixels that are to be shown as 32 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)


def test_all_kinds_of_one_image_have_the_same_pixels(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(PIXELS))
    path = tmp_path / "image.png"
    path.write_bytes(content)
    storage.write_bytes("memory://python-images/image.png", content)
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    expected = decode(content)
    for image in (
        content,
        bytearray(content),
        io.BytesIO(content),
        path,
        str(path),
        path.as_uri(),
        "memory://python-images/image.png",
        Image.open(path),
        PIXELS,
        PIXELS.astype(np.float64) / 255,
        tensor,
        tensor.contiguous(),
        F.to_dtype(tensor, torch.float32, scale=True).requires_grad_(),
    ):
        assert is_one_image(image)  # type: ignore[arg-type]
        assert torch.equal(pixels_of(image), expected), type(image)  # type: ignore[arg-type]
    with path.open("rb") as file:
        assert torch.equal(pixels_of(file), expected)


def test_a_pillow_image_is_turned_upright_as_its_file_is() -> None:
    content = rotated_jpeg()
    opened = pixels_of(Image.open(io.BytesIO(content)))
    assert opened.shape == (3, 40, 32)
    assert torch.equal(opened, decode(content))


@pytest.mark.parametrize(
    "image",
    [
        PIXELS[:, :, 0],
        PIXELS[:, :, :1],
        torch.from_numpy(PIXELS[:, :, 0]),
        torch.from_numpy(PIXELS[:, :, 0])[None],
        Image.fromarray(PIXELS[:, :, 0]),
    ],
    ids=["array [H, W]", "array [H, W, 1]", "tensor [H, W]", "tensor [1, H, W]", "Pillow L"],
)
def test_grey_becomes_rgb(image: Any) -> None:
    grey = torch.from_numpy(PIXELS[:, :, 0])
    assert torch.equal(pixels_of(image), grey.expand(3, -1, -1))


@pytest.mark.parametrize("is_tensor", [False, True])
def test_transparency_is_laid_on_white(is_tensor: bool) -> None:
    transparent = np.dstack([PIXELS, np.zeros((32, 40), np.uint8)])
    image = torch.from_numpy(transparent).permute(2, 0, 1) if is_tensor else transparent
    assert torch.equal(pixels_of(image), torch.full((3, 32, 40), 255, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.transpose(2, 0, 1), r"shape \(3, 32, 40\) is no image .* channels come last in arrays"),
        (torch.from_numpy(PIXELS), r"shape \(32, 40, 3\) is no image .* channels come first in tensors"),
        (PIXELS.astype(np.int64), "array of int64 is no image: give uint8, or floats from 0 to 1"),
        (torch.from_numpy(PIXELS).permute(2, 0, 1).int(), "tensor of torch.int32 is no image"),
        (PIXELS.astype(np.float32), "floats from 0 to 255 are no image"),
        (torch.randn(3, 8, 8), "not yet normalised"),
        (torch.full((3, 8, 8), torch.nan), "floats from nan"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), "is no image"),
        (np.zeros((2, 2, 2, 2, 3), np.uint8), "is no image"),
        (b"", "an encoded image is empty"),
        (b"no image at all", "no image of a known format"),
        (io.StringIO("text"), "type StringIO is no image"),
        (5, "type int is no image"),
        (None, "type NoneType is no image"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(image: Any, message: str) -> None:
    assert is_one_image(image)
    with pytest.raises(DataError, match=message):
        pixels_of(image)


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder.*job predict --input"):
        pixels_of(tmp_path)
    with pytest.raises(StorageError, match=r"absent\.jpg"):
        pixels_of(tmp_path / "absent.jpg")


def test_a_truncated_file_is_refused_however_it_is_given() -> None:
    content = rotated_jpeg()[:900]
    for image in (content, Image.open(io.BytesIO(content))):
        with pytest.raises(DataError, match="damaged"):
            pixels_of(image)


def test_one_of_several_is_named_by_its_number() -> None:
    with pytest.raises(DataError, match="image 1: an array of int64"):
        list(pixels_of_each([PIXELS, PIXELS.astype(np.int64)]))
    batch = np.stack([PIXELS, PIXELS])
    assert not is_one_image(batch)  # type: ignore[arg-type]
    assert [tuple(each.shape) for each in pixels_of_each(batch)] == [(3, 32, 40)] * 2
