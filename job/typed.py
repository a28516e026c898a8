"""Content that others may have written, decoded and checked against a declared type.

Everything in this package decodes by these functions, and the linter refuses msgspec's own. A process that decodes a
type for the first time in two threads at once may end by a segmentation fault: msgspec 0.22 puts what it knows about a
``Struct`` where the other thread finds it before it is complete. Here one thread at a time prepares a type.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")

_PREPARING = threading.Lock()
_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {}
"""By type. A type that is here, and each type within it, can be decoded in any number of threads."""


def decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    """A decoder of JSON, for a type that is made while the process runs, or for many texts; safe in threads."""
    with _PREPARING:
        return msgspec.json.Decoder(kind)


@overload
def from_json(content: bytes | str | msgspec.Raw) -> Any: ...


@overload
def from_json(content: bytes | str | msgspec.Raw, kind: type[T]) -> T: ...


def from_json(content: bytes | str | msgspec.Raw, kind: Any = Any) -> Any:
    """Decode JSON.

    Args:
        content: the text.
        kind: type of the value; by default any.

    Raises:
        msgspec.ValidationError: the value is of another type.
        ValueError, RecursionError: it is no JSON, or nests too deep.
    """
    return _prepared(kind).decode(content)


def from_msgpack(content: bytes, kind: type[T]) -> T:
    """Decode MessagePack; arguments and errors as of :func:`from_json`."""
    _prepared(kind)
    return msgspec.msgpack.decode(content, type=kind)


def from_builtins(value: object, kind: type[T]) -> T:
    """Convert a value of dicts, lists and scalars.

    Args:
        value: the value.
        kind: type of the result.

    Raises:
        msgspec.ValidationError: the value is of another type.
        RecursionError: it nests too deep.
    """
    _prepared(kind)
    return msgspec.convert(value, kind)


def _prepared(kind: Any) -> msgspec.json.Decoder[Any]:
    known = _DECODERS.get(kind)
    if known is None:
        with _PREPARING:
            known = _DECODERS.setdefault(kind, msgspec.json.Decoder(kind))
    return known
