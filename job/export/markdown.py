"""Text of other people in Markdown: names can act neither as markup, nor as HTML, nor as a line of their own."""

from __future__ import annotations

import re

from job.process.terminal import escape

MOST_CHARACTERS = 100
_PUNCTUATION = re.compile(r"([!-+./:-@\[-`{-~])")
"""ASCII punctuation, all of which CommonMark lets a backslash precede; not the comma and the hyphen."""


def escaped(text: str) -> str:
    """``text`` in a paragraph or in a cell of a table, cut after :data:`MOST_CHARACTERS`."""
    cut = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
    return _PUNCTUATION.sub(r"\\\1", escape(cut)).strip() or "–"
