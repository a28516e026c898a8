from __future__ import annotations

import contextlib
import io
import random
import struct
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin, TiffImagePlugin
from support import picture

from job.data import decode as decoding
from job.data.augment import resize
from job.data.decode import decode
from job.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


GRADIENT = Image.fromarray(
    np.stack([np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))] * 2 + [np.full((48, 64), 90, np.uint8)], axis=2)
)


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(GRADIENT, "PNG"), rgb(GRADIENT)),
        (encoded(GRADIENT, "BMP"), rgb(GRADIENT)),
        (encoded(GRADIENT, "WEBP", lossless=True), rgb(GRADIENT)),
        (encoded(GRADIENT.convert("L"), "PNG"), rgb(GRADIENT.convert("L"))),
        (encoded(GRADIENT.convert("P"), "PNG"), rgb(GRADIENT.convert("P"))),
        (encoded(GRADIENT.convert("P"), "GIF"), rgb(GRADIENT.convert("P"))),
        (encoded(GRADIENT.convert("CMYK"), "TIFF"), rgb(GRADIENT.convert("CMYK"))),
        (encoded(GRADIENT.convert("1"), "PNG"), rgb(GRADIENT.convert("1"))),
    ],
    ids=["png", "bmp", "webp", "grey", "palette", "gif", "cmyk", "bilevel"],
)
def test_every_mode_becomes_rgb(content: bytes, expected: np.ndarray) -> None:
    decoded = decode(content)
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), expected)


def test_jpegs_are_decoded_as_by_pillow() -> None:
    content = encoded(GRADIENT, "JPEG", quality=90)
    assert np.array_equal(decode(content).permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(content))))


