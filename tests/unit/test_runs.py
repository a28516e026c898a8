"""Runs in a cluster: applied, followed, stopped and deleted, through a kubectl whose cluster is a file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from k8s.manifests import REPOSITORY, Manifest

from job import cli
from job.errors import ConfigError
from job.process.signals import Stopped
from job.submit import ending, fit_options, follow, kubectl, overlay
from job.submit.kubectl import ClusterUnreachable, Kubectl
from job.submit.run import Run
from job.submit.workload import find
from k8s import submitted

FAKE = REPOSITORY / "tests" / "k8s" / "fake_kubectl.py"
REAL = shutil.which("kubectl")
ACCOUNT: dict[str, Manifest] = {"serviceaccounts/train": {"kind": "ServiceAccount", "metadata": {"name": "train"}}}
COMPLETE = {"status": {"conditions": [{"type": "Complete", "status": "True", "reason": "CompletionsReached"}]}}

pytestmark = [pytest.mark.skipif(REAL is None, reason="kubectl is not installed"), pytest.mark.timeout(600)]


class Cluster:
    """The file in which the fake kubectl has its cluster."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "cluster.json"
        self.write(objects=dict(ACCOUNT), steps=[], logs={}, fail={}, unknown=[])

    def write(self, **changes: Any) -> None:
        content = self.content if self.file.exists() else {}
        self.file.write_text(json.dumps({**content, **changes}))

    @property
    def content(self) -> dict[str, Any]:
        return dict(json.loads(self.file.read_text()))

    @property
    def objects(self) -> dict[str, Any]:
        return dict(self.content["objects"])

    @property
    def names(self) -> set[str]:
        """Kind and name of all objects, without the digest of a ConfigMap."""
        return {key.rpartition("-")[0] if key.startswith("configmaps/") else key for key in self.objects}

    @property
    def calls(self) -> list[list[str]]:
        file = self.file.with_suffix(".calls")
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def forget_calls(self) -> None:
        self.file.with_suffix(".calls").unlink(missing_ok=True)


_built: dict[str, overlay.Overlay] = {}
_build = overlay.build


def built(key: str, run: Run) -> overlay.Overlay:
    """Render each run once."""
    return _built.setdefault(key, _build(run)) if key not in _built else _built[key]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "kubectl"
    script.write_text(f"#!{sys.executable} -IS\n" + FAKE.read_text())
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("REAL_KUBECTL", str(REAL))
    monkeypatch.setenv("FAKE_CLUSTER", str(tmp_path / "cluster.json"))
    monkeypatch.setattr(sys, "argv", ["job"])
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(follow, "DRAIN_SECONDS", 300.0)  # a process may take long to start where others compute
    # Both have their tests in test_submit.py; here they would take their time in each.
    monkeypatch.setattr(fit_options, "check", lambda overlay: None)
    monkeypatch.setattr(overlay, "build", lambda run: built(repr(run), run))
    return Cluster(tmp_path)


def job(*args: str) -> int:
    """Run ``python -m job ARGS`` in this process; returns the exit code."""
    try:
        return cli.run(list(args))
    except SystemExit as end:
        return int(end.code or 0)


def submit(name: str = "cats", *more: str, machine: str = "l4x8", kind: str = "job") -> int:
    return job("submit", name, *submitted.OPTIONS, "--machine", machine, "--kind", kind, *more)


def pod(
    name: str, index: int, phase: str = "Running", *, code: int | None = None, job: str = "cats-train", **status: Any
) -> Manifest:
    """Return a pod of a run's Job, as Kubernetes shows it."""
    state: dict[str, Any] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    if code is not None:
        state = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}
    containers = [] if phase == "Pending" else [{"name": "train", "restartCount": 0, "state": state}]
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "uid": name,
            "labels": {
                "batch.kubernetes.io/job-name": job,
                "jobset.sigs.k8s.io/jobset-name": job,
                "batch.kubernetes.io/job-completion-index": str(index),
            },
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"nodeName": f"node-{index}"},
        "status": {"phase": phase, "containerStatuses": containers, **status},
    }


def lines(*texts: str, start: int = 0) -> list[str]:
    """Return log lines with the timestamps of ``kubectl logs --timestamps``."""
    return [f"2026-01-01T00:00:{start + n:02d}.000000001Z {text}" for n, text in enumerate(texts)]


