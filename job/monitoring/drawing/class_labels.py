"""Class names, which others have chosen, as tags and captions."""

from __future__ import annotations

from collections.abc import Sequence

from job.process.terminal import escape
from job.redact import redact

LONGEST = 60
"""Characters of a label."""


def shortened(text: str, longest: int = LONGEST) -> str:
    """``text`` in one line of at most ``longest`` characters: control characters escaped, credentials redacted."""
    # A name may have a megabyte: it is cut before it is searched, and once more since escapes make it grow.
    text = escape(redact(text[: 10 * longest]))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def class_labels(classes: Sequence[str], longest: int = LONGEST) -> tuple[str, ...]:
    """A short label of each class, no two alike.

    Args:
        classes: class names, in the order of labels.
        longest: characters of a label.
    """
    labels: dict[str, None] = {}
    for number, name in enumerate(classes):
        label = shortened(name, longest)
        if label in labels:
            label = f"{shortened(name, longest - 10)} #{number}"
        while label in labels:
            label += "'"
        labels[label] = None
    return tuple(labels)
