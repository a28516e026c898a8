"""``job launch``: detect the platform, start the ranks, return their exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import REPOSITORY, TINY, command, environment, options, run, run_well, scalars

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
    names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in descendants(launcher)}
    return [pid for pid, name in names.items() if name.startswith("job rank ")]


@contextlib.contextmanager
def launched(colours: Path, tmp_path: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A launcher whose two ranks train, and its log."""
    arguments = options({**TINY, "trainer.max_epochs": 2000}, data__root=colours, run_dir=tmp_path / "run")
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
        assert process.wait(60) == code, log.read_text()
        if number != signal.SIGKILL:
            assert "The same command goes on from there" in log.read_text()
            assert run_well("checkpoints", "ls", tmp_path / "run").stdout.count(".ckpt") >= 2


def test_sigterm_to_all_processes(colours: Path, tmp_path: Path) -> None:
    """As systemd and Slurm send it: the fork server must outlive the ranks."""
    with launched(colours, tmp_path) as (process, log):
        for pid in [*descendants(process.pid), process.pid]:
            os.kill(pid, signal.SIGTERM)
        assert process.wait(60) == 143, log.read_text()
        assert "The same command goes on from there" in log.read_text()


def test_ranks_save_when_the_launcher_is_killed(colours: Path, tmp_path: Path) -> None:
    with launched(colours, tmp_path) as (process, log):
        ranks = rank_processes(process.pid)
        process.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert "The same command goes on from there" in log.read_text()


def test_the_fork_server_is_killed(colours: Path, tmp_path: Path) -> None:
    """The ranks' exit codes are then unknown: the launcher waits for them and exits as for a transient error."""
    with launched(colours, tmp_path) as (process, log):
        ranks = rank_processes(process.pid)
        server = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(server, signal.SIGKILL)
        assert process.wait(60) == 75, log.read_text()
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_requested_stop_is_not_restarted(colours: Path, tmp_path: Path) -> None:
    with launched(colours, tmp_path, LAUNCH_RESTARTS="2") as (process, log):
        os.kill(rank_processes(process.pid)[1], signal.SIGTERM)
        assert process.wait(60) == 143, log.read_text()
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
    codes = [process.wait(180) for process in processes]
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


def test_a_trial_of_vertex_ai(colours: Path, tmp_path: Path) -> None:
    """The metric and the events are written where Vertex AI reads them."""
    spec = {"cluster": {"workerpool0": ["trial-0:2222"]}, "task": {"type": "workerpool0", "index": 0}}
    variables = {
        "CLUSTER_SPEC": json.dumps(spec),
        "CLOUD_ML_TRIAL_ID": "3",
        "CLOUD_ML_HP_METRIC_FILE": str(tmp_path / "hypertune" / "output.metrics"),
        "AIP_TENSORBOARD_LOG_DIR": str(tmp_path / "vertex" / "tensorboard"),
        "LAUNCH_PROCESSES": "2",
    }
    result = run("launch", "fit", *options(TINY, data__root=colours, run_dir=tmp_path / "run"), **variables)
    assert result.returncode == 0, result.stderr
    assert "Vertex AI: alone" in result.stderr
    assert not (tmp_path / "run" / "tensorboard").exists()
    lines = (tmp_path / "hypertune" / "output.metrics").read_text().splitlines()
    reported = [json.loads(line) for line in lines]
    assert {record["trial"] for record in reported} == {"3"}
    logged = scalars(str(tmp_path / "vertex"))["val/accuracy"]
    assert [float(record["metric"]) for record in reported] == pytest.approx([value for _, value in logged])
    assert len(reported) == 3
