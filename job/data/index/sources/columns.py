"""Columns of a table: which one names the images, which one their labels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

from job.errors import ConfigError, DataError

NAMES = {
    "uri": (
        *("uri", "file_name", "filename", "path", "image", "image_path", "filepath", "file_path", "file"),
        *("url", "image_url", "image_uri", "img", "img_path"),
    ),
    "label": ("label", "class", "category", "target", "species", "labels", "class_name", "label_name"),
    "split": ("split", "ml_use", "subset"),
}
"""Names of columns that are understood, in any case; the first one is preferred to the others."""


class MissingColumn(DataError):
    """A table without a column that is needed."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; an empty one stands for those in :data:`NAMES`.

    Attributes:
        uri: paths or URIs of the images, or the images themselves.
        label: classes.
        split: parts (train, val, test).
    """

    uri: str = ""
    label: str = ""
    split: str = ""

    def find(self, table: str, names: Iterable[str]) -> Columns:
        """The columns of one table; empty where it has none.

        Args:
            table: URI, for messages.
            names: of all columns.

        Raises:
            DataError: there is no such column, or several might be meant.
        """
        names = list(names)
        return Columns(*(self._find(table, names, role.name) for role in fields(self)))

    def _find(self, table: str, names: list[str], role: str) -> str:
        chosen: str = getattr(self, role)
        if chosen:
            if chosen not in names:
                raise MissingColumn(f"{table} has no column {chosen}; it has {_listed(names)}. See --data.columns.")
            return chosen
        preferred, *others = NAMES[role]
        if preferred in names:
            return preferred
        simple = {name: re.sub(r"[\s-]+", "_", name.strip().lower()) for name in names}
        for accepted in ([preferred], others):
            candidates = [name for name in names if simple[name] in accepted]
            if len(candidates) > 1:
                raise DataError(
                    f"{table} has the columns {_listed(candidates)}: which one is the {role}? Give it by "
                    f"--data.columns {role}={candidates[0]} (--columns of index)."
                )
            if candidates:
                return candidates[0]
        return ""

    def __str__(self) -> str:
        """As the option gives them."""
        return ",".join(f"{role.name}={value}" for role in fields(self) if (value := getattr(self, role.name)))


def from_option(text: str | None, option: str = "--data.columns") -> Columns:
    """Columns as the command line gives them: ``uri=NAME,label=NAME,split=NAME``, any of them.

    Raises:
        ConfigError: it is something else.
    """
    names_by_role: dict[str, str] = {}
    for entry in (text or "").split(","):
        role, mark, name = entry.partition("=")
        if not entry.strip():
            continue
        if role.strip() not in NAMES or not mark or not name.strip() or role.strip() in names_by_role:
            raise ConfigError(f"{option} takes uri=NAME,label=NAME,split=NAME (any of the three), not {text!r}.")
        names_by_role[role.strip()] = name.strip()
    return Columns(**names_by_role)


def _listed(names: list[str]) -> str:
    return ", ".join(names)[:1000]
