"""Names and messages on their way to the terminal and the log."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings

import pytest

from job.process import terminal

HOSTILE = "[/b] [red]x[/red] :smile: \x1b[31m \x9b \u202e \udcff \x07 é 猫"


def test_escape() -> None:
    assert terminal.escape(HOSTILE) == r"[/b] [red]x[/red] :smile: \x1b[31m \x9b \u202e \udcff \x07 é 猫"
    assert terminal.escape("a\nb\r\t") == r"a\x0ab\x0d\x09"
    assert terminal.escape("a\nb\r", newlines=True) == "a\n    b" + r"\x0d"
    assert terminal.escape("👩\u200d🔬") == "👩\u200d🔬"


def test_tables_show_cells_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(["name", "[b]"], [(HOSTILE, 1), ("[/]", None)], title="runs/exp[lr=0.1]")
    output = capsys.readouterr().out
    assert "runs/exp[lr=0.1]" in output
    assert ":smile:" in output
    assert "[/b]" in output
    assert not set(output) & set("\x1b\x9b\u202e\udcff")


def test_an_ascii_terminal_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    terminal.say(f"▶ {HOSTILE}")
    terminal.print_table(["猫"], [(HOSTILE,)])
    assert rb"\u732b" in raw.getvalue()


@pytest.fixture
def protected(monkeypatch: pytest.MonkeyPatch):
    """Set the output up as the command line does; returns the output of a logger with a separate handler."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("somebody.else's")
    logger.addHandler(handler)
    for owner, name in ((sys, "excepthook"), (threading, "excepthook"), (warnings, "formatwarning")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    terminal.protect_output()
    yield stream
    logger.removeHandler(handler)


def test_log_records_warnings_and_tracebacks(protected: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "https://h/a?sig=Zecret9"
    logger = logging.getLogger("somebody.else's")
    logger.error("cannot read %s: %s", f"x\x1b[2J\n00:00:00 forged {secret}", secret)
    try:
        raise ValueError(f"\x1b {secret}")
    except ValueError:
        logger.exception("failed")
    print(warnings.formatwarning(UserWarning(f"\x1b {secret}"), UserWarning, "x.py", 1), file=sys.stderr)
    thread = threading.Thread(target=lambda: int(f"\x1b {secret}"))
    thread.start()
    thread.join()
    sys.excepthook(ValueError, ValueError(f"\x1b {secret}"), None)
    output = protected.getvalue() + capsys.readouterr().err
    assert "Zecret9" not in output
    assert "\x1b" not in output
    assert not [line for line in output.splitlines() if line.startswith("00:00:00 forged")]
    assert output.count("sig=***") >= 6
