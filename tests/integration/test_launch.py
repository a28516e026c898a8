"""``job launch``: detect the platform, start the ranks, return their exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import (
    REPOSITORY,
    TINY,
    command,
    environment,
    free_port,
    is_running,
    options,
    run,
    run_well,
    scalars,
    wait_for_text,
)
from torch.distributed import PrefixStore, TCPStore

from job.process.descendants import descendants

pytestmark = pytest.mark.integration

ADDRESSES = ("10.213.77.1", "10.213.77.2")


KUBEFLOW = {
    "PET_NNODES": "1",
    "PET_NODE_RANK": "0",
    "PET_NPROC_PER_NODE": "2",
    "PET_MASTER_ADDR": "a-master-0",
    "MASTER_ADDR": "a-master-0",
    "MASTER_PORT": "23456",
    "WORLD_SIZE": "7",
    "RANK": "6",  # counting nodes
}


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"LAUNCH_PROCESSES": "2"}, "plain: alone (LAUNCH_PROCESSES=2)"), (KUBEFLOW, "Kubeflow: alone (PET_NNODES=1")],
    ids=["plain", "kubeflow"],
)
def test_one_node_with_two_processes(variables: dict[str, str], message: str, colours: Path, tmp_path: Path) -> None:
    result = run("launch", "fit", *options(TINY, data__root=colours, run_dir=tmp_path / "run"), fresh=True, **variables)
    assert result.returncode == 0, result.stderr
    assert message in result.stderr
    assert "2 process(es)" in result.stdout


@pytest.mark.parametrize(
    ("settings", "variables", "code", "message"),
    [
        ({"data.root": "/no/such/folder"}, {}, 2, "no such bucket, object or folder"),
        ({}, {"JOB_COMPLETION_INDEX": "3"}, 2, "LAUNCH_NODES does not say how many"),
        ({"data.root": "http://127.0.0.1:9/a.zip"}, {}, 75, "127.0.0.1:9"),
    ],
)
def test_the_exit_code_is_the_ranks_own(
    settings: dict[str, object], variables: dict[str, str], code: int, message: str, tmp_path: Path
) -> None:
    arguments = options({**TINY, "data.root": "x", "run_dir": tmp_path / "run", **settings})
    result = run("launch", "fit", *arguments, LAUNCH_PROCESSES="2", **variables)
    assert result.returncode == code, result.stderr
    assert message in result.stderr


def test_a_users_mistake_is_reported_once(tmp_path: Path) -> None:
    """Restarting the ranks would repeat the mistake."""
    arguments = options({**TINY, "data.root": "/no/such/folder", "run_dir": tmp_path / "run"})
    result = run("launch", "fit", *arguments, LAUNCH_PROCESSES="2", LAUNCH_RESTARTS="2")
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("job: error (rank 0)") == 1
    assert "Traceback" not in result.stderr


def test_an_unknown_command() -> None:
    result = run("launch", "--data.root", "x")
    assert result.returncode == 2
    assert "launch takes another command" in result.stderr


def rank_processes(launcher: int) -> list[int]:
    """Return the launcher's rank processes, by their name in ps."""
    found = []
    for pid in descendants(launcher):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if Path(f"/proc/{pid}/comm").read_text().startswith("job rank "):
                found.append(pid)
    return found


@contextlib.contextmanager
def launched(colours: Path, tmp_path: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A launcher whose two ranks train, and its log."""
    arguments = options(
        {**TINY, "trainer.max_epochs": 2000, "grace": 120}, data__root=colours, run_dir=tmp_path / "run"
    )
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command("launch", "fit", *arguments),
            stdout=file,
            stderr=file,
            env=environment(LAUNCH_PROCESSES="2", **variables),
            cwd=REPOSITORY,
        )
    try:
        while "epoch 2/" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield process, log
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, 75)])
def test_signals(number: int, code: int, colours: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher, as from the kubelet; Ctrl-C; SIGKILL of a rank, as from the OOM killer."""
    with launched(colours, tmp_path) as (process, log):
        ranks = rank_processes(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1] if number == signal.SIGKILL else process.pid, number)
        assert process.wait(300) == code, log.read_text()
        if number != signal.SIGKILL:
            assert "The same command goes on from there" in log.read_text()
            assert run_well("checkpoints", "ls", tmp_path / "run").stdout.count(".ckpt") >= 2


