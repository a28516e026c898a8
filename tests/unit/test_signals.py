"""Signals to small processes: exit codes and messages."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import REPOSITORY

from job.process.signals import STOP_SIGNALS

WAITS = """
import sys, time
from job.process.signals import Stopped, StopSignals
with StopSignals({grace}):
    try:
        print("ready", flush=True)
        time.sleep(600)
    except Stopped as stopped:
        print(stopped, stopped.exit_code, flush=True)
        {then}
"""


def start(code: str, *prefix: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 143)])
def test_the_first_signal_raises(name: str, code: int) -> None:
    process = start(WAITS.format(grace=300, then="sys.exit(stopped.exit_code)"))
    process.send_signal(signal.Signals[name])
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output, errors) == (code, f"stopped by {name}. {code}\n", "")


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not() -> None:
    process = start(WAITS.format(grace=600, then="time.sleep(600)"))
    assert process.stdout is not None
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopped by SIGINT. 130\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == "job: stopped at once by a second SIGINT: what was not saved is lost.\n"


def test_the_grace_holds_whatever_the_main_thread_does() -> None:
    process = start(WAITS.format(grace=0.5, then="time.sleep(600)"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "could not stop cleanly" in errors


def test_sighup_does_not_stop_a_process_started_by_nohup() -> None:
    process = start(WAITS.format(grace=300, then="sys.exit(stopped.exit_code)"), "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 143


def test_an_inner_context_hands_its_signal_to_the_outer_one() -> None:
    """Otherwise a SIGTERM during shutdown would raise a second time."""
    code = """
import os, signal, sys
from job.process.signals import Stopped, StopSignals
print("ready", flush=True)
with StopSignals(300):
    try:
        with StopSignals(300):
            os.kill(os.getpid(), signal.SIGINT)
    except Stopped as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        sys.exit(stopped.exit_code)
"""
    assert start(code).wait(300) == 130


def test_the_deadline_of_an_inner_context_holds_in_the_outer_one() -> None:
    """Also where the inner one ends before its thread has seen the signal."""
    code = """
import os, signal, time
from job.process.signals import Stopped, StopSignals
print("ready", flush=True)
with StopSignals(None):
    try:
        with StopSignals(0.5):
            os.kill(os.getpid(), signal.SIGTERM)
    except Stopped:
        time.sleep(600)
"""
    for process in [start(code) for _ in range(5)]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 143
        assert errors.startswith("job: could not stop cleanly within 0 s of the signal")


def handles_signals(pid: int) -> bool:
    """Whether a process has set all handlers: Python itself sets one of SIGINT alone."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return all(int(caught, 16) >> (number - 1) & 1 for number in STOP_SIGNALS)


@pytest.mark.parametrize("seconds", [0.4, 1.5])
def test_a_ctrl_c_during_the_imports(seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "job", "fit", "--help-all"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        preexec_fn=os.setsid,
    )
    deadline = time.monotonic() + 300
    while not handles_signals(process.pid):  # the interpreter itself may take long to start
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.endswith("job: stopped by SIGINT while starting: nothing was begun.\n")
    assert "Traceback" not in errors
