"""The log of a command: text or JSON lines, each record once."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import huggingface_hub.utils.logging
import pytest
import torch  # noqa: F401  (its logger has a handler)
from support import REPOSITORY, environment, run_here

from job.errors import ConfigError
from job.process import log_format, logs

KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
VERTEX = {"CLUSTER_SPEC": "{}", "CLOUD_ML_JOB_ID": "4242"}
SECRET = "https://h/a?sig=Zecret9"

Records = Callable[[], list[dict[str, Any]]]


def parsed(text: str) -> list[dict[str, Any]]:
    """Every line as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Reads what was written to stderr; logging is as before afterwards."""
    root = logging.root
    handlers, level, kind = list(root.handlers), root.level, logging.getLoggerClass()
    for owner, name in ((sys, "excepthook"), (threading, "excepthook"), (warnings, "formatwarning")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    for name in ("RANK", "WORLD_SIZE", "JOB_LOG", "JOB_LOG_SECONDS", *KUBERNETES, *VERTEX):
        monkeypatch.delenv(name, raising=False)
    logging.captureWarnings(False)
    with warnings.catch_warnings():
        yield lambda: capsys.readouterr().err
        logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.setLoggerClass(kind)


@pytest.fixture
def records(shown: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> Records:
    """Reads the JSON records of rank 3 of 4."""
    for name, value in {"JOB_LOG": "json", "RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    logs.set_up(0, is_rank=True)
    return lambda: parsed(shown())


def test_a_record_has_the_fields_of_cloud_logging(records: Records) -> None:
    before = datetime.now(UTC)
    logs.set_position(epoch=2, global_step=70)
    try:
        extra = {"fields": {"x": float("nan")}}
        logging.getLogger("somebody").warning("line 1 %s\nline\x1b 2\udcff", SECRET, extra=extra)
    finally:
        logs.clear_position()
    logging.getLogger("job").info("later", extra={"fields": {"uri": SECRET, "n": 1.5}})
    first, second = records()
    assert first["severity"] == "WARNING"
    assert first["message"] == "line 1 https://h/a?sig=***\nline\\x1b 2\\udcff"
    assert before <= datetime.fromisoformat(first["time"]) <= datetime.now(UTC)
    assert first["time"].endswith("Z")
    expected = {"logger": "somebody", "rank": 3, "world_size": 4, "epoch": 2, "global_step": 70, "x": None}
    assert expected.items() <= first.items()
    assert second["severity"] == "INFO"
    assert "epoch" not in second
    assert (second["uri"], second["n"]) == ("https://h/a?sig=***", 1.5)


def test_a_traceback_is_one_record(records: Records) -> None:
    def fail() -> None:
        raise ValueError(f"bad\x1b {SECRET}")

    try:
        fail()
    except ValueError:
        logging.getLogger("job").exception("failed:")
    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
    try:
        fail()
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    warnings.warn(f"careful {SECRET}", stacklevel=1)
    logged, in_thread, uncaught, warning = records()
    for record in (logged, in_thread, uncaught):
        assert record["severity"] in ("ERROR", "CRITICAL")
        assert record["stack_trace"].startswith("Traceback (most recent call last):\n")
        assert record["stack_trace"].endswith("ValueError: bad\\x1b https://h/a?sig=***")
    assert in_thread["message"].startswith("exception in thread worker: bad")
    assert warning["severity"] == "WARNING"
    assert "UserWarning: careful https://h/a?sig=***" in warning["message"]


def test_a_record_is_bounded(records: Records) -> None:
    logging.getLogger("job").error("a" * 300_000 + "z")
    (record,) = records()
    assert len(record["message"]) < 101_000
    assert record["message"].endswith("az")


@pytest.mark.parametrize("form", ["text", "json"])
def test_records_of_libraries_are_printed_once(
    form: str, shown: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They add handlers of their own, before and after the log is set up."""
    monkeypatch.setenv("JOB_LOG", form)
    early = logging.getLogger("test.early")
    early.addHandler(logging.StreamHandler())
    logs.set_up(0, is_rank=True)
    late = logging.getLogger(f"test.late.{form}")
    late.addHandler(logging.StreamHandler())
    late.propagate = False
    events = logging.getLogger(f"test.events.{form}")  # as torch elastic's: for nobody
    events.addHandler(logging.NullHandler())
    events.propagate = False
    hub = huggingface_hub.utils.logging.get_logger("huggingface_hub.utils._http")
    for number, logger in enumerate((early, late, hub, logging.getLogger("torch"))):
        logger.warning("Retrying in %ds", number)
    events.warning("an event")
    text = shown()
    lines = text.splitlines()
    assert [line.count("Retrying in") for line in lines] == [1] * 4
    if form == "json":
        assert [record["logger"] for record in parsed(text)][1:3] == [late.name, hub.name]


