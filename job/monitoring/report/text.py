"""Values as a person reads them."""

from __future__ import annotations

from job.process.terminal import escape

NAME_CHARACTERS = 80


def short(text: str, most: int = NAME_CHARACTERS) -> str:
    """A name of others, without control characters and cut in its middle."""
    text = escape(text[: 4 * most]) if len(text) <= 4 * most else escape(text[: 2 * most] + text[-2 * most :])
    if len(text) <= most:
        return text
    head = (most - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def number(value: float | None, digits: int = 4) -> str:
    """A measured value; an en dash for none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share, with one digit; an en dash for none."""
    return "–" if value is None else f"{value:.1%}"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """A number of bytes, in decimal units."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} B"
