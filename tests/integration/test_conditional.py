"""Conditional writes to a GCS server, an S3 server, a disk and memory; by threads and processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from job import storage
from job.errors import StorageError, StorageOutage
from job.storage import conditional
from job.storage.stores import local

pytestmark = pytest.mark.integration


@pytest.fixture(params=["gcs", "s3", "disk", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("gcs", "s3"):
        folder = request.getfixturevalue(request.param)
    else:
        folder = str(tmp_path) if request.param == "disk" else "memory://conditional"
    return f"{folder}/{uuid.uuid4().hex} ü=1/lease.json"


def test_only_the_version_that_was_read_is_overwritten(uri: str) -> None:
    """Fails if gcsfs or s3fs drop the condition."""
    assert conditional.weakness(uri) is None
    assert conditional.read_versioned(uri) is None
    first = conditional.write_if(uri, b"first", None)
    assert first is not None
    assert conditional.write_if(uri, b"other", None) is None
    assert conditional.write_if(uri, b"first", None) == first  # a repeated request
    assert conditional.read_versioned(uri) == (b"first", first)
    second = conditional.write_if(uri, b"second", first)
    assert second is not None
    assert second != first
    assert conditional.write_if(uri, b"other", first) is None
    assert conditional.write_if(uri, b"other", "1") is None
    assert conditional.read_versioned(uri) == (b"second", second)
    assert storage.read_bytes(uri) == b"second"
    assert conditional.remove_if(uri, second)
    assert not conditional.remove_if(uri, second)
    assert conditional.write_if(uri, b"third", second) is None
    assert conditional.read_versioned(uri) is None


def test_only_the_version_that_was_read_is_deleted(uri: str) -> None:
    if uri.startswith("gs://"):
        pytest.skip("the emulator ignores the condition (fake-gcs-server#2343); GCS does not")
    first = conditional.write_if(uri, b"first", None)
    assert first is not None
    conditional.write_if(uri, b"second", first)
    assert not conditional.remove_if(uri, first)
    assert storage.read_bytes(uri) == b"second"


def test_of_several_writers_one_wins(uri: str) -> None:
    version = conditional.write_if(uri, b"start", None)
    won: list[str] = []

    def write(name: str) -> None:
        if conditional.write_if(uri, name.encode(), version) is not None:
            won.append(name)

    threads = [threading.Thread(target=write, args=(f"writer {n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(uri) == won[0].encode()


def test_processes_count_together_on_a_disk(tmp_path: Path) -> None:
    """Each adds one by compare-and-swap, also while the lock file is deleted now and then."""
    code = """
import sys
from job.storage import conditional
uri, name = sys.argv[1:]
done = 0
while done < 40:
    current = conditional.read_versioned(uri)
    count = int(current.data.split()[0]) if current else 0
    done += conditional.write_if(uri, f"{count + 1} {name} {done}".encode(), current and current.version) is not None
"""
    uri = str(tmp_path / "count")
    processes = [subprocess.Popen([sys.executable, "-c", code, uri, str(n)]) for n in range(4)]
    assert [process.wait(300) for process in processes] == [0] * 4
    current = conditional.read_versioned(uri)
    assert current is not None
    assert current.data.startswith(b"160 ")
    assert conditional.remove_if(uri, current.version)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_a_stopped_process_holds_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lease.json.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    monkeypatch.setattr(local, "LOCK_SECONDS", 0.1)
    with pytest.raises(StorageOutage, match=r"another process has held the lock .*lease\.json\.lock"):
        conditional.write_if(str(tmp_path / "lease.json"), b"x", None)
    process.kill()
    process.communicate()
    assert conditional.write_if(str(tmp_path / "lease.json"), b"x", None) is not None


def test_errors_name_the_uri(gcs: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write gs://no-such-bucket/lease.json: no such bucket"):
        conditional.write_if("gs://no-such-bucket/lease.json", b"x", None)
    (tmp_path / "file").write_text("")
    for action in (conditional.weakness, lambda uri: conditional.write_if(uri, b"x", None)):
        with pytest.raises(StorageError, match=f"cannot write {tmp_path}/file/lease.json"):
            action(f"{tmp_path}/file/lease.json")