def test_sixteen_bits_are_scaled_and_transparency_is_white() -> None:
    deep = Image.fromarray((np.arange(64 * 48).reshape(48, 64) * 21).astype(np.uint16))
    decoded = decode(encoded(deep, "PNG"))
    assert np.array_equal(decoded[0].numpy(), (np.asarray(deep) >> 8).astype(np.uint8))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encoded(clear, "PNG")).unique().tolist() == [255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {5: (48, 64), 6: (48, 64), 7: (48, 64), 8: (48, 64)}.get(orientation, (64, 48))
    decoded = decode(encoded(GRADIENT, "JPEG", exif=exif))
    assert tuple(decoded.shape) == (3, upright[1], upright[0])
    rising = decoded.float().mean(dim=0)
    dark_first = {1: (1, 0), 2: (1, -1), 3: (1, -1), 4: (1, 0), 5: (0, 0), 6: (0, 0), 7: (0, -1), 8: (0, -1)}
    axis, end = dark_first[orientation]
    profile = rising.mean(dim=1 - axis)
    assert profile.argmin().item() in ((0, 1) if end == 0 else (len(profile) - 1, len(profile) - 2))


FORMATS_WITH_ORIENTATION: list[tuple[str, dict[str, object]]] = [
    ("JPEG", {}),
    ("MPO", {}),
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("AVIF", {}),
]


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Return the image as a viewer shows it."""
    ways = Image.Transpose
    order = (ways.FLIP_LEFT_RIGHT, ways.ROTATE_180, ways.FLIP_TOP_BOTTOM, ways.TRANSPOSE)
    method = dict(enumerate((*order, ways.ROTATE_270, ways.TRANSVERSE, ways.ROTATE_90), 2)).get(orientation)
    return image if method is None else image.transpose(method)


def quarters(image: Image.Image) -> Image.Image:
    """Return an image with a different colour per quarter, so that all orientations differ."""
    small = Image.new("RGB", (2, 2))
    small.putdata([(250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 240)])
    return small.resize(image.size, Image.Resampling.NEAREST)


@pytest.mark.parametrize(("file_format", "options"), FORMATS_WITH_ORIENTATION)
@pytest.mark.parametrize("source", ["exif", "xmp"])
def test_every_format_stands_upright_once(file_format: str, options: dict[str, object], source: str) -> None:
    """Some decoders apply the orientation themselves."""
    image = quarters(GRADIENT)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
        if source == "exif":
            metadata: dict[str, object] = {"exif": exif}
        elif file_format == "PNG":
            info = PngImagePlugin.PngInfo()
            info.add_itxt("XML:com.adobe.xmp", xmp.decode())
            metadata = {"pnginfo": info}
        elif file_format == "TIFF":
            tags = TiffImagePlugin.ImageFileDirectory_v2()
            tags.tagtype[700] = 1
            tags[700] = xmp
            metadata = {"tiffinfo": tags}
        else:
            metadata = {"xmp": xmp}
        decoded = decode(encoded(image, file_format, **options, **metadata)).permute(1, 2, 0).numpy()
        expected = rgb(turned(image, orientation))
        assert decoded.shape == expected.shape
        assert np.abs(decoded.astype(int) - expected).mean() < 12, (file_format, orientation)


def test_an_avif_is_turned_by_its_own_property_alone() -> None:
    """As in browsers; EXIF data may contradict it, or be malformed."""
    payload = segment([(0x10F, 3, 1, b"\6\0\0\0"), (0x11A, 3, 1, bytes(4))])
    content = encoded(GRADIENT, "AVIF", exif=payload)
    for tag in (b"\x12\1\3\0", b"\x0f\1\x0b\0"):
        changed = content.replace(b"\x0f\1\3\0", tag)
        assert changed != content
        assert decode(changed).shape == (3, 48, 64)
    assert decode(content.replace(payload[6:14], b"no TIFF!")).shape == (3, 48, 64)


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(40)


def test_a_heic_image_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoding._heif_format.cache_clear()
    with pytest.raises(DataError, match="is a HEIC image, which needs the package pillow-heif: pip install"):
        decode(HEIC)


def test_a_heic_image_is_read_by_pillow_heif() -> None:
    """The library applies the orientation, and EXIF does not apply it again."""
    heif = pytest.importorskip("pillow_heif")
    decoding._heif_format.cache_clear()
    with pytest.raises(DataError, match=r"is damaged|is no image"):
        decode(HEIC)
    heif.register_heif_opener()
    image = quarters(GRADIENT)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(image, "HEIF", exif=exif.tobytes(), quality=90)
        decoded = decode(content).permute(1, 2, 0).numpy()
        expected = rgb(turned(image, orientation))
        assert decoded.shape == expected.shape
        assert np.abs(decoded.astype(int) - expected).mean() < 12
    rng = random.Random(0)
    for _ in range(60):
        with contextlib.suppress(DataError):
            decode(damaged(content, rng), 8, 1_000_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am a text file", "is no image of a known format"),
        (picture((1, 2, 3), 0)[:300], "is damaged"),
        (b"root:x:0:0:root:/root:/bin/sh", r"is no image of a known format \(29 bytes\)$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"is no image of a known format \(47 bytes, a Post"),
        (b"\n<!DOCTYPE html><html>password</html>", r"is no image of a known format \(37 bytes, an HTML page\)$"),
        (b"P6\n12password 4\n255\n", r"is damaged: [a-z ]+ \(ValueError\)$"),
        (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "decompression bomb"),
    ],
)
def test_files_that_are_not_images_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(content)


def photo(width: int, height: int) -> Image.Image:
    """Return an image with smooth shapes and noise, like a photograph."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / width * (70 - 9 * c)) * np.cos(y / height * (50 + 7 * c)) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return Image.fromarray((127 + 90 * np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8))


ZOO = {
    "444": ({"quality": 92, "subsampling": 0}, "RGB"),
    "422": ({"quality": 85, "subsampling": 1}, "RGB"),
    "420": ({"quality": 75, "subsampling": 2}, "RGB"),
    "progressive": ({"quality": 85, "progressive": True}, "RGB"),
    "restarts": ({"quality": 85, "restart_marker_blocks": 3}, "RGB"),
    "grey": ({"quality": 85}, "L"),
    "cmyk": ({"quality": 85}, "CMYK"),
    "rgb": ({"quality": 85, "keep_rgb": True}, "RGB"),
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (255, 127), (640, 427)])
def test_a_jpeg_at_full_size_is_pillows_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    options, mode = ZOO[name]
    content = encoded(photo(*size).convert(mode), "JPEG", **options)
    reference = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(decode(content).permute(1, 2, 0).numpy(), reference)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("size", [(448, 448), (1600, 1066), (2000, 1800), (2001, 500)])