def record(message: str, severity: str = "INFO") -> str:
    return json.dumps({"severity": severity, "message": message, "time": "2026-01-01T12:34:56.000000Z", "rank": 0})


def ended(condition: str = "Complete", reason: str = "CompletionsReached", message: str = "") -> Manifest:
    return {"status": {"conditions": [{"type": condition, "status": "True", "reason": reason, "message": message}]}}


def test_a_run_is_applied_and_followed_to_its_end(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    """Pods that come late or replace others are followed, too; all of each log, prefixed by its node."""
    cluster.write(
        steps=[
            {},
            {
                "pods/cats-train-0-a": pod("cats-train-0-a", 0),
                "pods/cats-train-1-a": pod("cats-train-1-a", 1, "Pending"),
            },
            {"pods/cats-train-1-a": pod("cats-train-1-a", 1)},
            {"pods/cats-train-0-a": pod("cats-train-0-a", 0, "Failed", code=143)},
            {"pods/cats-train-0-b": pod("cats-train-0-b", 0)},
            {
                "pods/cats-train-0-b": pod("cats-train-0-b", 0, "Succeeded", code=0),
                "pods/cats-train-1-a": pod("cats-train-1-a", 1, "Succeeded", code=0),
                "jobs.batch/cats-train": COMPLETE,
            },
        ],
        logs={
            "cats-train-0-a": lines(record("Indexed Job: node 0 of 2"), *(f"line {n}" for n in range(20))),
            "cats-train-1-a": lines(record("careful", "WARNING"), "\x1b]0;title\x07 token=0123456789abcdef"),
            "cats-train-0-b": lines("resumed"),
        },
    )
    assert submit("cats", "--nodes", "2") == 0
    out, err = capfd.readouterr()
    assert "job/cats-train created" in out
    shown = [line for line in out.splitlines() if line.startswith("[node ")]
    assert shown.count("[node 0] 12:34:56 Indexed Job: node 0 of 2") == 1
    assert [line for line in shown if "] line " in line] == [f"[node 0] line {n}" for n in range(20)]
    assert "[node 1] 12:34:56 WARNING: careful" in shown
    assert "[node 0] resumed" in shown
    assert "\x1b" not in out
    assert "cats is complete." in err
    assert cluster.names == {
        "serviceaccounts/train",
        "configmaps/cats-config",
        "services/cats-train",
        "jobs.batch/cats-train",
        "networkpolicies.networking.k8s.io/cats-train",
        "pods/cats-train-0-a",
        "pods/cats-train-0-b",
        "pods/cats-train-1-a",
    }
    verbs = [call for call in cluster.calls if call[1] in ("apply", "logs")]
    assert all(call[0] == "--namespace=vision" for call in cluster.calls)
    assert [call[2] for call in verbs if call[1] == "apply"] == ["--dry-run=server", "--filename=-"]
    assert all({"--follow", "--tail=-1"} <= set(call) for call in verbs if call[1] == "logs")


@pytest.mark.parametrize(
    ("codes", "ending_", "code"),
    [
        ([2], ended("Failed", "PodFailurePolicy", "Container train failed with exit code 2 matching FailJob"), 2),
        ([143, 143, 70], ended("Failed", "FailedIndexes"), 70),
        ([75, 69, 143], ended("Failed", "FailedIndexes"), 75),
        ([137], ended("Failed", "FailedIndexes"), 137),
        ([143], ended("Failed", "DeadlineExceeded"), 143),
        ([], ended("Failed", "BackoffLimitExceeded"), 75),
        ([143, 0], ended(), 0),
    ],
)
def test_the_exit_code_is_the_run_s(
    codes: list[int], ending_: Manifest, code: int, cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    pods = {f"pods/p{n}": pod(f"p{n}", n, "Failed" if each else "Succeeded", code=each) for n, each in enumerate(codes)}
    cluster.write(steps=[{}, {}, {**pods, "jobs.batch/cats-train": ending_}])
    assert submit() == code
    if code:
        assert f"cats has failed with exit code {code}" in capfd.readouterr().err


def test_what_keeps_a_run_from_running_is_said_once(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    waits = {"pods/cats-train-0-a": pod("cats-train-0-a", 0, "Pending", conditions=[condition])}
    cluster.write(steps=[{}, {}, {}, waits, {}, {}, {"jobs.batch/cats-train": COMPLETE}])
    assert submit() == 0
    err = capfd.readouterr().err
    assert err.count(f"cats-train-0-a pending: Unschedulable: {message}") == 1
    assert err.count("cats has no pods yet") == 1


def test_the_same_command_twice_is_one_run(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    done = {"jobs.batch/cats-train": COMPLETE}
    cluster.write(steps=[{}, {}, {"jobs.batch/cats-train": None}])
    assert submit() == 143  # deleted by somebody else
    assert "cats was deleted" in capfd.readouterr().err
    cluster.write(objects=dict(ACCOUNT), steps=[{}, {}, {"jobs.batch/cats-train": {"spec": {"suspend": True}}}])
    assert submit() == 143
    assert "cats was stopped" in capfd.readouterr().err
    before = cluster.objects
    cluster.forget_calls()
    # The same command lets the stopped run go on, changes nothing of one that trains, and refuses one that has ended.
    cluster.write(steps=[{}, {}, done])
    assert submit() == 0
    assert "cats was stopped, and goes on." in capfd.readouterr().out
    assert {call[1] for call in cluster.calls} == {"get", "patch"}
    assert cluster.objects.keys() == before.keys()
    assert submit() == 2
    assert "cats exists already, and is complete" in capfd.readouterr().err
    running = {key: value for key, value in before.items() if key != "jobs.batch/cats-train"}
    running["jobs.batch/cats-train"] = {**before["jobs.batch/cats-train"], "spec": {}}
    cluster.write(objects=running, steps=[{}, {}, done])
    assert submit() == 0
    assert "with the same options: nothing was applied" in capfd.readouterr().out


def test_a_stopped_run_is_followed_until_its_pods_have_ended(cluster: Cluster) -> None:
    stopped = {"jobs.batch/cats-train": {"spec": {"suspend": True}}}
    cluster.write(steps=[{}, {}, {**stopped, "pods/p0": pod("p0", 0)}, {}, {}, {"pods/p0": None}])
    assert submit() == 143
    assert cluster.content["steps"] == []


def test_a_name_that_is_taken_is_refused(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    cluster.write(steps=[{}, {}, {"jobs.batch/cats-train": COMPLETE}])
    assert submit() == 0
    before = cluster.objects
    for more in (["--nodes", "2"], ["--", "--epochs", "3"]):
        assert submit("cats", *more) == 2
        assert "the run cats exists already, with other options" in capfd.readouterr().err
        assert submit("cats", *more[:0], kind="jobset", machine="v5ex4") == 2
        assert cluster.objects == before
    capfd.readouterr()
    # Replaced: the old objects go first, and no other's.
    other = {"services/dogs-train": {"kind": "Service", "metadata": {"name": "dogs-train", "labels": {}}}}
    cluster.write(objects={**before, **other}, steps=[{}, {}, {}, {"jobs.batch/cats-train": COMPLETE}])
    cluster.forget_calls()
    assert submit("cats", "--replace", "--nodes", "2") == 0
    order = [call[1] for call in cluster.calls if call[1] in ("delete", "apply")]
    assert order == ["delete", "delete", "apply"]
    assert cluster.objects["jobs.batch/cats-train"]["spec"]["completions"] == 2
    assert "services/dogs-train" in cluster.objects


@pytest.mark.parametrize(
    ("resource", "kind"),
    [
        ("jobs.batch", "Job"),
        ("jobsets.jobset.x-k8s.io", "JobSet"),
        ("services", "Service"),
        ("networkpolicies.networking.k8s.io", "NetworkPolicy"),
    ],
)
def test_an_object_of_somebody_else_is_left_alone(
    resource: str, kind: str, cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = {"kind": kind, "metadata": {"name": "cats-train", "labels": {"app.kubernetes.io/instance": "other"}}}
    cluster.write(objects={**ACCOUNT, f"{resource}/cats-train": foreign})
    before = cluster.objects
    assert submit("cats", "--replace") == 2
    assert f"there is a {kind} cats-train already" in capfd.readouterr().err
    assert job("delete", "cats", "--namespace", "vision") == 2
    assert job("stop", "cats", "--namespace", "vision") == 2
    assert cluster.objects == before


def test_without_a_service_account_nothing_is_applied(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    cluster.write(objects={})
    assert submit() == 2
    assert "kubectl create serviceaccount train" in capfd.readouterr().err
    assert submit("cats", "--service_account", "mine") == 2
    assert "kubectl create serviceaccount mine" in capfd.readouterr().err
    assert cluster.objects == {}


@pytest.mark.parametrize(
    ("verb", "stderr", "code", "message"),
    [
        ("apply", 'Error from server (Forbidden): jobs.batch is forbidden: User "me"', 2, "the right to do this"),
        ("get", 'Error from server (Forbidden): jobs.batch "x" is forbidden', 2, "the right to do this"),
        ("apply", 'services "x" is forbidden: exceeded quota: q, used: services=5', 2, "a quota of this namespace"),
        ("apply", "error: timed out waiting for the condition on jobs/x", 75, "not all objects are gone yet"),
        ("get", "error: current-context is not set", 2, "kubectl knows no cluster"),
        ("get", 'error: context "x" does not exist', 2, "kubectl knows no cluster"),
        ("get", "The connection to the server localhost:8080 was refused", 2, "kubectl knows no cluster"),
        ("get", "Unable to connect to the server: dial tcp 10.0.0.1:443: i/o timeout", 75, "cannot be reached"),
        ("get", "Unable to connect to the server: dial tcp: lookup x: no such host", 75, "cannot be reached"),
        ("get", "error: You must be logged in to the server (Unauthorized)", 2, "Log in again"),
        ("apply", 'namespaces "vision" not found', 2, "there is no such namespace"),
        ("apply", 'no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"', 2, "Install JobSet"),
        ("apply", 'admission webhook "x" denied the request: \x1b[31mno', 2, "denied the request: \\x1b[31mno"),
        ("get", "hang", 75, "did not answer within"),
    ],
)
def test_a_failure_of_kubectl_is_explained(
    verb: str,
    stderr: str,
    code: int,
    message: str,
    cluster: Cluster,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        kubectl.Kubectl.run, "__kwdefaults__", {"stdin": None, "seconds": 1.5 if stderr == "hang" else 60}
    )
    cluster.write(fail={verb: stderr})
    assert submit() == code
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert cluster.objects == ACCOUNT


def test_without_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for args in (["status"], ["logs", "cats"], ["stop", "cats"], ["delete", "cats"]):
        assert job(*args) == 2
        assert "kubectl is not installed" in capfd.readouterr().err
    assert submit("cats", "--dry-run") == 2


def test_a_controller_that_is_not_installed(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    """A cluster without JobSet and Trainer has Jobs all the same."""
    cluster.write(
        unknown=["jobsets.jobset.x-k8s.io", "trainjobs.trainer.kubeflow.org"],
        steps=[{}, {}, {"jobs.batch/cats-train": COMPLETE}],
    )
    assert submit() == 0
    assert job("status", "--namespace", "vision") == 0
    assert job("status", "dogs", "--namespace", "vision") == 2
    assert "there is no run dogs in the namespace vision. There are cats." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "machine", "resource", "more"),
    [
        ("job", "l4x8", "jobs.batch", []),
        ("jobset", "v5ex4", "jobsets.jobset.x-k8s.io", ["--nodes", "4"]),
        ("trainjob", "l4x8", "trainjobs.trainer.kubeflow.org", []),
    ],
)
def test_stop_suspends_and_keeps(
    kind: str, machine: str, resource: str, more: list[str], cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    key = f"{resource}/cats-train"
    cluster.write(steps=[{}, {}, {}, {}, {key: COMPLETE}])
    assert submit("cats", *more, machine=machine, kind=kind) == 0
    objects = cluster.objects
    objects[key].pop("status")
    cluster.write(objects={**objects, "pods/a": pod("a", 0, "Succeeded", code=143)}, steps=[])
    cluster.forget_calls()
    assert job("stop", "cats", "--namespace", "vision") == 0
    assert "cats is stopped" in capfd.readouterr().out
    (patch,) = (call for call in cluster.calls if call[1] == "patch")
    assert patch == ["--namespace=vision", "patch", key, "--type=merge", '--patch={"spec":{"suspend":true}}']
    assert cluster.objects[key]["spec"]["suspend"] is True
    assert cluster.objects.keys() == {*objects, "pods/a"}
    selector = "batch.kubernetes.io/job-name" if kind == "job" else "jobset.sigs.k8s.io/jobset-name"
    assert any(f"--selector={selector}=cats-train" in call for call in cluster.calls)


def test_stop_deactivates_a_queued_run(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    """Kueue would admit a Job again that is only suspended."""
    key, queued = "jobs.batch/cats-train", "workloads.kueue.x-k8s.io/job-cats-train-1"
    cluster.write(steps=[{}, {}, {key: COMPLETE}])
    assert submit("cats", "--queue", "gold", kind="kueue") == 0
    objects = cluster.objects
    objects[key] = {**objects[key], "status": {}}
    objects[key]["metadata"]["uid"] = "u1"
    objects[queued] = {"metadata": {"name": "job-cats-train-1", "labels": {"kueue.x-k8s.io/job-uid": "u1"}}, "spec": {}}
    cluster.write(objects=objects, steps=[])
    assert job("stop", "cats", "--namespace", "vision") == 0
    assert cluster.objects[queued]["spec"]["active"] is False
    cluster.write(steps=[{}, {}, {key: COMPLETE}])
    assert submit("cats", "--queue", "gold", kind="kueue") == 0
    assert cluster.objects[queued]["spec"]["active"] is True
    assert "waits in its queue again" in capfd.readouterr().out


def test_stop_does_not_wait_for_ever(
    cluster: Cluster, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.write(steps=[{}, {}, {"jobs.batch/cats-train": COMPLETE}])
    assert submit() == 0
    assert job("stop", "cats", "--namespace", "vision") == 2
    assert "the run cats is complete: there is nothing to stop." in capfd.readouterr().err
    objects = cluster.objects
    objects["jobs.batch/cats-train"].pop("status")
    cluster.write(objects={**objects, "pods/a": pod("a", 0)})
    monkeypatch.setattr(ending, "STOP_SECONDS", 0.3)
    ending.stop(Kubectl("vision"), "cats", wait=lambda seconds: time.sleep(0.05))
    assert "some pods have not ended" in capfd.readouterr().out


def test_delete_takes_one_run_and_leaves_the_other(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    for run in ("cats", "dogs"):
        cluster.write(steps=[{}, {}, {f"jobs.batch/{run}-train": COMPLETE}])
        assert submit(run) == 0
    both = cluster.objects
    assert job("delete", "cats", "--namespace", "vision") == 0
    assert "jobs.batch/cats-train deleted" in capfd.readouterr().out
    assert cluster.objects == {key: value for key, value in both.items() if "cats" not in key}
    assert len(cluster.objects) == 5  # an account, and four objects of dogs
    assert job("delete", "cats", "--namespace", "vision") == 2
    assert "there is no run cats" in capfd.readouterr().err
    # What a Job leaves that Kubernetes has removed a day after its end.
    cluster.write(objects={key: value for key, value in cluster.objects.items() if not key.startswith("jobs")})
    assert job("delete", "dogs", "--namespace", "vision") == 0
    assert cluster.objects == ACCOUNT


def test_status_shows_what_pods_wait_for(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    cluster.write(steps=[{}, {}, {"jobs.batch/cats-train": COMPLETE}])
    assert submit("cats", "--nodes", "3") == 0
    objects = cluster.objects
    objects["jobs.batch/cats-train"].pop("status")
    objects["jobs.batch/cats-train"]["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: \x1b[2J"}
    image = {"name": "train", "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}
    sidecar = {"name": "istio-proxy", "state": {"running": {}}}
    pods = {
        "pods/c": pod("c", 2, "Pending", conditions=[condition]),
        "pods/b": pod("b", 1, "Pending", containerStatuses=[sidecar, image]),
        "pods/a0": pod("a0", 0, "Failed", code=137, reason="Evicted", message="disk"),
        "pods/a1": pod("a1", 0),
        "pods/foreign": pod("foreign", 0, job="dogs-train"),
    }
    cluster.write(objects={**objects, **pods})
    capfd.readouterr()
    assert job("status", "cats", "--namespace", "vision") == 0
    out = capfd.readouterr().out
    assert out.startswith("cats runs (Job cats-train, ")
    rows = [line for line in out.splitlines() if any(f" {name} " in line for name in ("a0", "a1", "b", "c"))]
    assert [next(name for name in ("a0", "a1", "b", "c") if f" {name} " in row) for row in rows] == [
        "a0",
        "a1",
        "b",
        "c",
    ]
    assert "137" in rows[0]
    assert "Evicted: disk" in rows[0]
    assert "ErrImagePull: no such image" in rows[2]
    assert "Unschedulable: 0/3 nodes" in rows[3]
    assert "\x1b" not in out
    assert "foreign" not in out
    assert job("status", "--namespace", "vision") == 0
    assert "cats" in capfd.readouterr().out


def test_logs_go_on_after_a_broken_connection(
    cluster: Cluster, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that ends while its container runs is opened again, without the lines that were shown."""
    cluster.write(steps=[{}, {}, {"jobs.batch/cats-train": COMPLETE}])
    assert submit() == 0
    objects = cluster.objects
    objects["jobs.batch/cats-train"].pop("status")
    log = {"a": lines("one", "two", "three")}
    cluster.write(
        objects={**objects, "pods/a": pod("a", 0)}, logs=log, steps=[{}] * 9 + [{"jobs.batch/cats-train": COMPLETE}]
    )
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.3)
    cluster.forget_calls()
    capfd.readouterr()
    assert follow.follow(Kubectl("vision"), "cats") == 0
    out = capfd.readouterr().out
    assert [out.count(f"[node 0] {word}\n") for word in ("one", "two", "three")] == [1, 1, 1]
    opened = [call for call in cluster.calls if call[1] == "logs"]
    assert len(opened) > 1
    assert "--since-time=2026-01-01T00:00:02.000000001Z" in opened[-1]


def test_an_unreachable_cluster_does_not_end_following(
    cluster: Cluster, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.write(steps=[{}, {}, {"jobs.batch/cats-train": COMPLETE}])
    assert submit() == 0
    content = cluster.content
    answers = iter([None, ClusterUnreachable("the cluster cannot be reached."), None])
    real = find

    def flaky(client: Kubectl, run: str) -> Any:
        if error := next(answers, None):
            raise error
        return real(client, run)

    monkeypatch.setattr(follow.workload, "find", flaky)
    objects = content["objects"]
    cluster.write(objects=objects)
    assert follow.follow(Kubectl("vision"), "cats") == 0
    assert "the cluster cannot be reached" in capfd.readouterr().err
    monkeypatch.setattr(follow, "UNREACHABLE_SECONDS", -1.0)
    answers = iter([None, ClusterUnreachable("the cluster cannot be reached.")])
    with pytest.raises(ClusterUnreachable):
        follow.follow(Kubectl("vision"), "cats")


def test_ctrl_c_leaves_the_run_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, whose whole group gets the signal, as from a terminal."""
    cluster.write(steps=[{}, {}, {"jobs.batch/cats-train": COMPLETE}])
    assert submit() == 0
    objects = cluster.objects
    objects["jobs.batch/cats-train"].pop("status")
    cluster.write(objects={**objects, "pods/a": pod("a", 0)}, logs={"a": lines("training")})
    process = subprocess.Popen(
        [sys.executable, "-m", "job", "logs", "cats", "--namespace", "vision"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=REPOSITORY,
    )
    timer = threading.Timer(300, process.kill)
    timer.start()
    assert process.stdout is not None
    assert process.stdout.readline() == "[node 0] training\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    timer.cancel()
    assert process.returncode == 130
    assert "the run goes on. python -m job logs cats --namespace vision follows it" in err
    assert "python -m job stop cats --namespace vision stops it." in err
    assert not any(call[1] in ("delete", "patch") for call in cluster.calls)
    assert "jobs.batch/cats-train" in cluster.objects


def test_a_stop_while_following_says_how_to_go_on(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> int:
        raise Stopped("stopped by SIGINT.", 130)

    monkeypatch.setattr("job.cli.runs.follow", interrupted)
    with pytest.raises(Stopped, match="the run goes on"):
        cli.run_command("logs", ["cats"])


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "delete"])
def test_a_hostile_name_reaches_no_kubectl(verb: str, cluster: Cluster) -> None:
    for name in ("--all", "-n", "a,b", "a b", "*", "../x", "a\nb", "", "Cats"):
        with pytest.raises(ConfigError):
            cli.run_command(verb, [f"--name={name}"])
    with pytest.raises(ConfigError):
        cli.run_command(verb, ["cats", "--namespace=--all-namespaces"])
    assert not cluster.calls
