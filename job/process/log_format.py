"""Whether the log is text or JSON lines, and one JSON line.

Imported before anything large, so only the standard library is. The fields of a line are those that Cloud Logging's
agents on GKE and Vertex AI understand (https://cloud.google.com/logging/docs/structured-logging).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

VARIABLE = "JOB_LOG"
"""The environment variable that does what ``--log`` does."""
CHOICES = ("text", "json", "auto")
_CONTAINERS = ("KUBERNETES_SERVICE_HOST", "CLUSTER_SPEC", "CLOUD_ML_JOB_ID")
"""Variables that Kubernetes and Vertex AI set in every container."""
ERASE_LINE = "\r\x1b[2K"
"""Erases the line that the cursor is in (ECMA-48)."""
MAX_CHARACTERS = 100_000
"""Length at which a text is cut; Cloud Logging refuses entries of more than 256 KiB."""


def log_format(environment: Mapping[str, str] = os.environ, *, is_terminal: bool | None = None) -> LogFormat:
    """The format that ``JOB_LOG`` names, or for "auto": JSON on Kubernetes and Vertex AI, text on a terminal.

    Args:
        environment: environment variables.
        is_terminal: whether stderr is a terminal; default: find out.
    """
    chosen = environment.get(VARIABLE, "auto")
    if chosen == "json":
        return "json"
    if chosen == "text" or not any(name in environment for name in _CONTAINERS):
        return "text"
    return "text" if (_is_terminal() if is_terminal is None else is_terminal) else "json"


def can_redraw() -> bool:
    """Whether stderr is a terminal whose lines can be erased."""
    return _is_terminal() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def json_line(severity: str, message: str, *, time: float | None = None, **fields: Any) -> str:
    """One log entry as a line of strict JSON, without the newline.

    Args:
        severity: of Cloud Logging: DEBUG, INFO, WARNING, ERROR or CRITICAL.
        message: the text of the entry.
        time: seconds since 1970; default: now.
        fields: further entries; a number that is not finite becomes null.
    """
    moment = datetime.now(UTC) if time is None else datetime.fromtimestamp(time, UTC)
    entry = {
        "severity": severity,
        "message": _shortened(message),
        "time": moment.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        **{name: _strict(value) for name, value in {**fields, **_identity()}.items()},
    }
    return json.dumps(entry, ensure_ascii=False, allow_nan=False)


def final_line(message: str, severity: str = "ERROR") -> str:
    """The line by which a process says why it ends, in the format of the log; a bar that is drawn is erased."""
    if log_format() == "json":
        return json_line(severity, message)
    return f"{ERASE_LINE}{message}" if can_redraw() else message


def _is_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def _identity() -> dict[str, int]:
    """Rank and world size, where the launcher has set them."""
    numbers = {"rank": os.environ.get("RANK", ""), "world_size": os.environ.get("WORLD_SIZE", "")}
    return {name: int(text) for name, text in numbers.items() if text.isdecimal()}


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _strict(each) for name, each in value.items()}
    if isinstance(value, str):
        return _shortened(value)
    return value


def _shortened(text: str) -> str:
    """The beginning and the end of a text that is too long; lone surrogates, which are not UTF-8, are escaped."""
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()
