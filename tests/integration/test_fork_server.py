"""Processes forked by the tests behave like processes started by ``python -m``."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import fork_server
import pytest
from support import environment, run, start

pytestmark = pytest.mark.integration

PROBE = """
import atexit, json, multiprocessing, os, signal, sys, tempfile, threading

if __name__ == "__main__":
    atexit.register(lambda: print("the end", flush=True))
    descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    print(json.dumps({
        "argv": sys.argv[1:],
        "path": sys.path[:2],
        "folder": os.getcwd(),
        "variables": dict(os.environ),
        "temporary": tempfile.gettempdir(),
        "threads": threading.active_count(),
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)],
        "descriptors": len(descriptors),
        "method": multiprocessing.get_start_method(allow_none=True),
        "leads_a_session": os.getsid(0) == os.getpid(),
        "spec": __spec__.name,
        "buffered": not sys.stdout.write_through,
    }))
    if "wait" in sys.argv:
        sys.stdout.flush()
        signal.pause()
    sys.exit(7)
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "probe.py").write_text(PROBE)
    return tmp_path


def probed(folder: Path, *, fresh: bool, session: bool, **variables: str) -> tuple[int, dict[str, Any]]:
    env = environment(PYTHONPATH=str(folder / "modules"), TMPDIR=str(folder), **variables)
    with (folder / "out").open("w") as file:
        process = start("--a", 3, stdout=file, stderr=file, module="probe", fresh=fresh, session=session, variables=env)
        code = process.wait(300)
    line, end = (folder / "out").read_text().splitlines()
    assert end == "the end"
    return code, json.loads(line)


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1", "JOB_X": "y"}], ids=["none", "some"])
def test_a_forked_process_is_like_a_new_one(session: bool, variables: dict[str, str], probe: Path) -> None:
    forked = probed(probe, fresh=False, session=session, **variables)
    assert forked == probed(probe, fresh=True, session=session, **variables)
    assert forked[0] == 7


def test_a_forked_process_receives_signals_and_is_waited_for(probe: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with (probe / "out").open("w") as file:
            process = start(
                "wait",
                stdout=file,
                stderr=file,
                module="probe",
                variables=environment(PYTHONPATH=str(probe / "modules")),
            )
            while not (probe / "out").read_text():
                assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
            process.send_signal(number)
            assert process.wait(300) == process.poll() == -number
        assert not Path(f"/proc/{process.pid}").exists()


def test_variables_that_libraries_read_need_a_new_interpreter() -> None:
    assert fork_server.can_fork(environment())
    assert not fork_server.can_fork({**environment(), "OMP_NUM_THREADS": "2"})


@pytest.mark.parametrize("fresh", [False, True])
def test_the_command_line_gives_its_code_and_both_streams(fresh: bool) -> None:
    result = run("fti", fresh=fresh)
    assert result.returncode == 2
    assert "Did you mean fit?" in result.stderr
    assert run("--version", fresh=fresh).stdout.startswith("job ")
