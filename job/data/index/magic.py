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
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))
AVIF_BRANDS = frozenset((b"avif", b"avis"))
"""Brands of ISO base media files (``ftyp`` boxes) that are images."""


def image_suffix(head: bytes) -> str | None:
    """The suffix of an image that begins with ``head``; None for unknown formats."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:2] == b"BM" and head[6:10] == bytes(4):  # reserved bytes of a bitmap, unlike a text
        return "bmp"
    if head[4:8] == b"ftyp":
        return "avif" if head[8:12] in AVIF_BRANDS else "heic" if head[8:12] in HEIF_BRANDS else None
    return next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), None)
