"""Safe output of tables, lines and log records: no name can act as markup, colour or a line of its own.

Names of files and classes come from data sets that others have made. Everything printed or logged goes through here:
credentials are redacted, control characters are escaped, markup is never interpreted.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TextIO

from rich.box import HEAVY_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from job.redact import redact

_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's control, format (with the overrides of direction), surrogate and separator characters."""
_JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need."""
_INDENT = "\n    "
_UNLIMITED = 100_000
"""Width of a table that is not cut."""


def escape(text: str, *, newlines: bool = False) -> str:
    """``text`` with control characters, overrides of direction and surrogates as backslash escapes.

    Args:
        newlines: keep newlines, and tabs; what follows is indented, so that it cannot pass for a line of its own.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" if newlines else ""
    escaped = "".join(
        character
        if character in kept or character in _JOINERS or unicodedata.category(character) not in _ESCAPED
        else _escape(character)
        for character in text
    )
    return escaped.replace("\n", _INDENT) if newlines else escaped


def clean(text: str) -> str:
    """A message of several lines, redacted and escaped."""
    return escape(redact(text), newlines=True)


def clean_lines(text: str) -> str:
    """A text of several lines, redacted, each line escaped, for a format in which no line can pass for a record."""
    return "\n".join(escape(line) for line in redact(text.expandtabs(4)).split("\n"))


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a message; characters that the terminal cannot encode are escaped."""
    stream = file or sys.stdout
    _write(stream, clean(text) + "\n")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", right: Sequence[str] = ()
) -> None:
    """Print a table; cells are not interpreted as markup, and are neither cut nor broken, so that they can be copied.

    A table that is wider than the terminal has no frame, and its lines continue on the next one.

    Args:
        columns: headings; where all are empty, rows are lines without a frame.
        title: a line above.
        right: headings of the columns to align to the right.
    """
    cells = [[escape(redact(str(cell))) for cell in row] for row in rows]
    headings = [escape(name) for name in columns]
    has_frame = any(columns)
    if has_frame and sys.stdout.isatty():
        longest = [max(map(cell_len, column)) for column in zip(headings, *cells, strict=True)]
        has_frame = sum(longest) + 3 * len(longest) + 1 <= Console(file=sys.stdout).width
    table = Table(
        show_header=any(columns),
        box=HEAVY_HEAD if has_frame else None,
        pad_edge=has_frame,
        padding=(0, 1) if has_frame else (0, 2, 0, 0),
    )
    for name in columns:
        table.add_column(Text(escape(name)), justify="right" if name in right else "left", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console(width=_UNLIMITED, markup=False, highlight=False, emoji=False, file=sys.stdout)
    with console.capture() as capture:
        console.print(table, soft_wrap=True)
    lines = [escape(redact(title))] if title else []
    _write(sys.stdout, "\n".join([*lines, *(line.rstrip() for line in capture.get().splitlines())]) + "\n")


class SafeFormatter(logging.Formatter):
    """Formatter that redacts and escapes the output of another formatter, tracebacks included."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record; a second line is indented."""
        return clean(self.inner.format(record).rstrip("\n"))


def protect_output() -> None:
    """Redact and escape all log handlers that exist now, warnings, and tracebacks that end a thread or the process."""
    loggers = [
        logging.root,
        *(each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)),
    ]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if not isinstance(handler.formatter, SafeFormatter):
            handler.setFormatter(SafeFormatter(handler.formatter or logging.Formatter()))
    if warnings.formatwarning is not _format_warning:
        warnings.formatwarning = _format_warning
    sys.excepthook = _print_traceback
    threading.excepthook = _print_thread_traceback


_python_format_warning = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    # Without the line of the source, which says less than the message.
    return clean(_python_format_warning(message, category, filename, lineno, line or "").rstrip("\n")) + "\n"


def _print_traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit):
        say("".join(traceback.format_exception(kind, error, at)).rstrip(), file=sys.stderr)


def _print_thread_traceback(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit and args.exc_value is not None:
        name = args.thread.name if args.thread else "unknown"
        say(f"exception in thread {name}", file=sys.stderr)
        _print_traceback(args.exc_type, args.exc_value, args.exc_traceback)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _write(stream: TextIO, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
