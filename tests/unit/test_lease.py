"""One job per run_dir: acquiring, losing, renewing and expiring leases."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fsspec
import msgspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support import picture_files, write_files

from job import storage
from job.data.index.build import build
from job.data.index.store import publish_index
from job.errors import EXIT_RETRY, JobError, LeaseError, LeaseExpired, StorageError, StorageOutage
from job.process.identity import ProcessId, this_process
from job.resilience import attempts
from job.resilience import lease as module
from job.resilience.lease import Holder, Lease
from job.storage import conditional

Clock = Callable[[float], None]


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Function that advances the clock of all leases, as a pause of the process does.

    Otherwise the clock stands still, except in a wait for a lease: on a slow disk one may expire while it is renewed.
    """
    now = 0.0

    def jump(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(module, "_clock", lambda: now)
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=jump))
    return jump


@pytest.fixture
def frequent_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew a lease of 60 s ten times per second, so that another job need not wait long for a renewal."""
    monkeypatch.setattr(module, "RENEWALS", 600)


def stop_renewals(lease: Lease) -> None:
    """Stop the renewals of a lease, as if its machine were lost."""
    assert lease._renewal is not None
    lease._renewal.stop()


def holder_of(uri: str) -> Holder:
    return msgspec.json.decode(storage.read_bytes(uri), type=Holder)


@pytest.mark.usefixtures("frequent_renewals")
def test_a_lease_is_held_by_one_attempt(run_dir: str) -> None:
    first, second = Lease(run_dir, seconds=60), Lease(run_dir, seconds=60)
    first.acquire()
    with pytest.raises(LeaseError, match=r"another job is writing to .*rank 0 is process"):
        Lease(run_dir, seconds=1).acquire()  # the lifetime of the holder's lease counts
    first.raise_if_lost()
    first.require_held()
    first.release()
    second.acquire()
    second.release()
    assert list(Path(run_dir).iterdir()) == []


@pytest.mark.usefixtures("frequent_renewals")
@pytest.mark.parametrize("run_id", ["job", "none"])
def test_the_same_run_id_does_not_share_a_lease(run_dir: str, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29400")
    first, second = Lease(run_dir, seconds=60), Lease(run_dir, seconds=1)
    first.acquire()
    with pytest.raises(LeaseError, match="another job"):
        second.acquire()
    first.release()


@pytest.mark.usefixtures("frequent_renewals")
def test_one_of_several_waiting_processes_takes_an_expired_lease(
    run_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offset = 0.0
    monkeypatch.setattr(module, "_clock", lambda: time.monotonic() + offset)
    caplog.set_level(logging.INFO)
    dead = Lease(run_dir, seconds=60)
    dead.acquire()
    stop_renewals(dead)
    winners: list[Lease] = []
    refused: list[LeaseError] = []

    def start() -> None:
        lease = Lease(run_dir, seconds=60)
        try:
            lease.acquire()
            winners.append(lease)
        except LeaseError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while caplog.text.count("waiting up to 60 s for a renewal") < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    offset = 61.0
    for thread in threads:
        thread.join()
    assert (len(winners), len(refused)) == (1, 5)
    assert holder_of(winners[0].uri).start == winners[0].start
    with pytest.raises(LeaseError, match="taken over by another job"):
        dead._renew()
        dead.raise_if_lost()
    winners[0].release()


def test_a_paused_holder_writes_only_after_it_has_renewed(run_dir: str, advance: Clock) -> None:
    lease = Lease(run_dir, seconds=30)
    lease.acquire()
    stop_renewals(lease)
    beat = holder_of(lease.uri).beat
    lease.require_held()
    assert holder_of(lease.uri).beat == beat  # recently renewed: no request
    advance(60)
    lease.require_held()
    assert holder_of(lease.uri).beat > beat
    lease.release()


@pytest.mark.parametrize("taken", ["held", "released"])
def test_a_paused_holder_whose_lease_was_taken_writes_nothing(run_dir: str, advance: Clock, taken: str) -> None:
    paused = Lease(run_dir, seconds=0.5)
    paused.acquire()
    stop_renewals(paused)
    other = Lease(run_dir, seconds=0.5)
    other.acquire()
    if taken == "released":
        other.release()
    advance(60)
    with pytest.raises(LeaseError, match="writes nothing more"):
        paused.require_held()
    with pytest.raises(LeaseError):
        paused.raise_if_lost()
    paused.release()
    assert storage.exists(other.uri) == (taken == "held")
    other.release()


def test_a_lease_that_a_person_deleted_is_written_again(run_dir: str) -> None:
    lease = Lease(run_dir, seconds=30)
    lease.acquire()
    storage.remove(lease.uri)
    lease._renew()
    lease.require_held()
    assert storage.exists(lease.uri)
    lease.release()


def test_an_outage_holds_writes_back_and_ends_the_run_in_time(
    run_dir: str, advance: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(run_dir, seconds=30, outage_seconds=600)
    lease.acquire()
    stop_renewals(lease)
    with monkeypatch.context() as outage:
        outage.setattr(conditional, "write_if", lambda *_: (_ for _ in ()).throw(StorageOutage("503")))
        advance(20)
        lease.require_held()  # not renewed, but still valid
        advance(20)
        with pytest.raises(StorageOutage, match=r"nothing is written to .* 503"):
            lease.require_held()
        lease.raise_if_lost()  # training goes on
        advance(600)
        with pytest.raises(LeaseExpired, match=r"could not be renewed for 6.. s") as excinfo:
            lease.raise_if_lost()
        assert excinfo.value.exit_code == EXIT_RETRY
    lease.require_held()
    lease.raise_if_lost()
    lease.release()


def test_an_unexpected_error_in_the_thread_is_logged_and_ends_the_run(
    run_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = Lease(run_dir, seconds=0.4)
    lease.acquire()
    with monkeypatch.context() as fault:
        fault.setattr(conditional, "write_if", lambda *_: 1 / 0)
        deadline = time.monotonic() + 60
        with pytest.raises(LeaseExpired, match="division by zero"):
            while time.monotonic() < deadline:
                lease.raise_if_lost()
                time.sleep(0.02)
    assert caplog.text.count("Traceback") == 1
    stop_renewals(lease)  # on a slow disk one in progress could keep the next one waiting for longer than 0.4 s
    lease._renew()  # works again
    lease.raise_if_lost()
    lease.release()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"null",
        b'{"start": "x"}',
        b"\xff\xfe",
        b'{"job": "a", "token": "b", "host": "c", "process": "1/2/3", "beat": 4}',  # of earlier versions
        b'{"start":"x","process":{"host":"h","pid":-1},"seconds":30,"beat":0,"format":1}',
        b'{"start":"x","process":{"host":"h","pid":99999999999999},"seconds":30,"beat":0,"format":1}',
        b'{"start":"x","process":{"host":"h","pid":1},"seconds":1e300,"beat":0,"format":1}',
        b'{"start":"x","process":{"host":"h","pid":1},"seconds":NaN,"beat":0,"format":1}',
        b'{"format": true}',
        b"x" * 100_000,
    ],
)
@pytest.mark.usefixtures("advance")
def test_a_damaged_lease_expires(content: bytes, run_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    storage.write_bytes(f"{run_dir}/lease.json", content)
    lease = Lease(run_dir, seconds=30)
    lease.acquire()
    lease.require_held()
    assert holder_of(lease.uri).start == lease.start
    assert "is damaged, or of an older version" in caplog.text
    lease.release()


@pytest.mark.parametrize("version", [2, 10**30])
def test_a_lease_of_a_newer_version_is_left_alone(run_dir: str, version: int) -> None:
    content = json.dumps({"format": version, "other": 1}).encode()
    storage.write_bytes(f"{run_dir}/lease.json", content)
    with pytest.raises(
        LeaseError, match=f"has format {version}, and this version of the program reads formats up to 1"
    ):
        Lease(run_dir, seconds=0.2).acquire()
    assert storage.read_bytes(f"{run_dir}/lease.json") == content


def test_the_lease_of_a_dead_local_process_is_taken_at_once(run_dir: str) -> None:
    mine = this_process()
    dead = msgspec.structs.replace(mine, start_time="1")
    assert dead.is_dead()
    assert not mine.is_dead()
    elsewhere = (
        msgspec.structs.replace(dead, boot="another kernel"),  # machines may share a host name
        msgspec.structs.replace(dead, namespace="pid:[1]"),
        msgspec.structs.replace(dead, boot=None),
        ProcessId(host=mine.host, pid=mine.pid),
    )
    assert not any(process.is_dead() for process in elsewhere)
    storage.write_bytes(f"{run_dir}/lease.json", msgspec.json.encode(Holder("x", dead, 30.0, 7, 1)))
    lease = Lease(run_dir, seconds=600)  # the test's time limit is shorter
    lease.acquire()
    lease.release()


def test_the_lifetime_of_the_holder_counts(run_dir: str) -> None:
    elsewhere = ProcessId(host="elsewhere", pid=1)
    storage.write_bytes(f"{run_dir}/lease.json", msgspec.json.encode(Holder("x", elsewhere, 1.0, 7, 1)))
    began = time.monotonic()
    lease = Lease(run_dir, seconds=0.1)
    lease.acquire()
    assert time.monotonic() - began >= 1.0
    lease.release()


def refuse_overwriting(uri: str, data: bytes, version: str | None) -> str | None:
    if version is not None:
        raise StorageError("Forbidden: subject to the bucket's retention policy")
    storage.write_bytes(uri, data)
    return "1"


def test_a_bucket_that_forbids_overwriting_is_reported(
    run_dir: str, advance: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(conditional, "write_if", refuse_overwriting)
    for _ in range(2):  # the second finds the lease that the first could not delete
        lease = Lease(run_dir, seconds=0.2)
        lease.acquire()
        assert "NO LEASE PROTECTS THIS RUN" in caplog.text
        caplog.clear()
        advance(60)
        lease.require_held()
        lease.raise_if_lost()
        lease.release()


def test_a_store_that_ignores_conditions_is_reported(
    run_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ignoring(uri: str, data: bytes, version: str | None) -> str:
        storage.write_bytes(uri, data)
        return str(hash(data))

    monkeypatch.setattr(conditional, "write_if", ignoring)
    lease = Lease(run_dir, seconds=30)
    lease.acquire()
    assert "ignores the conditions of conditional writes" in caplog.text
    lease._renew()
    lease.require_held()
    lease.release()


class OtherFileSystem(MemoryFileSystem):  # type: ignore[misc]
    protocol = "other"


@pytest.mark.usefixtures("frequent_renewals")
def test_a_filesystem_without_conditional_writes_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    fsspec.register_implementation("other", OtherFileSystem, clobber=True)
    run_dir = f"other://{uuid.uuid4().hex}/run"
    lease = Lease(run_dir, seconds=60)
    lease.acquire()
    assert "conditional writes are not supported on other://" in caplog.text
    with pytest.raises(LeaseError, match="another job"):
        Lease(run_dir, seconds=1).acquire()
    lease.release()
    assert not storage.exists(lease.uri)


def test_a_hanging_request_blocks_neither_writes_nor_shutdown(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(run_dir, seconds=0.3)
    lease.acquire()
    asked, answered = threading.Event(), threading.Event()
    answers: list[bool] = []

    def hang(*_: object) -> bool:
        asked.set()
        answers.append(answered.wait(300))
        return True

    monkeypatch.setattr(module, "RELEASE_SECONDS", 0.3)
    monkeypatch.setattr(conditional, "write_if", hang)
    assert asked.wait(60)
    time.sleep(0.5)  # the lease expires
    with pytest.raises(JobError, match=r"not been answered|cannot be renewed"):
        lease.require_held()
    lease.release()
    assert not answers
    answered.set()


def test_a_rank_that_holds_no_lease_is_not_restricted(run_dir: str) -> None:
    lease = Lease(run_dir)
    lease.require_held()
    lease.raise_if_lost()
    lease.release()
    assert not Path(run_dir).exists()


def test_the_check_costs_less_than_five_microseconds(run_dir: str) -> None:
    lease = Lease(run_dir)
    lease.acquire()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(1000):
            lease.raise_if_lost()
        times.append(time.perf_counter() - began)
    assert min(times) / 1000 < 5e-6
    lease.release()
    logging.getLogger(__name__).info("%.0f ns per check", min(times) * 1e6)


def test_attempts_are_not_counted_without_the_lease(run_dir: str, advance: Clock) -> None:
    paused = Lease(run_dir, seconds=0.5)
    paused.acquire()
    stop_renewals(paused)
    before = attempts.begin(run_dir, 7, "configuration", paused.require_held)
    other = Lease(run_dir, seconds=0.5)
    other.acquire()
    advance(60)
    for error in (LeaseError("lost"), RuntimeError("unexpected"), None):
        storage.write_bytes(f"{run_dir}/attempts.json", b"of the other job")
        with contextlib.suppress(LeaseError, RuntimeError), attempts.counted(run_dir, before, paused.require_held):
            if error is not None:
                raise error
        assert storage.read_bytes(f"{run_dir}/attempts.json") == b"of the other job"
    other.release()


def test_no_index_is_published_without_the_lease(run_dir: str, tmp_path: Path) -> None:
    def lost() -> None:
        raise LeaseError("lost")

    data, folder = write_files(tmp_path / "data", picture_files(["blue", "red"], 2)), tmp_path / "index"
    folder.mkdir()
    build({"root": [str(data)]}, folder, str(tmp_path / "cache"), "parts")
    with pytest.raises(LeaseError, match="lost"):
        publish_index(folder, f"{run_dir}/index/x", lost)
    assert not [path for path in Path(run_dir).rglob("*") if path.is_file()]