def test_sigterm_to_all_processes(colours: Path, tmp_path: Path) -> None:
    """As systemd and Slurm send it: the fork server must outlive the ranks."""
    with launched(colours, tmp_path) as (process, log):
        for pid in [*descendants(process.pid), process.pid]:
            os.kill(pid, signal.SIGTERM)
        assert process.wait(300) == 143, log.read_text()
        assert "The same command goes on from there" in log.read_text()


def test_ranks_save_when_the_launcher_is_killed(colours: Path, tmp_path: Path) -> None:
    with launched(colours, tmp_path) as (process, log):
        ranks = rank_processes(process.pid)
        process.kill()
        deadline = time.monotonic() + 300
        while any(map(is_running, ranks)):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert "The same command goes on from there" in log.read_text()


def test_the_fork_server_is_killed(colours: Path, tmp_path: Path) -> None:
    """The ranks' exit codes are then unknown: the launcher waits for them and exits as for a transient error."""
    with launched(colours, tmp_path) as (process, log):
        ranks = rank_processes(process.pid)
        server = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(server, signal.SIGKILL)
        assert process.wait(300) == 75, log.read_text()
        assert not any(map(is_running, ranks))


def test_a_requested_stop_is_not_restarted(colours: Path, tmp_path: Path) -> None:
    with launched(colours, tmp_path, LAUNCH_RESTARTS="2") as (process, log):
        os.kill(rank_processes(process.pid)[1], signal.SIGTERM)
        assert process.wait(300) == 143, log.read_text()
        assert log.read_text().count("2 process(es)") == 1


@pytest.fixture
def pods() -> Iterator[list[list[str]]]:
    """Two connected network namespaces with host names; yields command prefixes that run in each."""
    names = [f"job-pod-{n}-{os.getpid()}" for n in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("link", "add", "job-v0", "type", "veth", "peer", "name", "job-v1")
    hosts = "127.0.0.1 localhost\n" + "".join(f"{a} train-{n}.train train-{n}\n" for n, a in enumerate(ADDRESSES))
    for n, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
        ip("netns", "add", name)
        ip("link", "set", f"job-v{n}", "netns", name)
        for words in (["addr", "add", f"{address}/24", "dev", f"job-v{n}"], ["link", "set", f"job-v{n}", "up"]):
            ip("-n", name, *words)
        ip("-n", name, "link", "set", "lo", "up")
        folder = Path("/etc/netns") / name
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(hosts)
    yield [
        ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname train-{n}; exec "$@"', "sh"]
        for n, name in enumerate(names)
    ]
    for name in names:
        ip("netns", "delete", name)
        (Path("/etc/netns") / name / "hosts").unlink()
        (Path("/etc/netns") / name).rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_two_pods_of_an_indexed_job_train_together(pods: list[list[str]], colours: Path, tmp_path: Path) -> None:
    """Each pod knows its index and the first pod's name; the second is started first."""
    arguments = options(TINY, data__root=colours, run_dir=tmp_path / "run")
    logs = [tmp_path / f"log-{n}" for n in range(2)]
    processes = []
    for n in (1, 0):
        variables = {
            "JOB_COMPLETION_INDEX": str(n),
            "LAUNCH_NODES": "2",
            "LAUNCH_COORDINATOR": "train-0.train",
            "LAUNCH_ID": "test",
        }
        with logs[n].open("w") as log:
            line = [*pods[n], sys.executable, "-m", "job", "launch", "fit", *arguments]
            processes.append(
                subprocess.Popen(line, stdout=log, stderr=log, env=environment(**variables), cwd=REPOSITORY)
            )
        time.sleep(3 if n else 0)
    codes = [process.wait(400) for process in processes]
    output = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], output
    assert "Indexed Job: node 1 of 2, meeting at train-0.train:29400" in output
    run_well("fit", *options(TINY, data__root=colours, run_dir=tmp_path / "alone"))
    together, alone = scalars(str(tmp_path / "run")), scalars(str(tmp_path / "alone"))
    assert [step for step, _ in together["train/loss"]] == [step for step, _ in alone["train/loss"]]
    first = [value for _, value in together["train/loss"]][:4]  # the head alone: batch norm is still
    assert first == pytest.approx([value for _, value in alone["train/loss"]][:4], rel=1e-4)


