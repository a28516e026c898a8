"""Decode images; JPEGs by libjpeg-turbo, scaled while decoding."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import struct
import threading
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch

# A plugin registers its format when it is imported; Pillow itself would import all of its plugins for these.
from PIL import (
    AvifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    MpoImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)
from torch import Tensor

from job.data.index.magic import AVIF_BRANDS, HEIF_BRANDS
from job.data.metadata import jpeg_orientation, orientation, without_metadata
from job.data.pixels import MAX_IMAGE_PIXELS, Pixels, is_large, to_rgb
from job.errors import DataError

FORMATS = (
    "JPEG",
    "PNG",
    WebPImagePlugin.WebPImageFile.format,
    "GIF",
    "BMP",
    TiffImagePlugin.TiffImageFile.format,
    "PPM",
    AvifImagePlugin.AvifImageFile.format,
    Jpeg2KImagePlugin.Jpeg2KImageFile.format,
)
"""Formats that Pillow may decode. Its EPS, WMF, FITS and HDF5 plugins start programs or call other plugins."""
SCALES = (8, 4, 2)
"""Denominators at which libjpeg-turbo decodes faster than in full; 3/8, 5/8 and the like are slower."""
OTHER_CONTENT = (
    (b"%PDF", "a PDF file"),
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "an EPS file"),
    (b"8BPS", "a Photoshop file"),
    (b"SIMPLE  =", "a FITS file"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG file"),
    (b"<?xml", "an XML file"),
)
"""Beginnings, in lower case where it is text, of files that are often found in place of images."""
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
"""Beginnings of files that are images, however damaged."""
TILE_WIDTH, TILE_HEIGHT = 322, 323
_HEIF = "HEIF"
_ISO_FILE = b"ftyp"
_NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)
"""Exceptions by which Pillow's plugins decline a file."""

_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
"""How to turn uint8 [H, W, 3] upright, by EXIF orientation."""

_one_large = threading.Lock()
"""Held while a large image is decoded: the memory of a process is that of one of them, however many threads it has."""
_NOT_ALONE = contextlib.nullcontext()

Image.preinit()
# warnings.catch_warnings is not safe in threads. Odd metadata is no reason to warn, and sizes are checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageTooLarge(DataError):
    """An image of more pixels than allowed, which was not decoded."""