def test_a_large_jpeg_resized_differs_from_pillows_by_a_level_or_two(name: str, size: tuple[int, int]) -> None:
    """Scaled in the inverse DCT first: 2.5 levels of 255 on average at most; bicubic is as far from bilinear."""
    options, mode = ZOO[name]
    content = encoded(photo(*size).convert(mode), "JPEG", **options)
    reference = torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)
    difference = (resize(decode(content, 224), 224, "squash").int() - resize(reference, 224, "squash").int()).abs()
    assert difference.float().mean() <= 2.5
    assert difference.max() <= 24


def test_a_large_jpeg_is_scaled_while_decoded_and_a_small_one_is_not() -> None:
    content = encoded(photo(1000, 500), "JPEG")
    assert [tuple(decode(content, s).shape[1:]) for s in (0, 60, 125, 126, 250, 251)] == [
        (500, 1000),
        (63, 125),
        (125, 250),
        (250, 500),
        (250, 500),
        (500, 1000),
    ]


def test_damaged_jpegs_are_treated_as_by_pillow() -> None:
    """A truncated file is damaged; bytes after the image are ignored."""
    content = encoded(photo(640, 427), "JPEG")
    with pytest.raises(DataError, match="is damaged"):
        decode(content[: len(content) * 2 // 3], 224)
    reference = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(decode(content + b"rubbish" * 50).permute(1, 2, 0).numpy(), reference)
    with pytest.raises(DataError, match=r"is damaged|no image"):
        decode(content[:30])


def test_a_jpeg_bomb_is_refused_before_it_is_decoded() -> None:
    content = bytearray(encoded(photo(64, 64), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # 65,535 x 65,535
    with pytest.raises(DataError, match="decompression bomb"):
        decode(bytes(content), 224)


def test_only_listed_formats_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS file would start Ghostscript; neither EPS nor PCX is supported."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    for file_format in ("EPS", "PCX", "TGA", "ICNS"):
        with pytest.raises(DataError, match="is no image of a known format"):
            decode(encoded(GRADIENT, file_format))
    for file_format in ("AVIF", "JPEG2000", "PPM", "TIFF"):
        assert decode(encoded(GRADIENT, file_format)).shape == (3, 48, 64)


@pytest.mark.parametrize(
    "error", [MemoryError(), struct.error("x"), KeyError(7), RecursionError(), AttributeError(), DeprecationWarning()]
)
def test_any_decoder_error_is_a_data_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DataError, match=f"is damaged: .*{type(error).__name__}"):
        decode(encoded(GRADIENT, "PNG"))


def segment(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """An EXIF segment's payload with these entries (tag, type, count, four bytes of value or offset)."""
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)


def with_exif(payload: bytes, file_format: str) -> bytes:
    """The gradient with a raw EXIF payload."""
    if file_format == "WEBP":
        return encoded(GRADIENT, file_format, lossless=True, exif=payload)
    plain = encoded(GRADIENT, file_format)
    if file_format == "JPEG":
        return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + plain[2:]
    return plain[:33] + png_chunk(b"eXIf", payload[6:]) + plain[33:]


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_random_exif_data_does_not_hide_an_image(file_format: str) -> None:
    """Tags of any type, count and offset; a valid orientation tag is applied."""
    rng = random.Random(file_format)
    for _ in range(150):
        tags = [0x10F, 0x11A, 0x103, 0x8769, 0x8825, 0x927C, 0x201, rng.randrange(65536)]
        entries = [
            (rng.choice(tags), rng.randint(0, 14), rng.choice([0, 1, 4, 2**32 - 1]), rng.randbytes(4))
            for _ in range(rng.randint(1, 5))
        ]
        entries = [entry for entry in entries if entry[0] != 0x112]
        payload = segment(sorted([*entries, (0x112, 3, 1, b"\6\0\0\0")]))
        assert decode(with_exif(payload, file_format)).shape == (3, 64, 48), payload
        damaged = bytearray(payload)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(6, len(damaged))] = rng.randrange(256)
        assert decode(with_exif(bytes(damaged), file_format)).numel() == 3 * 64 * 48


SPECIMENS: list[tuple[str, str, dict[str, object]]] = [
    *[("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")],
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"exif": bytes(8)}),
    ("MPO", "RGB", {"save_all": True, "append_images": [GRADIENT]}),
    *[("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")],
    ("PNG", "RGB", {"save_all": True, "append_images": [GRADIENT]}),
    *[("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (True, False)],
    ("WEBP", "RGB", {"save_all": True, "append_images": [GRADIENT]}),
    *[("TIFF", mode, {}) for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK", "LAB", "I;16", "I", "F")],
    *[("TIFF", "RGB", {"compression": kind}) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")],
    ("GIF", "P", {"save_all": True, "append_images": [GRADIENT]}),
    *[("BMP", mode, {}) for mode in ("RGB", "L", "1")],
    *[("PPM", mode, {}) for mode in ("RGB", "L", "1", "I", "F")],
    *[("AVIF", mode, {}) for mode in ("RGB", "RGBA")],
    *[("JPEG2000", mode, {}) for mode in ("RGB", "LA", "I;16")],
]


def in_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(GRADIENT.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        return Image.merge("LAB", GRADIENT.split())
    if mode in ("RGBA", "LA"):
        image = GRADIENT.convert(mode)
        image.putalpha(GRADIENT.getchannel(0))
        return image
    return GRADIENT.convert("L").convert(mode) if mode in ("I", "F") else GRADIENT.convert(mode)


def damaged(intact: bytes, rng: random.Random) -> bytes:
    """Return a file with bits flipped, a part overwritten, removed, moved or repeated, a size changed, or truncated."""
    content = bytearray(intact)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(min(len(content), rng.choice([60, 400, len(content)])))
        length = rng.choice([1, 4, 20, 200])
        kind = rng.randrange(7)
        if kind == 0:
            content[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[position : position + length] = rng.randbytes(length)
        elif kind == 2:
            del content[position : position + length]
        elif kind == 3:
            content[position:position] = content[position : position + length]
        elif kind == 4:
            part = content[position : position + length]
            del content[position : position + length]
            content[(other := rng.randrange(len(content) + 1)) : other] = part
        elif kind == 5:
            size = rng.choice([0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1])
            content[position : position + 4] = size.to_bytes(4, rng.choice(["big", "little"]))
        else:
            del content[max(position, 1) :]
        content = content or bytearray(1)
    return bytes(content)


@pytest.mark.parametrize(("file_format", "mode", "options"), SPECIMENS)
def test_a_damaged_file_raises_nothing_but_data_errors(file_format: str, mode: str, options: dict[str, object]) -> None:
    intact = encoded(in_mode(mode), file_format, **options)
    assert decode(intact).shape == (3, 48, 64)
    rng = random.Random(f"{file_format} {mode}")
    refused, began = 0, time.thread_time()
    for _ in range(60):
        try:
            decode(damaged(intact, rng), rng.choice([0, 8]), 1_000_000)
        except DataError:
            refused += 1
    assert refused
    assert time.thread_time() - began < 30


def test_large_or_malformed_metadata_does_not_hide_an_image() -> None:
    plain, text = encoded(GRADIENT, "PNG"), zlib.compress(b"x" * 2_000_000)
    turned = png_chunk(b"eXIf", segment([(0x112, 3, 1, b"\6\0\0\0")])[6:])
    for chunk in (
        png_chunk(b"zTXt", b"Raw profile\0\0" + text),
        png_chunk(b"iCCP", b"icc\0\0" + text),
        b"\0\0\0\1tEXtabcde",
    ):
        assert np.array_equal(decode(plain[:33] + chunk + plain[33:]).permute(1, 2, 0).numpy(), rgb(GRADIENT))
        assert decode(plain[:33] + chunk + turned + plain[33:]).shape == (3, 64, 48)
    tiff = bytearray(encoded(GRADIENT, "TIFF", dpi=(72, 72), software="x" * 9))
    position = tiff.index(struct.pack("<HHI", 0x11A, 5, 1))
    tiff[position : position + 12] = struct.pack("<HHII", 0x11A, 2, 2**31, 8)
    assert np.array_equal(decode(bytes(tiff)).permute(1, 2, 0).numpy(), rgb(GRADIENT))


def test_a_photograph_of_96_megapixels_is_read_scaled() -> None:
    content = encoded(Image.new("RGB", (12_000, 8_000), (200, 40, 30)), "JPEG", quality=40)
    assert decode(content, 224).shape == (3, 1000, 1500)
