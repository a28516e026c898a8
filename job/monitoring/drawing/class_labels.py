"""Names of classes and files, which others have chosen, as tags, captions and cells."""

from __future__ import annotations

from collections.abc import Sequence

from job.process.terminal import escape
from job.redact import redact

LONGEST = 60
"""Characters of a label."""
MOST_SEARCHED = 4096
"""Characters that are searched for credentials; a name may have a megabyte."""


def shortened(text: str, longest: int = LONGEST) -> str:
    """``text`` in one line of at most ``longest`` characters, cut in its middle.

    Control characters are escaped, credentials redacted.
    """
    text = escape(redact(text[:MOST_SEARCHED]))
    if len(text) <= longest:
        return text
    head = (longest - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


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