def test_ranks_log_json_on_kubernetes(colours: Path, tmp_path: Path) -> None:
    """Every record of the launcher and of all ranks; what a command prints as its result is text."""
    kubernetes = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_LOG": "auto"}
    done = run("fit", *options(TINY, data__root=colours, run_dir=tmp_path / "run"), processes=2, **kubernetes)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stderr.splitlines()]
    (started,) = (record for record in records if record["message"].startswith("torch elastic starts 2 processes"))
    assert "rank" not in started
    ends = [record for record in records if "val/accuracy" in record]
    assert [(record["rank"], record["world_size"], record["epoch"]) for record in ends] == [
        *((0, 2, 1), (0, 2, 2), (0, 2, 3))
    ]
    assert done.stdout.startswith("Finished\n")
    failed = run("validate", tmp_path / "nothing", processes=2, **kubernetes)
    assert failed.returncode == 2, failed.stderr
    records = [json.loads(line) for line in failed.stderr.splitlines()]
    errors = [record for record in records if record["message"].startswith("job: error (rank ")]
    assert errors
    assert all(record["severity"] == "ERROR" for record in errors)
    assert all(f"(rank {record['rank']})" in record["message"] for record in errors)


def start_node(rank: int, log: Path, port: int, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    """The launcher of one of two nodes, both on this machine."""
    variables |= {"JOB_COMPLETION_INDEX": str(rank), "LAUNCH_NODES": "2", "LAUNCH_COORDINATOR": f"localhost:{port}"}
    with log.open("w") as file:
        line = command("launch", "fit", *arguments)
        return subprocess.Popen(line, stdout=file, stderr=file, env=environment(**variables), cwd=REPOSITORY)


@pytest.mark.parametrize("late", [0, 1])
def test_a_node_that_comes_late_is_waited_for(late: int, colours: Path, tmp_path: Path) -> None:
    arguments = options({**TINY, "trainer.max_epochs": 1}, data__root=colours, run_dir=tmp_path / "run")
    early, port = 1 - late, free_port()
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = {early: start_node(early, logs[early], port, *arguments)}
    expected = f"waiting for node 0: nothing answers at localhost:{port}" if early else "waiting for node 1 of 2"
    wait_for_text(expected, logs[early], processes[early])
    time.sleep(3)
    assert processes[early].poll() is None
    processes[late] = start_node(late, logs[late], port, *arguments)
    codes = [processes[rank].wait(400) for rank in range(2)]
    told = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], told
    assert "2 process(es)" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model.backbone": "nonsense"}, "unknown backbone 'nonsense'"),
        ({"trainer.max_epochs": "many"}, "max_epochs"),
        ({"data.root": "/no/such/folder"}, "/no/such/folder: no such bucket, object or folder"),
        ({"run_dir": "/proc/run"}, "/proc/run"),
    ],
)
def test_a_mistake_ends_a_node_before_others_are_there(
    settings: dict[str, object], told: str, colours: Path, tmp_path: Path
) -> None:
    arguments = options({**TINY, "data.root": colours, "run_dir": tmp_path / "run", **settings})
    process = start_node(0, tmp_path / "log", free_port(), *arguments)
    assert process.wait(300) == 2, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert told in log
    assert "waiting for node" not in log
    assert "Traceback" not in log


