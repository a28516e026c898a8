"""YAML with limits on size, depth and expansion, checked before objects are created.

PyYAML's safe loader runs no code but has no limits: aliases of aliases expand to more nodes than fit in memory, and a
number of a million digits takes minutes. This module counts the parser's events first.
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
"""Nodes of a document, with aliases expanded."""
MAX_ALIAS_NODES = 1_000
"""Nodes that aliases expand to, in total."""
MAX_NUMBER = 400
"""Characters of a plain scalar that starts like a number."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"[-+.]?[0-9]")
_TRIVIAL = re.compile(r"[^&*!{}\[\]\n\r:#]{0,200}")
"""Text without nesting, aliases or tags."""


class LimitExceeded(yaml.YAMLError):
    """A document that exceeds a limit."""


def check_limits(text: str) -> None:
    """Check the limits of text that may be YAML; text that is not YAML passes.

    Raises:
        LimitExceeded: it exceeds a limit.
    """
    try:
        check(text)
    except LimitExceeded:
        raise
    except yaml.YAMLError:
        pass


def check(text: str) -> None:
    """Check a document: limits, no repeated keys, no tags.

    Raises:
        yaml.YAMLError: it fails a check, or is not YAML.
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
    """Load a document that passes :func:`check`.

    Raises:
        yaml.YAMLError: it fails the check, or is not YAML.
    """
    check(text)
    try:
        return loader(text)
    except (ValueError, TypeError, RecursionError, OverflowError, AttributeError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


class _Collection:
    """A mapping or sequence whose end event has not been seen."""

    def __init__(self, anchor: str | None, is_mapping: bool) -> None:
        self.anchor = anchor
        self.is_mapping = is_mapping
        self.nodes = 1
        self.children = 0
        self.keys: set[str] = set()


class _Counter:
    """Counter of nodes, with aliases expanded, over parser events."""

    def __init__(self) -> None:
        self.open: list[_Collection] = []
        self.anchors: dict[str, int] = {}
        self.nodes = 0
        self.alias_nodes = 0

    def add(self, event: yaml.events.Event) -> None:
        """Count one event."""
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
