"""JSON of clients: strict, typed, and limited before memory is allocated for it."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from job import typed
from job.serve.errors import RequestError
from job.storage.format_version import MALFORMED

T = TypeVar("T")


def decode_json(body: bytes, kind: type[T], *, most_values: int) -> T:
    """Decode a JSON body.

    An empty object of two bytes would become one of a hundred: so brackets, braces and quotes are counted first.

    Args:
        body: the body.
        kind: type that it must have.
        most_values: objects, arrays and strings that it may hold.

    Raises:
        RequestError: it holds more values, or is no JSON of this type.
    """
    if body.count(b"{") + body.count(b"[") + body.count(b'"') // 2 > most_values:
        raise RequestError(413, f"the JSON holds more than {most_values} objects, arrays and strings.")
    try:
        return typed.from_json(body, kind)
    except msgspec.ValidationError as error:
        raise RequestError(400, f"the request is not valid: {str(error)[:500]}.") from None
    except MALFORMED as error:
        detail = "it nests too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise RequestError(400, f"the body is no JSON: {detail}.") from None
