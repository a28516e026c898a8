from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from support import picture

from job.data.augment import resize
from job.data.decode import decode
from job.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
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
    found = decode(content)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_jpeg_is_what_pillow_reads() -> None:
    content = encoded(GRADIENT, "JPEG", quality=90)
    assert np.array_equal(decode(content).permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(content))))


def test_sixteen_bits_are_scaled_and_transparency_is_white() -> None:
    deep = Image.fromarray((np.arange(64 * 48).reshape(48, 64) * 21).astype(np.uint16))
    found = decode(encoded(deep, "PNG"))
    assert np.array_equal(found[0].numpy(), (np.asarray(deep) >> 8).astype(np.uint8))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encoded(clear, "PNG")).unique().tolist() == [255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {5: (48, 64), 6: (48, 64), 7: (48, 64), 8: (48, 64)}.get(orientation, (64, 48))
    found = decode(encoded(GRADIENT, "JPEG", exif=exif))
    assert tuple(found.shape) == (3, upright[1], upright[0])
    rising = found.float().mean(dim=0)
    dark_first = {1: (1, 0), 2: (1, -1), 3: (1, -1), 4: (1, 0), 5: (0, 0), 6: (0, 0), 7: (0, -1), 8: (0, -1)}
    axis, end = dark_first[orientation]
    profile = rising.mean(dim=1 - axis)
    assert profile.argmin().item() in ((0, 1) if end == 0 else (len(profile) - 1, len(profile) - 2))


@pytest.mark.parametrize(
    ("content", "told"),
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
def test_what_is_no_image_is_refused(content: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        decode(content)


def photo(width: int, height: int) -> Image.Image:
    """Smooth shapes and some noise, as photographs have."""
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


def test_what_is_cut_or_changed_in_a_jpeg_is_as_pillow_has_it() -> None:
    """A cut is damage; rubbish behind the image is not."""
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
    """An EPS file would start Ghostscript, a PCX file is harmless; neither is a format to train on."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    for form in ("EPS", "PCX", "TGA", "ICNS"):
        with pytest.raises(DataError, match="is no image of a known format"):
            decode(encoded(GRADIENT, form))
    for form in ("AVIF", "JPEG2000", "PPM", "TIFF"):
        assert decode(encoded(GRADIENT, form)).shape == (3, 48, 64)


@pytest.mark.parametrize(
    "error", [MemoryError(), struct.error("x"), KeyError(7), RecursionError(), AttributeError(), DeprecationWarning()]
)
def test_whatever_a_decoder_raises_is_a_data_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DataError, match=f"is damaged: .*{type(error).__name__}"):
        decode(encoded(GRADIENT, "PNG"))


def segment(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """An EXIF segment's payload with these entries (tag, type, count, four bytes of value or offset)."""
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)


def with_exif(payload: bytes, form: str) -> bytes:
    """The gradient with a raw EXIF payload."""
    if form == "WEBP":
        return encoded(GRADIENT, form, lossless=True, exif=payload)
    plain = encoded(GRADIENT, form)
    if form == "JPEG":
        return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + plain[2:]
    return plain[:33] + png_chunk(b"eXIf", payload[6:]) + plain[33:]


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_random_exif_data_does_not_hide_an_image(form: str) -> None:
    """Tags of any type, count and offset; where the orientation's own tag is sound, the image is turned by it."""
    rng = random.Random(form)
    for _ in range(150):
        tags = [0x10F, 0x11A, 0x103, 0x8769, 0x8825, 0x927C, 0x201, rng.randrange(65536)]
        entries = [
            (rng.choice(tags), rng.randint(0, 14), rng.choice([0, 1, 4, 2**32 - 1]), rng.randbytes(4))
            for _ in range(rng.randint(1, 5))
        ]
        entries = [entry for entry in entries if entry[0] != 0x112]
        payload = segment(sorted([*entries, (0x112, 3, 1, b"\6\0\0\0")]))
        assert decode(with_exif(payload, form)).shape == (3, 64, 48), payload
        damaged = bytearray(payload)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(6, len(damaged))] = rng.randrange(256)
        assert decode(with_exif(bytes(damaged), form)).numel() == 3 * 64 * 48


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "JPEG2000"])
def test_a_damaged_file_raises_nothing_but_data_errors(form: str) -> None:
    rng = random.Random(form)
    sound = encoded(GRADIENT, form)
    refused = 0
    for _ in range(100):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(min(len(content), rng.choice([60, 400, len(content)])))
            content[place : place + rng.choice([0, 1, 4])] = rng.randbytes(rng.choice([1, 4]))
        try:
            decode(bytes(content), rng.choice([0, 8]))
        except DataError:
            refused += 1
    assert refused


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
    place = tiff.index(struct.pack("<HHI", 0x11A, 5, 1))
    tiff[place : place + 12] = struct.pack("<HHII", 0x11A, 2, 2**31, 8)
    assert np.array_equal(decode(bytes(tiff)).permute(1, 2, 0).numpy(), rgb(GRADIENT))


def test_a_photograph_of_96_megapixels_is_read_scaled() -> None:
    content = encoded(Image.new("RGB", (12_000, 8_000), (200, 40, 30)), "JPEG", quality=40)
    assert decode(content, 224).shape == (3, 1000, 1500)
