"""YAML whose size, depth and expansion are checked before anything is made of it.

PyYAML's safe loader creates no objects but builds what it is asked for: aliases of aliases stand for more nodes than
there is memory, and a number of a million digits takes minutes. Here the events of the parser are counted first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, MappingStartEvent, ScalarEvent

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 50_000
"""Nodes of a document, every alias counted with all that it stands for."""
MAX_ALIAS_NODES = 1_000
"""Nodes that aliases stand for, in all."""
MAX_NUMBER = 400
"""Characters of a plain scalar that begins like a number."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"[-+.]?[0-9]")
_TRIVIAL = re.compile(r"[^&*!{}\[\]\n\r:#]{0,200}")
"""Text without anything that nests, repeats or names a type."""


class LimitExceeded(yaml.YAMLError):
    """A document that is too large to be read, whatever it says."""


def check_limits(text: str) -> None:
    """Refuse text that would be too large if it were read as YAML; text that is none passes.

    Raises:
        LimitExceeded: it is too large.
    """
    try:
        check(text)
    except LimitExceeded:
        raise
    except yaml.YAMLError:
        pass


def check(text: str) -> None:
    """Refuse a document that is too large, nests too deep, repeats a key, expands too far or names types.

    Raises:
        yaml.YAMLError: it is one, or is no YAML.
    """
    if _TRIVIAL.fullmatch(text) and not _NUMBER.match(text.strip()):
        return
    if len(text) > MAX_BYTES or len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise LimitExceeded(f"more than {MAX_BYTES:,} bytes")
    counter = _Counter()
    try:
        for event in yaml.parse(text, Loader=_Loader):
            counter.add(event)
    except (ValueError, RecursionError, UnicodeError) as error:
        raise yaml.YAMLError(str(error)) from error


def load(text: str, loader: Callable[[str], Any] = yaml.safe_load) -> Any:
    """The content of a document that passes :func:`check`.

    Raises:
        yaml.YAMLError: it does not, or is no YAML.
    """
    check(text)
    try:
        return loader(text)
    except (ValueError, TypeError, RecursionError, OverflowError, AttributeError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


class _Collection:
    """A mapping or a sequence that has not ended yet."""

    def __init__(self, anchor: str | None, is_mapping: bool) -> None:
        self.anchor = anchor
        self.is_mapping = is_mapping
        self.nodes = 1
        self.children = 0
        self.keys: set[str] = set()


class _Counter:
    """Counts nodes, with aliases expanded, over the events of a parser."""

    def __init__(self) -> None:
        self.open: list[_Collection] = []
        self.anchors: dict[str, int] = {}
        self.nodes = 0
        self.alias_nodes = 0

    def add(self, event: yaml.events.Event) -> None:
        """Take one event into account."""
        if isinstance(event, CollectionStartEvent):
            self._require_no_tag(event)
            self._require_no_key(event)
            self.open.append(_Collection(event.anchor, isinstance(event, MappingStartEvent)))
            if len(self.open) > MAX_DEPTH:
                raise LimitExceeded(f"line {_line(event)}: more than {MAX_DEPTH} levels deep")
        elif isinstance(event, CollectionEndEvent):
            ended = self.open.pop()
            self._count(ended.nodes, event, ended.anchor)
        elif isinstance(event, ScalarEvent):
            self._require_no_tag(event)
            self._require_short_number(event)
            if "&" in event.value and "*" in event.value:
                check_limits(event.value)  # jsonargparse reads the strings of a document as YAML again
            self._require_new_key(event)
            self._count(1, event, event.anchor)
        elif isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise yaml.YAMLError(f"line {_line(event)}: alias *{event.anchor} stands for nothing that came before")
            nodes = self.anchors[event.anchor]
            self.alias_nodes += nodes
            if self.alias_nodes > MAX_ALIAS_NODES:
                raise LimitExceeded(f"line {_line(event)}: aliases stand for more than {MAX_ALIAS_NODES:,} values")
            self._count(nodes, event, None)

    def _count(self, nodes: int, event: yaml.events.Event, anchor: str | None) -> None:
        if anchor is not None:
            if anchor in self.anchors:
                raise yaml.YAMLError(f"line {_line(event)}: anchor &{anchor} is defined twice")
            self.anchors[anchor] = nodes
        if self.open:
            self.open[-1].nodes += nodes
            self.open[-1].children += 1
            self.nodes = max(self.nodes, sum(each.nodes for each in self.open))
        if self.nodes > MAX_NODES:
            raise LimitExceeded(f"line {_line(event)}: more than {MAX_NODES:,} values")

    def _is_key(self) -> bool:
        return bool(self.open) and self.open[-1].is_mapping and self.open[-1].children % 2 == 0

    def _require_new_key(self, event: ScalarEvent) -> None:
        if self._is_key():
            if event.value in self.open[-1].keys:
                raise yaml.YAMLError(f"line {_line(event)}: the key {event.value!r} occurs twice")
            self.open[-1].keys.add(event.value)

    def _require_no_key(self, event: CollectionStartEvent) -> None:
        if self._is_key():
            raise yaml.YAMLError(f"line {_line(event)}: a list or a mapping cannot be a key")

    @staticmethod
    def _require_no_tag(event: CollectionStartEvent | ScalarEvent) -> None:
        if event.tag is not None and event.tag != "!":
            raise yaml.YAMLError(f"line {_line(event)}: the tag {event.tag!r} is not supported")

    @staticmethod
    def _require_short_number(event: ScalarEvent) -> None:
        if event.implicit[0] and len(event.value) > MAX_NUMBER and _NUMBER.match(event.value):
            raise LimitExceeded(
                f"line {_line(event)}: a number of {len(event.value):,} characters. Quote it if it is text"
            )


def _line(event: yaml.events.Event) -> int:
    return int(event.start_mark.line) + 1 if event.start_mark else 0
