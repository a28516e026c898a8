"""Temporary folders are deleted at exit, and never while they are used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import own_messages

from job.process import temporary

ENDS = {
    "normal": "",
    "exception": "raise ValueError",
    "exit": "import sys; sys.exit(3)",
    "os._exit": "import os; temporary.remove_all(); os._exit(75)",
    "child": "import os; pid = os.fork(); pid or exit(); os.waitpid(pid, 0); assert folder.exists()",
}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def start(room: Path, code: str) -> subprocess.Popen[str]:
    text = f"from job.process import temporary; folder = temporary.folder('x'); print(folder, flush=True); {code}"
    environment = {**os.environ, "TMPDIR": str(room)}
    return subprocess.Popen([sys.executable, "-c", text], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", ENDS)
def test_a_folder_is_deleted_however_the_process_ends(end: str, room: Path) -> None:
    process = start(room, ENDS[end])
    assert "job-x-" in process.communicate(timeout=300)[0]
    assert process.returncode == {"exception": 1, "exit": 3, "os._exit": 75}.get(end, 0)
    assert list(room.iterdir()) == []


def test_only_folders_of_dead_processes_are_deleted(room: Path) -> None:
    process = start(room, "import time; time.sleep(600)")
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    os.kill(process.pid, signal.SIGSTOP)  # alive, however long it does nothing
    mine = temporary.folder("y")
    temporary.delete_stale()
    assert folder.exists()
    process.kill()
    process.communicate()
    temporary.delete_stale()
    assert not folder.exists()
    assert mine.exists()
    temporary.remove(mine)
    assert not mine.exists()


def test_temporary_folders_are_private(room: Path) -> None:
    folder = temporary.folder("x")
    file = temporary.create_file(folder / "state")
    assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    temporary.remove_all()


def test_a_folder_named_in_a_message_is_kept_and_listed_once(room: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = temporary.folder("checkpoint")
    temporary.create_file(folder / "state.ckpt")
    temporary.keep(folder, "the state of gs://b/x.ckpt, which could not be uploaded.")
    temporary.remove(folder)
    temporary.remove_all()
    temporary.delete_stale()
    assert (folder / "state.ckpt").exists()
    assert f"{folder} is kept: the state of gs://b/x.ckpt, which could not be uploaded." in caplog.text
    caplog.clear()
    temporary.delete_stale()
    assert (folder / "state.ckpt").exists()
    assert not own_messages(caplog)


def test_folders_of_other_programs_are_kept(room: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder without an owner file, a file, a link to another folder, a link as owner file."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / temporary.OWNER).touch()
    (room / "job-of-a-person").mkdir()
    (room / "job-file").touch()
    (room / "job-link").symlink_to(elsewhere)
    (room / "job-trap").mkdir()
    (room / "job-trap" / temporary.OWNER).symlink_to(elsewhere / temporary.OWNER)
    temporary.delete_stale()
    assert len(list(room.iterdir())) == 4
    assert elsewhere.exists()
