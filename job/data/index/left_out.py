"""Files of a listing that are not samples, counted by kind for the log."""

from __future__ import annotations

from threading import Lock
from typing import Annotated

import msgspec

from job.process.terminal import escape

MOST_KINDS = 64
HIDDEN = "hidden files and folders"
COMPANIONS = "notes and metadata"
NOT_IMAGES = "files without an image's suffix"
ARCHIVES = "archives beside images or in archives, which are not read"
REPLACED = "members that a later one of the same name replaces"
COPIES = "copies under another spelling of the same name"
REPEATED_ROWS = "rows that name an image again"
NOT_UTF8 = "files whose names are not UTF-8"
UNREADABLE = "unreadable folders"
NO_IMAGES = "folders without an image"
EXPECTED = frozenset({HIDDEN, COMPANIONS})
"""Kinds that nobody misses."""
COMPANION_PATTERN = (
    r"(?i)(^|/)((readme|license|licence|copying|makefile|dockerfile|changelog)[^/]*"
    r"|[^/]*\.(txt|md|rst|pdf|html?|csv|tsv|jsonl?|ya?ml|xml|toml|ini|cfg|db|py|ipynb|sh|bat|lnk|url|log|parquet|cls"
    r"|md5|sha1|sha256|names))$"
)
"""Names of files that usually lie beside images."""


class LeftOutKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files that were left out for one reason.

    Attributes:
        kind: the reason, as a plural noun: "hidden files", "files without an image's suffix", …
        count: how many.
        example: key or URI of one of them.
    """

    kind: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    count: Annotated[int, msgspec.Meta(ge=1)]
    example: Annotated[str, msgspec.Meta(max_length=65_536)]

    def __str__(self) -> str:
        return f"{self.kind}: {self.count:,}, for example {escape(self.example)}"


def summary(uri: str, kinds: list[LeftOutKind]) -> str:
    """One line that names what the listing of ``uri`` left out."""
    return f"{uri}: left out: {'; '.join(map(str, kinds))}"


class LeftOut:
    """Counts of what one listing leaves out; several threads may add to it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count ``count`` files of one kind; the first example of a kind in alphabetical order is kept.

        So it does not depend on which thread comes first.
        """
        if not count:
            return
        with self._lock:
            before, first = self._kinds.get(kind, (0, example))
            self._kinds[kind] = (before + count, min(first, example))

    def kinds(self) -> list[LeftOutKind]:
        """The kinds, the most frequent first."""
        ordered = sorted(self._kinds.items(), key=lambda item: (-item[1][0], item[0]))
        return [LeftOutKind(kind, count, example) for kind, (count, example) in ordered[:MOST_KINDS]]

    def is_expected(self) -> bool:
        """Whether all of it is hidden, or usual beside images."""
        return self._kinds.keys() <= EXPECTED