def decode(content: bytes, at_least: int = 0, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Tensor:
    """:func:`decode_pixels` as a tensor, uint8 [3, H, W]."""
    return torch.from_numpy(decode_pixels(content, at_least, max_image_pixels)).permute(2, 0, 1)


def decode_pixels(content: bytes, at_least: int = 0, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Pixels:
    """An encoded image as uint8 [H, W, 3], RGB, upright by its EXIF orientation.

    Transparency is laid on white; see :func:`job.data.pixels.to_rgb` for more than 8 bits. Malformed metadata is
    ignored.

    Args:
        content: the file.
        at_least: a JPEG may come out at 1/2, 1/4 or 1/8 of its size, by a scaled inverse DCT, as long as
            neither side falls below this many pixels, and another image of more than 89 million pixels reduced;
            0: at its full size, equal to Pillow's bit for bit.
        max_image_pixels: pixels of the largest image to decode.

    Raises:
        DataError: empty, not an image or truncated; ImageTooLarge: a decompression bomb. No other exception is raised.
    """
    if not content:
        raise DataError("is empty (0 bytes)")
    try:
        pixels = _jpeg(content, at_least, max_image_pixels) if content.startswith(b"\xff\xd8") else None
        return _by_pillow(content, at_least, max_image_pixels) if pixels is None else pixels
    except DataError:
        raise
    except Exception as error:  # a decoder may raise anything, and one image must not end the run
        raise _damaged(content, error) from error


def from_pillow(image: Image.Image) -> Tensor:
    """A Pillow image as uint8 [3, H, W], as :func:`decode` returns that of its file.

    Raises:
        DataError: its file is damaged, or it has no finite value.
    """
    try:
        return torch.from_numpy(_turned(to_rgb(image), orientation(image))).permute(2, 0, 1)
    except DataError:
        raise
    except Exception as error:  # reads the rest of the file
        raise _damaged(b"", error) from error


def _jpeg(content: bytes, at_least: int, max_image_pixels: int) -> Pixels | None:
    """uint8 [H, W, 3]; None for files that Pillow should decode: damaged ones and CMYK."""
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(content)
        _refuse_bomb(width, height, max_image_pixels)
        if colourspace not in ("YCbCr", "Gray", "RGB"):
            return None
        scale = 1
        if at_least and min(height, width) >= SCALES[-1] * at_least:
            scale = next(scale for scale in SCALES if min(height, width) >= scale * at_least)
        smallest = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
        with _alone(width // scale, height // scale):
            pixels: Pixels = simplejpeg.decode_jpeg(content, "RGB", False, False, *smallest)
    except ValueError:
        return None
    return _turned(pixels, jpeg_orientation(content))


def _turned(pixels: Pixels, by: int) -> Pixels:
    return np.ascontiguousarray(_UPRIGHT[by](pixels)) if by in _UPRIGHT else pixels


def _by_pillow(content: bytes, at_least: int, max_image_pixels: int) -> Pixels:
    try:
        return _read(content, at_least, max_image_pixels)
    except DataError:
        raise
    except Exception:
        pixels_only = without_metadata(content)
        if pixels_only is None or pixels_only == content:
            raise
        try:
            pixels = _read(pixels_only, at_least, max_image_pixels)
        except Exception:  # the first error is the one to report
            pixels = None
        if pixels is None:
            raise
    return _turned(pixels, jpeg_orientation(content)) if content.startswith(b"\xff\xd8") else pixels


def _read(content: bytes, at_least: int, max_image_pixels: int) -> Pixels:
    with _opened(content) as image:
        _refuse_bomb(image.width, image.height, max_image_pixels)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # libtiff allocates a whole tile, whatever the size of the image.
            tile = (_number(image.tag_v2.get(TILE_WIDTH)), _number(image.tag_v2.get(TILE_HEIGHT)))
            _refuse_bomb(*tile, max_image_pixels)
        with _alone(image.width, image.height):
            image.load()
            return _turned(to_rgb(image, content, at_least), orientation(image))


def _opened(content: bytes) -> ImageFile.ImageFile:
    """``Image.open`` without its limit of pixels, which is global to the process."""
    formats = (_heif_format(),) if _is_heif(content) else FORMATS
    if content[4:8] == _ISO_FILE:  # an AVIF's or HEIC's orientation is a property of the image; EXIF may contradict it
        content = without_metadata(content) or content
    declined: Exception | None = None
    for form in formats:
        factory, accept = Image.OPEN[form]
        if accept is None or accept(content[:16]) is True:
            try:
                return factory(io.BytesIO(content), "")
            except _NOT_THIS_FORMAT as error:
                declined = error
    raise UnidentifiedImageError(_phrase(declined) if declined else "") from declined


def _is_heif(content: bytes) -> bool:
    if content[4:8] != _ISO_FILE:
        return False
    end = min(int.from_bytes(content[:4]), 256)
    brands = {content[8:12], *(content[place : place + 4] for place in range(16, end, 4))}
    return not brands.isdisjoint(HEIF_BRANDS) and brands.isdisjoint(AVIF_BRANDS)


@functools.cache
def _heif_format() -> str:
    """Name of the format that pillow-heif registers."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise DataError("is a HEIC image, which needs the package pillow-heif: pip install pillow-heif") from error
    return _HEIF


def _alone(width: int, height: int) -> contextlib.AbstractContextManager[object]:
    return _one_large if is_large(width, height) else _NOT_ALONE


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _refuse_bomb(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise ImageTooLarge(
            f"is refused as a decompression bomb: {width} x {height} pixels, more than max_image_pixels ({limit:,})"
        )


def _damaged(content: bytes, error: Exception) -> DataError:
    """The error for a user. It must not repeat any content: what was read may be no image at all."""
    if isinstance(error, Image.DecompressionBombError):
        return DataError(f"is refused as a decompression bomb: {_phrase(error)}")
    if not isinstance(error, UnidentifiedImageError):
        return DataError(f"is damaged: {_phrase(error)}")
    if content.startswith(SIGNATURES):
        reason = f" ({error})" if str(error) else ""
        return DataError(f"is damaged, or of a kind that is not supported: its header cannot be read{reason}")
    beginning = content[:64].lstrip().lower()
    name = next((name for start, name in OTHER_CONTENT if beginning.startswith(start.lower())), None)
    return DataError(f"is no image of a known format ({len(content):,} bytes{f', {name}' if name else ''})")


def _phrase(error: Exception) -> str:
    """An exception's text up to where Pillow begins to quote from the file; its type where nothing is left."""
    words = re.match(r"[A-Za-z][A-Za-z ,.-]*", str(error))
    return f"{words[0].strip()[:80]} ({type(error).__name__})" if words else type(error).__name__