def test_a_limit_of_the_wait_and_a_signal_end_it(colours: Path, tmp_path: Path) -> None:
    arguments = options(TINY, data__root=colours, run_dir=tmp_path / "run")
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    limited = start_node(0, logs[0], free_port(), *arguments, LAUNCH_WAIT_SECONDS="2")
    assert limited.wait(300) == 69, logs[0].read_text()
    assert "still waiting for node 1 of 2 after 2 s" in logs[0].read_text()
    stopped = start_node(1, logs[1], free_port(), *arguments)
    wait_for_text("waiting for node 0", logs[1], stopped)
    stopped.terminate()
    assert stopped.wait(300) == 143, logs[1].read_text()
    assert "Traceback" not in logs[0].read_text() + logs[1].read_text()
    assert list((tmp_path / "run").iterdir()) == []  # what checked the right to write is gone


SHORT_FIRST_JOIN = """
import sys
from job import cli
from job.cluster import agent
join, seconds = agent.GatheredNodes.next_rendezvous, iter([3])
def join_within(self):
    agent.JOIN_SECONDS = next(seconds, 300)  # later, a busy machine needs longer
    return join(self)
agent.GatheredNodes.next_rendezvous = join_within
cli.main(sys.argv[1:])
"""


def test_a_node_that_is_lost_before_training_is_no_failure(colours: Path, tmp_path: Path) -> None:
    """It was there, and does not start its ranks: the other waits for its successor, and both train."""
    logs, port = [tmp_path / f"log-{rank}" for rank in range(2)], free_port()
    arguments = options({**TINY, "trainer.max_epochs": 1}, data__root=colours, run_dir=tmp_path / "run")
    variables = {"JOB_COMPLETION_INDEX": "0", "LAUNCH_NODES": "2", "LAUNCH_COORDINATOR": f"localhost:{port}"}
    with logs[0].open("w") as file:
        line = [sys.executable, "-c", SHORT_FIRST_JOIN, "launch", "fit", *arguments]
        first = subprocess.Popen(line, stdout=file, stderr=file, env=environment(**variables), cwd=REPOSITORY)
    wait_for_text("waiting for node 1 of 2", logs[0], first)
    job = PrefixStore("job.nodes/", TCPStore("localhost", port, is_master=False, wait_for_workers=False))
    job.set(f"{job.get('round').decode()}/here/1", "lost 1")
    wait_for_text("other nodes of 2 were lost while the ranks started", logs[0], first)
    second = start_node(1, logs[1], port, *arguments)
    assert [process.wait(300) for process in (first, second)] == [0, 0], logs[0].read_text()
    assert len(re.findall("waiting for node 1 of 2(?!, for)", logs[0].read_text())) == 2
    assert "Traceback" not in logs[0].read_text() + logs[1].read_text()


def test_launchers_end_with_their_ranks(colours: Path, tmp_path: Path) -> None:
    """A preempted machine has 15 s in all: what the launcher takes is lost to the ranks."""
    # On a machine that does something else at the moment they take longer, as does a process that does next to nothing.
    measured = [end_of_launchers(colours, tmp_path / "0")]
    while min(measured) >= 2 and len(measured) < 3:
        measured.append(end_of_launchers(colours, tmp_path / str(len(measured))))
    begun = time.monotonic()
    assert run("--version", fresh=True).returncode == 0
    start = time.monotonic() - begun
    assert min(measured) < max(2, 5 * start), (measured, start)


def end_of_launchers(colours: Path, folder: Path) -> float:
    """Seconds that two launchers take to end after their ranks."""
    folder.mkdir()
    port = free_port()
    arguments = options({**TINY, "trainer.max_epochs": 1}, data__root=colours, run_dir=folder / "run")
    logs = [folder / f"log-{rank}" for rank in range(2)]
    processes = [start_node(rank, logs[rank], port, *arguments) for rank in range(2)]
    wait_for_text("starting fit", logs[0], processes[0])
    while any(rank_processes(process.pid) for process in processes):
        time.sleep(0.05)
    begun = time.monotonic()
    codes = [process.wait(300) for process in processes]
    seconds = time.monotonic() - begun
    print(f"the launchers ended {seconds:.1f} s after their ranks")
    assert codes == [0, 0], logs[0].read_text() + logs[1].read_text()
    return seconds
