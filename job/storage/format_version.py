"""The version number that a JSON file of this package holds under ``format``."""

from __future__ import annotations

from typing import Annotated

import msgspec

from job import typed

MALFORMED = (ValueError, RecursionError)
"""Exceptions of msgspec for content that is not JSON, nests too deep or does not have the expected type."""


class Versioned(msgspec.Struct, frozen=True):
    """A JSON object of any version.

    Attributes:
        format: version of its format.
    """

    format: Annotated[int, msgspec.Meta(ge=1)]


class Unversioned(Versioned, frozen=True):
    """A JSON object whose first version had no ``format``."""

    format: Annotated[int, msgspec.Meta(ge=1)] = 1


def format_version(content: bytes, kind: type[Versioned] = Versioned) -> int:
    """The format version of a JSON object, whatever else it holds.

    Raises:
        ValueError, RecursionError: it has none, or is no JSON object (:data:`MALFORMED`).
    """
    return typed.from_json(content, kind).format
