"""Convert images of every mode of Pillow to 8-bit RGB, transparency on white."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from job.data.metadata import png_bit_depth, png_significant_bits
from job.errors import DataError

Pixels = npt.NDArray[np.uint8]

MAX_IMAGE_PIXELS = 178_956_970
"""Pixels of the largest image by default: the limit above which Pillow raises an error."""
LARGE = 89_478_485
"""Pixels above which an image is converted in bands, and reduced if it is to be resized."""
BAND_PIXELS = 1 << 22
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_CONTAINERS = (8, 12, 16)
"""Bits of samples that are stored in 16 bits without a declared maximum."""
_BITS, _PHOTOMETRIC, _MAX_SAMPLE, _SAMPLE_FORMAT, _S_MIN, _S_MAX = 258, 262, 281, 339, 340, 341
_UNSIGNED = 1


def to_rgb(image: Image.Image, content: bytes = b"", at_least: int = 0) -> Pixels:
    """uint8 [H, W, 3] of an image.

    16-bit greyscale is scaled by the bits in use: 8, 12 or 16, the fewest that hold the largest value, or what the
    file declares. Floats between 0 and 1 are scaled to 0..255; other floats, signed and 32-bit integers from their
    smallest to their largest value.

    Args:
        image: the image.
        content: its file, if it has one.
        at_least: a large image may come out reduced, as long as neither side falls below four times this many
            pixels; 0: at its full size.

    Raises:
        DataError: there is no finite value in it.
    """
    convert = _conversion(image, content)
    if not is_large(image.width, image.height):
        return convert(image)
    factor = max(min(image.size) // (4 * at_least), 1) if at_least else 1
    pixels = np.empty((-(-image.height // factor), -(-image.width // factor), 3), np.uint8)
    for top, band in _bands(image, factor):
        converted = convert(band)
        if factor > 1:
            converted = np.asarray(Image.fromarray(converted).reduce(factor))
        pixels[top // factor : top // factor + len(converted)] = converted
    return pixels


def is_large(width: int, height: int) -> bool:
    """Whether an image of this size is converted in bands."""
    return width * height > LARGE


def _bands(image: Image.Image, rows: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """(first row, rows) of an image, a multiple of ``rows`` at a time, so that copies of them stay small."""
    height = max(BAND_PIXELS // (image.width * rows), 1) * rows
    for top in range(0, image.height, height):
        yield top, image.crop((0, top, image.width, min(top + height, image.height)))


def _conversion(image: Image.Image, content: bytes) -> Callable[[Image.Image], Pixels]:
    """How to convert the image, or a band of it."""
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and not isinstance(image, TiffImagePlugin.TiffImageFile)):
        return _from_sixteen_bits(image, content)
    if image.mode in ("I", "F"):
        return _from_range(image)
    key = _transparent_value(image, content)

    def convert(band: Image.Image) -> Pixels:
        if band.mode in ("RGBa", "La"):
            band = band.convert({"RGBa": "RGBA", "La": "LA"}[band.mode])
        if key is not None:
            band.info["transparency"] = key
        if band.mode in ("RGBA", "LA", "PA") or "transparency" in band.info:
            rgba = band.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            band = Image.alpha_composite(white, rgba)
        return np.array(band.convert("RGB"))

    return convert


def _transparent_value(image: Image.Image, content: bytes) -> int | tuple[int, ...] | None:
    """The transparent grey or colour of a PNG in 8 bits, where the file has it in other bits than Pillow's pixels."""
    key, bits = image.info.get("transparency"), png_bit_depth(content)
    if bits in (1, 2, 4) and image.mode in ("1", "L") and isinstance(key, int):
        largest: int = 2**bits - 1
        return (key & largest) * 255 // largest
    if bits == 16 and image.mode == "RGB" and isinstance(key, tuple):
        return tuple(value >> 8 for value in key)
    return None


def _from_sixteen_bits(image: Image.Image, content: bytes) -> Callable[[Image.Image], Pixels]:
    values_of_bands = (_values(band) for _, band in _bands(image))
    extremes = [(int(values.min(initial=0)), int(values.max(initial=0))) for values in values_of_bands]
    largest = max(high for _, high in extremes)
    if largest >= 2**16 or min(low for low, _ in extremes) < 0:  # an image made in memory: mode I has 32 bits
        return _from_range(image)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = _tag(image, _BITS)
        candidates: tuple[float, ...] = _CONTAINERS if bits == 16 else (bits,)
        if 0 < (declared := _tag(image, _MAX_SAMPLE)) < 2**16:
            candidates = (math.log2(declared + 1), *candidates)
    elif image.format in ("PNG", None):
        # A conforming encoder scales to 16 bits. Values that fit in the declared bits show one that did not.
        candidates = tuple(sorted({*_CONTAINERS, png_significant_bits(content) or 16}))
    else:  # the format has a maximum, to which Pillow scales
        candidates = (16,)
    used = next((bits for bits in candidates if largest < 2**bits), 16)
    is_inverted = _is_inverted(image)
    transparent = image.info.get("transparency")

    def convert(band: Image.Image) -> Pixels:
        values = _values(band)
        # A right shift, where it is one, as every release has scaled 16 bits.
        scaled = values >> int(used - 8) if used in range(8, 17) else values * (255 / (2**used - 1))
        grey = np.clip(scaled, 0, 255).astype(np.uint8)
        if is_inverted:
            grey = 255 - grey
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)

    return convert


def _from_range(image: Image.Image) -> Callable[[Image.Image], Pixels]:
    """Scale what has no fixed range: signed and 32-bit integers and floats."""
    low, high = math.inf, -math.inf
    for _, band in _bands(image):
        values = _signed_values(band, image)
        finite = values[np.isfinite(values)]
        low, high = min(low, finite.min(initial=math.inf)), max(high, finite.max(initial=-math.inf))
    if low > high:
        raise DataError("is refused: none of its values is finite")
    declared = (_tag(image, _S_MIN), _tag(image, _S_MAX))
    if declared[0] < declared[1] and declared[0] <= low and high <= declared[1]:
        low, high = declared
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    is_inverted = _is_inverted(image)

    def convert(band: Image.Image) -> Pixels:
        values = np.nan_to_num(_signed_values(band, image), nan=low, posinf=high, neginf=low)
        grey = np.clip(np.rint((values - low) * (255 / ((high - low) or 1.0))), 0, 255).astype(np.uint8)
        return np.repeat((255 - grey if is_inverted else grey)[:, :, None], 3, axis=2)

    return convert


def _values(band: Image.Image) -> npt.NDArray[np.int64]:
    return np.asarray(band).astype(np.int64)


def _signed_values(band: Image.Image, image: Image.Image) -> npt.NDArray[np.float64]:
    values = np.asarray(band)
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    if band.mode == "I" and is_tiff and _tag(image, _SAMPLE_FORMAT) in (0, _UNSIGNED):
        values = values.view(np.uint32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return values.astype(np.float64)


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white: Pillow inverts 1 and 8 bits only."""
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(_PHOTOMETRIC) == 0


def _tag(image: Image.Image, number: int) -> float:
    """The first number of a TIFF tag; 0 where there is none."""
    tags = getattr(image, "tag_v2", None)
    value = tags.get(number) if tags is not None else None
    if isinstance(value, tuple) and value:
        value = value[0]
    return value if isinstance(value, (int, float)) and math.isfinite(value) else 0
