"""Bytes in JSON."""

from __future__ import annotations

import binascii

from job.serve.errors import RequestError

_URL_SAFE = str.maketrans("-_", "+/")
_BLANKS = str.maketrans("", "", " \t\r\n")


def decode_base64(text: str, where: str) -> bytes:
    """The bytes of base64: standard or URL-safe, with or without padding and line breaks, also as a ``data:`` URI.

    Args:
        text: base64.
        where: place in the request, for the message.

    Raises:
        RequestError: it is something else.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    elif "://" in text[:32]:
        raise RequestError(400, f"{where} is a URI, and URIs are not fetched. Send the image itself, in base64.")
    text = text.translate(_BLANKS).translate(_URL_SAFE).rstrip("=")
    try:
        return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except (binascii.Error, ValueError):  # ValueError: characters that are not ASCII
        raise RequestError(400, f"{where} is not base64.") from None
