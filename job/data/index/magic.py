"""Formats of images by their first bytes."""

from __future__ import annotations

HEAD_BYTES = 16
"""First bytes of a file by which its format is known."""
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"\0\0\0\x0cjP  ", "jp2"),
)
_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic", b"msf1": "heic"}


def image_suffix(head: bytes) -> str | None:
    """The suffix of an image that begins with ``head``; None if it is none that is known."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:2] == b"BM" and head[6:10] == bytes(4):  # reserved bytes of a bitmap, unlike a text
        return "bmp"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    return next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), None)
