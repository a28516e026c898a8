"""k8s/overlays/cpu-local as containers: a bucket, two pods that find each other by name, a preemption, a model."""

from __future__ import annotations

import copy
import re

import pytest
from k8s.manifests import of_kind, pod_of, rendered
from pods import Cluster

RUN_DIR = "gs://demo/runs/digits"


@pytest.fixture(scope="module")
def bucket(cluster: Cluster) -> str:
    (deployment,) = of_kind(rendered("cpu-local"), "Deployment")
    name = cluster.start(deployment["spec"]["template"]["spec"], "bucket")
    cluster.wait_for(name, "is served at bucket:4443")
    return name


def start_node(cluster: Cluster, index: int) -> str:
    """A pod of the Job, with fewer epochs than the demo has."""
    manifests = rendered("cpu-local")
    pod, (config,) = copy.deepcopy(pod_of(manifests)), of_kind(manifests, "ConfigMap")
    pod["containers"][0]["args"].append("--trainer.max_epochs=4")
    return cluster.start(pod, "train", config=config, index=index)


def run_job(cluster: Cluster, *args: str) -> str:
    """Run a command in a container on the bucket's network; return its output."""
    emulator = ["--env=STORAGE_EMULATOR_HOST=http://bucket:4443", "--env=GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false"]
    limits = ["--read-only", "--tmpfs=/tmp:rw,mode=1777", f"--network={cluster.network}"]
    return cluster.podman("run", "--rm", *emulator, *limits, cluster.image, *args, timeout=900).stdout


def test_preempted_and_resumed(cluster: Cluster, bucket: str) -> None:
    nodes = [start_node(cluster, index) for index in (1, 0)]
    cluster.wait_for("train-0", "epoch 2/")
    cluster.podman("stop", "--time", 120, "train-1")  # SIGTERM, as kubelet sends it to process 1
    assert cluster.exit_code("train-1") == 143, "\n".join(map(cluster.log, nodes))
    cluster.wait_for("train-0", "ended with code 143; it waits for the others")
    assert "Indexed Job: node 0 of 2, meeting at train-0.train:29400" in cluster.log("train-0")
    cluster.remove("train-1")

    start_node(cluster, 1)
    assert [cluster.exit_code(name) for name in nodes] == [0, 0], "\n".join(map(cluster.log, nodes))
    log = cluster.log("train-0")
    resumed = re.search(r"resuming after step (\d+), epoch (\d+)", log.partition("it waits for the others")[2])
    assert resumed is not None, log
    assert int(resumed[1]) > 44  # of 44 steps an epoch
    assert "2 process(es)" in log
    print(log)


def test_the_model_predicts(cluster: Cluster, bucket: str) -> None:
    assert "│ good" in run_job(cluster, "checkpoints", "verify", RUN_DIR)
    output = run_job(cluster, "predict", "--ckpt", RUN_DIR, "--input", "gs://demo/digits/7")
    answers = {label: int(count) for label, count in re.findall(r"(\d) (\d+)", output.partition("In all: ")[2])}
    assert sum(answers.values()) == 179, output
    assert answers["7"] / 179 > 0.9


def test_tensorboard_reads_events_from_the_bucket(cluster: Cluster, bucket: str) -> None:
    """The container of k8s/tensorboard, with the test's bucket."""
    (deployment,) = of_kind(rendered("tensorboard"), "Deployment")
    pod = copy.deepcopy(deployment["spec"]["template"]["spec"])
    (container,) = pod["containers"]
    container["env"] = [
        {"name": "RUNS", "value": "gs://demo/runs"},
        {"name": "STORAGE_EMULATOR_HOST", "value": "http://bucket:4443"},
        {"name": "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "value": "false"},
    ]
    name = cluster.start(pod, "tensorboard")
    cluster.wait_for(name, "http://")
    url = "http://localhost:6006/data/plugin/scalars/tags"
    script = f"""if True:
        import json, time, urllib.request
        for _ in range(60):
            runs = json.load(urllib.request.urlopen({url!r}))
            if any("val/accuracy" in tags for tags in runs.values()): break
            time.sleep(1)
        print(json.dumps(runs))
    """
    runs = cluster.podman("exec", name, "python", "-c", script).stdout
    assert "val/accuracy" in runs, runs + cluster.log(name)
