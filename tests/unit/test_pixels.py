"""Every pixel mode and bit depth, compared with values computed by NumPy."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from job.data import pixels
from job.data.decode import decode
from job.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RAMP = (np.arange(64 * 48, dtype=np.int64).reshape(48, 64) * 21) % 65536
"""Values over nearly all of 16 bits."""


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def grey(content: bytes) -> np.ndarray:
    """Decode a grey image; return [H, W]."""
    decoded = decode(content).numpy()
    assert (decoded[0] == decoded[1]).all()
    assert (decoded[0] == decoded[2]).all()
    return decoded[0]


def colours(content: bytes) -> np.ndarray:
    return decode(content).permute(1, 2, 0).numpy()


def png(values: np.ndarray, bits: int, kind: int, *chunks: bytes) -> bytes:
    """A PNG of integer samples [H, W] or [H, W, C] with a colour type, and chunks before the pixels."""
    rows = values.reshape(values.shape[0], -1)
    if bits < 8:
        spread = ((rows[:, :, None].astype(np.uint8) >> np.arange(bits - 1, -1, -1)) & 1).reshape(len(rows), -1)
        packed = np.packbits(spread, axis=1)
        body = b"".join(b"\0" + row.tobytes() for row in packed)
    else:
        body = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(values: np.ndarray, bits: int, photometric: int = 1, order: str = "<", **tags: tuple[int, ...]) -> bytes:
    """An uncompressed TIFF of one strip; further tags by number, as t281=(type, value, …)."""
    samples = values.shape[2] if values.ndim == 3 else 1
    body = values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries: dict[int, tuple[int, ...]] = {
        256: (4, values.shape[1]),
        257: (4, values.shape[0]),
        258: (3, *[bits] * samples),
        259: (3, 1),
        262: (3, photometric),
        273: (4, 8),
        277: (3, samples),
        278: (4, values.shape[0]),
        279: (4, len(body)),
        **{int(name[1:]): value for name, value in tags.items()},
    }
    table, extra = b"", b""
    directory = 8 + len(body)
    behind = directory + 2 + 12 * len(entries) + 4
    for tag, (kind, *numbers) in sorted(entries.items()):
        packed = b"".join(struct.pack(order + {3: "H", 4: "I", 8: "h", 11: "f"}[kind], number) for number in numbers)
        if len(packed) > 4:
            packed, extra = struct.pack(order + "I", behind + len(extra)), extra + packed
        table += struct.pack(order + "HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", directory)
    return start + body + struct.pack(order + "H", len(entries)) + table + bytes(4) + extra


def packed_12_bits(values: np.ndarray) -> np.ndarray:
    """Pack two 12-bit samples into three bytes, as TIFF does."""
    first, second = values[:, ::2], values[:, 1::2]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 2).reshape(len(values), -1)


U16 = RAMP.astype(np.uint16)
UNIT = (RAMP / 65535).astype(np.float32)
WIDE = (RAMP.astype(np.float32) - 20_000) / 7
STRETCHED = np.rint((RAMP - RAMP.min()) * (255 / (RAMP.max() - RAMP.min()))).astype(np.uint8)


def with_nan(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[0, :2] = np.nan, np.inf
    return values


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(U16, 16, 0), RAMP >> 8),
        (png(U16 % 4096, 16, 0), RAMP % 4096 >> 4),
        (png(U16 % 256, 16, 0), RAMP % 256),
        (png(U16 % 1024, 16, 0, chunk(b"sBIT", b"\x0a")), RAMP % 1024 >> 2),
        (png(U16, 16, 0, chunk(b"sBIT", b"\x0c")), RAMP >> 8),
        (png(U16, 16, 0, chunk(b"sBIT", b"")), RAMP >> 8),
        (tiff(U16, 16), RAMP >> 8),
        (tiff(U16, 16, order=">"), RAMP >> 8),
        (tiff(U16, 16, photometric=0), 255 - (RAMP >> 8)),
        (tiff(U16 % 4096, 16), RAMP % 4096 >> 4),
        (tiff(U16 % 1000, 16, t281=(3, 999)), np.floor(RAMP % 1000 * (255 / 999))),
        (tiff(U16, 16, t281=(3, 999)), RAMP >> 8),
        (tiff(packed_12_bits(RAMP % 200).astype(np.uint8), 12, t256=(4, 64)), RAMP % 200 >> 4),
        (tiff((RAMP - 20_000).astype(np.int16), 16, t339=(3, 2)), None),
        (tiff((RAMP - 20_000).astype(np.int32), 32, t339=(3, 2)), STRETCHED),
        (tiff((RAMP - 20_000).astype(np.int32), 32, order=">", t339=(3, 2)), STRETCHED),
        (tiff((RAMP * 60_000).astype(np.uint32), 32), STRETCHED),
        (tiff(UNIT, 32, t339=(3, 3)), np.rint(UNIT.astype(np.float64) * 255)),
        (tiff(UNIT / 2, 32, t339=(3, 3)), np.rint(UNIT.astype(np.float64) / 2 * 255)),
        (tiff(UNIT, 32, photometric=0, t339=(3, 3)), 255 - np.rint(UNIT.astype(np.float64) * 255)),
        (tiff(WIDE, 32, t339=(3, 3)), STRETCHED),
        (tiff(WIDE, 32, order=">", t339=(3, 3)), STRETCHED),
        (tiff(UNIT * 2, 32, t339=(3, 3), t340=(11, 0), t341=(11, 4)), np.rint(UNIT.astype(np.float64) / 2 * 255)),
        (tiff(np.full((4, 4), 7, np.float32), 32, t339=(3, 3)), np.zeros((4, 4))),
        (encoded(Image.fromarray((RAMP % 1001).astype(np.int32)), "PPM"), RAMP % 1001 >> 8),
        (b"P5 64 48 1000\n" + (RAMP % 1001).astype(">u2").tobytes(), np.rint(RAMP % 1001 * (65535 / 1000)) // 256),
        (tiff(np.packbits(RAMP % 3 == 0, axis=1), 1, photometric=0, t256=(4, 64)), np.where(RAMP % 3 == 0, 0, 255)),
        (tiff(np.packbits(RAMP % 3 == 0, axis=1), 1, t256=(4, 64)), np.where(RAMP % 3 == 0, 255, 0)),
        (tiff((RAMP >> 8).astype(np.uint8), 8, photometric=0), 255 - (RAMP >> 8)),
    ],
)
def test_greyscale_of_every_depth(content: bytes, expected: np.ndarray | None) -> None:
    decoded = grey(content)
    if expected is None:  # RAMP - 20,000 does not fit in 16 bits throughout
        values = (RAMP - 20_000).astype(np.int16).astype(np.int64)
        expected = np.rint((values - values.min()) * (255 / (values.max() - values.min())))
    assert np.array_equal(decoded, expected), np.abs(decoded.astype(int) - expected).max()


@pytest.mark.parametrize(("low", "high"), [(0, 1_000_000), (-500, 500), (0, 2**31 - 1)])
def test_an_image_of_32_bits_in_memory(low: int, high: int) -> None:
    ramp = np.linspace(low, high, 256).astype(np.int32).reshape(16, 16)
    grey = pixels.to_rgb(Image.fromarray(ramp))[:, :, 0].ravel().astype(int)
    assert abs(grey - np.arange(256)).max() <= 1


def test_values_that_are_not_finite() -> None:
    content = tiff(with_nan(UNIT), 32, t339=(3, 3))
    decoded = grey(content)
    assert decoded[0, :2].tolist() == [0, 255]
    assert np.array_equal(decoded[1:], np.rint(UNIT[1:].astype(np.float64) * 255))
    with pytest.raises(DataError, match="none of its values is finite"):
        decode(tiff(np.full((4, 4), np.nan, np.float32), 32, t339=(3, 3)))


RGB = np.stack([RAMP >> 8, RAMP % 256, (RAMP >> 4) % 256], 2).astype(np.uint8)
ALPHA = ((RAMP >> 5) % 256).astype(np.uint8)
ON_WHITE = np.rint((RGB * (ALPHA[:, :, None] / 255)) + 255 - ALPHA[:, :, None].astype(float))


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        (png(RGB.astype(np.uint16) * 257, 16, 2), RGB, 0),
        (png(np.dstack([RGB, ALPHA]), 8, 6), ON_WHITE, 1),
        (png(np.dstack([RGB, ALPHA]).astype(np.uint16) * 257, 16, 6), ON_WHITE, 1),
        (png(np.dstack([RGB[:, :, :1], ALPHA]), 8, 4), ON_WHITE[:, :, :1].repeat(3, 2), 1),
        (png(np.dstack([RGB[:, :, :1], ALPHA]).astype(np.uint16) * 257, 16, 4), ON_WHITE[:, :, :1].repeat(3, 2), 1),
        (tiff(RGB, 8, 2), RGB, 0),
        (tiff(RGB.astype(np.uint16) * 257, 16, 2, ">"), RGB, 0),
        (tiff(np.dstack([RGB, ALPHA]), 8, 2, t338=(3, 0)), RGB, 0),
        (tiff(np.dstack([RGB, ALPHA]), 8, 2, t338=(3, 2)), ON_WHITE, 1),
        (tiff(np.dstack([RGB // 2, np.full_like(ALPHA, 128)]), 8, 2, t338=(3, 1)), RGB // 2 + 127, 3),
        (tiff(np.dstack([RGB[:, :, :1], ALPHA]), 8, 1, t338=(3, 2)), ON_WHITE[:, :, :1].repeat(3, 2), 1),
        (tiff(np.dstack([255 - RGB, np.zeros_like(ALPHA)]), 8, 5), RGB, 1),
        (encoded(Image.fromarray(RGB), "WEBP", lossless=True), RGB, 0),
        (encoded(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True, exact=True), ON_WHITE, 1),
        (encoded(Image.fromarray(RGB), "JPEG2000"), RGB, 0),
    ],
)
def test_colours_and_transparency(content: bytes, expected: np.ndarray, tolerance: int) -> None:
    assert np.abs(colours(content).astype(int) - expected).max() <= tolerance


def test_a_lab_tiff() -> None:
    lab = ImageCms.applyTransform(
        Image.fromarray(RGB),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert lab is not None
    difference = np.abs(colours(encoded(lab, "TIFF")).astype(int) - RGB)
    assert difference.mean() < 5


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white(bits: int) -> None:
    """The chunk tRNS has the file's bit depth, Pillow's pixels have 8 bits."""
    values = RAMP % 2**bits if bits < 16 else RAMP
    key = int(values[1, 3])
    decoded = grey(png(values, bits, 0, chunk(b"tRNS", struct.pack(">H", key))))
    scaled = values * 255 // (2**bits - 1) if bits < 16 else values >> 8
    assert np.array_equal(decoded, np.where(values == key, 255, scaled))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_white(bits: int) -> None:
    factor = 257 if bits == 16 else 1
    key = RGB[5, 7]
    decoded = colours(
        png(RGB.astype(int) * factor, bits, 2, chunk(b"tRNS", struct.pack(">3H", *(key.astype(int) * factor))))
    )
    assert np.array_equal(decoded, np.where((key == RGB).all(2, keepdims=True), 255, RGB))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [None, b"\xff\0", b"\x80\xff"], ids=["opaque", "one", "partly"])
def test_a_palette(bits: int, transparent: bytes | None) -> None:
    palette = np.random.default_rng(bits).integers(0, 256, (2**bits, 3))
    values = RAMP % 2**bits
    chunks = [chunk(b"PLTE", palette.astype(np.uint8).tobytes())]
    alpha = np.full(2**bits, 255)
    if transparent is not None:
        chunks.append(chunk(b"tRNS", transparent))
        alpha[: len(transparent)] = list(transparent)
    expected = np.rint(palette * alpha[:, None] / 255 + 255 - alpha[:, None])[values]
    assert np.abs(colours(png(values, bits, 3, *chunks)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "convert"),
    [
        ("HSV", lambda image: image.convert("HSV")),
        ("YCbCr", lambda image: image.convert("YCbCr")),
        ("RGBa", lambda image: image.convert("RGBA").convert("RGBa")),
        ("La", lambda image: image.convert("LA").convert("La")),
        ("PA", lambda image: image.convert("P").convert("PA")),
        ("RGBX", lambda image: image.convert("RGBX")),
        ("CMYK", lambda image: image.convert("CMYK")),
    ],
)
def test_modes_of_pillow_that_few_files_have(mode: str, convert: Callable[[Image.Image], Image.Image]) -> None:
    original = Image.fromarray(RGB)
    image = convert(original)
    assert image.mode == mode
    reference = original.convert("L").convert("RGB") if mode == "La" else original
    if mode == "PA":
        reference = original.convert("P").convert("RGB")
    difference = np.abs(pixels.to_rgb(image, b"").astype(int) - np.asarray(reference))
    assert difference.mean() < 3


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(file_format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    content = encoded(
        frames[0],
        file_format,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if file_format == "WEBP" else {}),
    )
    assert np.array_equal(colours(content), np.asarray(frames[0]))


def test_a_pixel_type_that_is_not_supported_is_named() -> None:
    content = tiff(np.zeros((4, 4, 3), np.float32), 32, 2, t339=(3, 3, 3, 3))
    with pytest.raises(DataError, match=r"is damaged, or of a kind that is not supported: .*unknown pixel mode"):
        decode(content)


@pytest.mark.parametrize("at_least", [0, 2])
@pytest.mark.parametrize(
    "content",
    [
        png(U16 % 4096, 16, 0),
        tiff(WIDE, 32, t339=(3, 3)),
        png(np.dstack([RGB, ALPHA]), 8, 6),
        tiff(RGB, 8, 2, t274=(3, 6)),
    ],
)
def test_a_large_image_is_converted_in_bands(content: bytes, at_least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels are equal; before resizing they are reduced by a box filter."""
    whole = decode(content)
    monkeypatch.setattr(pixels, "LARGE", 1000)
    monkeypatch.setattr(pixels, "BAND_PIXELS", 500)
    decoded = decode(content, at_least)
    if not at_least:
        assert np.array_equal(decoded, whole)
        return
    reduced = Image.fromarray(whole.permute(1, 2, 0).numpy()).reduce(min(whole.shape[1:]) // 8)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.asarray(reduced))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_the_limit_of_pixels_is_an_option(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's global limit is neither applied nor changed."""
    content = encoded(Image.new("RGB", (100, 90)), file_format)
    assert decode(content, max_image_pixels=9000).shape == (3, 90, 100)
    with pytest.raises(DataError, match=r"decompression bomb: 100 x 90 pixels, more than max_image_pixels \(8,999\)"):
        decode(content, max_image_pixels=8999)
    if file_format not in ("WEBP", "TIFF"):  # Pillow's plugins check these by themselves, too
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
        assert decode(content).shape == (3, 90, 100)
    assert pixels.MAX_IMAGE_PIXELS == 178_956_970