def test_what_asks_for_nothing_is_left_out(shown: Callable[[], str]) -> None:
    logs.set_up(0, is_rank=True)
    lightning = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)  # Lightning's own, at its import
    lightning.info("GPU available: False, used: False")
    lightning.warning("something to act on")
    warnings.warn("The number of training batches (3) is smaller than the logging interval …", stacklevel=1)
    warnings.warn("another one", stacklevel=1)
    first, second = shown().splitlines()
    assert first.endswith("something to act on")
    assert second.endswith("UserWarning: another one")


@pytest.mark.parametrize(
    ("variables", "is_terminal", "expected"),
    [
        ({}, False, "text"),
        (KUBERNETES, False, "json"),
        (VERTEX, False, "json"),
        (KUBERNETES, True, "text"),
        ({**KUBERNETES, "JOB_LOG": "text"}, False, "text"),
        ({**KUBERNETES, "JOB_LOG": "auto"}, False, "json"),
        ({"JOB_LOG": "json"}, True, "json"),
    ],
)
def test_json_is_automatic_in_clusters(variables: dict[str, str], is_terminal: bool, expected: str) -> None:
    assert log_format.log_format(variables, is_terminal=is_terminal) == expected


def test_the_options_are_those_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JOB_LOG", "JOB_LOG_SECONDS"):
        monkeypatch.setenv(name, "")
    assert logs.take_options(["--log", "json", "fit", "--log_seconds=3", "--trainer.log_every_n_steps", "1"]) == [
        *("fit", "--trainer.log_every_n_steps", "1")
    ]
    assert (os.environ["JOB_LOG"], os.environ["JOB_LOG_SECONDS"], logs.seconds()) == ("json", "3", 3.0)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "often"])
def test_seconds_that_make_no_sense(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_LOG_SECONDS", value)
    with pytest.raises(ConfigError, match=r"--log_seconds .* must be a number above 0"):
        logs.seconds()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["index", "--outptu", "x"], "job: error: unrecognized arguments: --outptu=x\nDid you mean --output?"),
        (["fit", "--data.rot", "x"], "job: error: unrecognized arguments: --data.rot=x\nDid you mean --data.root?"),
        (["fti"], "job: error: unknown command 'fti'. Did you mean fit?"),
        (["--log", "xml", "index"], "job: error: --log (or JOB_LOG) must be text, json or auto, not 'xml'."),
    ],
)
def test_mistakes_are_reported_as_json(
    args: list[str], message: str, shown: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first line on: before a parser is built."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("JOB_LOG", "auto")
    ended = run_here(*args)
    assert ended.returncode == 2
    (record,) = parsed(ended.output)
    assert record["message"].startswith(message)
    assert record["severity"] == "ERROR"


def test_a_signal_while_starting_is_reported_as_json() -> None:
    script = "import os; from job.process import signals; signals.end_at_once(); os.kill(os.getpid(), 15); input()"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(JOB_LOG="json"), cwd=REPOSITORY
    )
    assert ended.returncode == 128 + signal.SIGTERM
    (record,) = parsed(ended.stderr)
    assert record["message"] == "job: stopped by SIGTERM while starting: nothing was begun."
