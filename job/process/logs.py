"""Logging of the command line: text for a person, or JSON lines for Cloud Logging.

All records of this process go through one handler: those of this package, of libraries, warnings, the tracebacks that
end a thread or the process, and the message by which a command says why it failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from job.errors import ConfigError
from job.process import log_format
from job.process.log_format import CHOICES, json_line
from job.process.terminal import SafeFormatter, clean_lines, protect_output, say

SECONDS_VARIABLE = "JOB_LOG_SECONDS"
"""The environment variable that does what ``--log_seconds`` does."""
DEFAULT_SECONDS = 10.0
OPTIONS = {"--log": log_format.VARIABLE, "--log_seconds": SECONDS_VARIABLE, "--log-seconds": SECONDS_VARIABLE}
"""Options of every command, and the environment variables by which its child processes get them."""
HELP = """\
options of all commands:
  --log FORMAT                text, json (lines with the fields of Cloud Logging) or auto: json on Kubernetes and
                              Vertex AI unless stderr is a terminal. Also JOB_LOG. Default: auto.
  --log_seconds SECONDS       Time between two lines of progress where no bar is drawn. Also JOB_LOG_SECONDS.
                              Default: 10."""

_LEVELS = {
    # Lightning's tips, and what this package logs in its own words.
    "pytorch_lightning": logging.WARNING,
    "lightning_fabric": logging.WARNING,
    "httpx": logging.WARNING,
    "httpx2": logging.WARNING,
    "fsspec": logging.WARNING,
    "google": logging.WARNING,
    "torch.distributed": logging.WARNING,
    # gcsfs logs a traceback for each failed request, in addition to our error message.
    "gcsfs": logging.CRITICAL,
}
"""Lowest level that is shown of a library. Libraries set the levels of their loggers when they are imported."""
_WARNINGS = (
    # Validation metrics are synchronised before they are logged.
    ".*sync_dist=True.*",
    # The frozen backbone is in eval mode on purpose.
    r".*module\(s\) in eval mode.*",
    ".*does not have many workers.*",
    # The last step of an epoch is logged, whatever the interval.
    ".*smaller than the logging interval.*",
    ".*LeafSpec.*",  # Lightning's own use of torch
)
"""Warnings of libraries that ask for nothing."""
_VARIABLES = {
    # Python's resource tracker, another process, warns of semaphores of processes that were killed.
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
    # torch's profiler prints errors where there is no GPU, and marks of its own; 99 is above its highest level.
    "KINETO_LOG_LEVEL": "99",
}
"""Environment variables by which libraries that do not use :mod:`logging` are silenced."""
_SEVERITIES = ((logging.CRITICAL, "CRITICAL"), (logging.ERROR, "ERROR"), (logging.WARNING, "WARNING"))

_position: Mapping[str, int] = {}
"""Where in its training this process is; replaced as a whole, so that other threads may read it."""


def set_position(epoch: int, global_step: int) -> None:
    """Say where in its training this process is, for the JSON records that follow.

    Args:
        epoch: the epoch in training, from 1.
        global_step: optimizer steps done.
    """
    global _position
    _position = {"epoch": epoch, "global_step": global_step}


def clear_position() -> None:
    """Say that this process does not train any longer."""
    global _position
    _position = {}


def take_options(args: Sequence[str]) -> list[str]:
    """The arguments without :data:`OPTIONS`, whose values become environment variables, for child processes, too."""
    rest = list(args)
    for place in range(len(rest) - 1, -1, -1):
        name, equals, value = rest[place].partition("=")
        if name in OPTIONS:
            if not equals:
                value = rest.pop(place + 1) if place + 1 < len(rest) else ""
            del rest[place]
            os.environ[OPTIONS[name]] = value
    return rest


def seconds() -> float:
    """Time between two lines of progress.

    Raises:
        ConfigError: ``--log_seconds`` is no positive number.
    """
    text = os.environ.get(SECONDS_VARIABLE, str(DEFAULT_SECONDS))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--log_seconds (or {SECONDS_VARIABLE}) must be a number above 0, not {text!r}.")
    return value


def set_up(rank: int, *, is_rank: bool) -> None:
    """Send all log records of this process to stderr, in the format of ``--log``.

    Args:
        rank: of this process; only warnings and errors are logged on ranks other than 0.
        is_rank: this process trains, or does another command's work; a launcher does not.

    Raises:
        ConfigError: there is no such format; records go to stderr all the same.
    """
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    handler = StderrHandler(erases_line=not is_rank or rank > 0)
    handler.addFilter(_is_shown)
    if log_format.log_format() == "json":
        handler.setFormatter(JSONFormatter({"rank": 0, "world_size": 1} if is_rank else {}))
    else:
        prefix = "" if rank == 0 else f"[rank {rank}] "
        handler.setFormatter(SafeFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S")))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    logging.setLoggerClass(_LibraryLogger)
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and any(map(_prints, logger.handlers)):
            logger.handlers = [each for each in logger.handlers if not _prints(each)]
            logger.propagate = True
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.captureWarnings(True)
    protect_output()
    if is_json():
        sys.excepthook = lambda kind, error, at: _log_exception("uncaught exception", (kind, error, at))
        threading.excepthook = _log_thread_exception
    if (chosen := os.environ.get(log_format.VARIABLE, "auto")) not in CHOICES:
        raise ConfigError(f"--log (or {log_format.VARIABLE}) must be text, json or auto, not {chosen!r}.")
    seconds()


def is_json() -> bool:
    """Whether this process logs JSON lines."""
    return any(isinstance(handler.formatter, JSONFormatter) for handler in logging.root.handlers)


def report(message: str, level: int = logging.ERROR, **fields: str) -> None:
    """Print a message of the command itself to stderr, whatever the level of the log: as it is, or as a JSON record.

    Args:
        fields: further entries of the JSON record.
    """
    if is_json():
        logger = logging.getLogger("job")
        logger.handle(logger.makeRecord("job", level, "", 0, message, (), None, extra={"fields": fields}))
    else:
        if log_format.can_redraw():  # another process may have drawn a bar
            sys.stderr.write(log_format.ERASE_LINE)
        say(message, file=sys.stderr)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the moment: while a progress bar is drawn, that puts text above it.

    Args:
        erases_line: erase the line of a terminal first, in which another process may have drawn a bar.
    """

    def __init__(self, *, erases_line: bool = False) -> None:
        logging.Handler.__init__(self)
        self.erases_line = erases_line

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if self.erases_line and log_format.can_redraw():
            with contextlib.suppress(OSError):
                sys.stderr.write(log_format.ERASE_LINE)
        super().emit(record)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The standard error stream."""
        return sys.stderr


class JSONFormatter(SafeFormatter):
    """A record as a JSON line with the special fields of Cloud Logging, redacted and escaped.

    Beside them there are: rank and world_size, epoch and global_step in training, the name of the logger, the fields
    of ``extra={"fields": {...}}``, and the traceback as stack_trace.

    Args:
        fields: entries of every line; a record's own and the variables of the launcher take precedence.
    """

    def __init__(self, fields: Mapping[str, int]) -> None:
        super().__init__(logging.Formatter())
        self.fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields: dict[str, Any] = {"logger": record.name, **self.fields, **_position}
        for name, value in getattr(record, "fields", {}).items():
            fields[name] = clean_lines(value) if isinstance(value, str) else value
        if record.exc_info and record.exc_info[0] is not None:
            fields["stack_trace"] = clean_lines(self.inner.formatException(record.exc_info))
        elif record.stack_info:
            fields["stack_trace"] = clean_lines(record.stack_info)
        severity = next((name for least, name in _SEVERITIES if record.levelno >= least), None)
        severity = severity or ("INFO" if record.levelno >= logging.INFO else "DEBUG")
        return json_line(severity, clean_lines(record.getMessage()).rstrip("\n"), time=record.created, **fields)


class _LibraryLogger(logging.Logger):
    """A logger whose records are printed once: by the handler of the root logger, in place of a library's own."""

    _is_redirected = False
    _propagates = True

    def addHandler(self, hdlr: logging.Handler) -> None:
        """Add a handler, unless it prints."""
        if _prints(hdlr):
            self._is_redirected = True
        else:
            super().addHandler(hdlr)

    @property
    def propagate(self) -> bool:
        """Whether records reach the root logger: as a library sets it, but always in place of its own handler."""
        return self._propagates or self._is_redirected

    @propagate.setter
    def propagate(self, value: bool) -> None:
        self._propagates = value


def _prints(handler: logging.Handler) -> bool:
    """Whether a handler writes to stdout or stderr: one of the standard library, or torch's."""
    if type(handler) is logging.StreamHandler:
        return handler.stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    return type(handler).__name__ == "_StderrHandler"


def _is_shown(record: logging.LogRecord) -> bool:
    name = record.name
    while name:
        if name in _LEVELS:
            return record.levelno >= _LEVELS[name]
        name = name.rpartition(".")[0]
    return True


def _log_exception(message: str, exception: Any) -> None:
    if not issubclass(exception[0], SystemExit):
        logging.getLogger("job").critical("%s: %s", message, exception[1] or exception[0].__name__, exc_info=exception)


def _log_thread_exception(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "unknown"
    _log_exception(f"exception in thread {name}", (args.exc_type, args.exc_value, args.exc_traceback))
