"""From an encoded image to pixels, as fast as libjpeg-turbo goes."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from job.errors import DataError

ORIENTED = (b"Exif\0\0", b"tiff:Orientation")
"""What a JPEG's header has if it may say how the image stands."""
START_OF_SCAN = b"\xff\xda"
EXIF_ORIENTATION = 0x0112
SCALES = (8, 4, 2)
"""Denominators at which libjpeg-turbo decodes faster than in full; 3/8, 5/8 and the like are slower."""


def decode(content: bytes, at_least: int = 0) -> Tensor:
    """An encoded image as uint8 [3, H, W], RGB, upright by its EXIF orientation.

    Transparency is laid on white; 16-bit greyscale is scaled to 8 bits.

    Args:
        at_least: a JPEG may come out at 1/2, 1/4 or 1/8 of its size, by a scaled inverse DCT, as long as
            neither side falls below this many pixels; 0: at its full size, equal to Pillow's bit for bit.

    Raises:
        DataError: empty, not an image, truncated, or a decompression bomb.
    """
    if not content:
        raise DataError("is empty (0 bytes)")
    if content.startswith(b"\xff\xd8"):
        pixels = _jpeg(content, at_least)
        if pixels is not None:
            return torch.from_numpy(pixels).permute(2, 0, 1)
    return _by_pillow(content)


def _jpeg(content: bytes, at_least: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]] | None:
    """uint8 [H, W, 3], or None for what Pillow should look at: damage, CMYK, an orientation it knows better."""
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(content)
        _refuse_bomb(width * height)
        if colourspace not in ("YCbCr", "Gray", "RGB"):
            return None
        header_end = content.find(START_OF_SCAN)
        if any(content.find(sign, 0, header_end) >= 0 for sign in ORIENTED) and _orientation(content) != 1:
            return None
        scale = next((d for d in SCALES if at_least and min(height, width) >= d * at_least), 1)
        smallest = {"min_height": -(-height // scale), "min_width": -(-width // scale)} if scale > 1 else {}
        pixels: np.ndarray[tuple[int, int, int], np.dtype[np.uint8]] = simplejpeg.decode_jpeg(
            content, "RGB", **smallest
        )
        return pixels
    except ValueError:
        return None


def _orientation(content: bytes) -> int:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError):
        return 0


def _by_pillow(content: bytes) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                _refuse_bomb(opened.width * opened.height)
                image = ImageOps.exif_transpose(opened)
                pixels = np.asarray(_to_rgb(image))
    except UnidentifiedImageError as error:
        raise DataError(f"is no image of a known format (it starts with {content[:12]!r})") from error
    except Image.DecompressionBombError as error:
        raise _bomb() from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise DataError(f"is damaged: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _refuse_bomb(pixels: int) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise _bomb()


def _bomb() -> DataError:
    return DataError(f"is refused as a decompression bomb: more than {Image.MAX_IMAGE_PIXELS:,} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # Pillow clips instead of scaling.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
