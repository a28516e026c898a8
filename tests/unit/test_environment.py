from __future__ import annotations

import json

import pytest

from job.cluster.environment import find_node, ignored_variables, require_ranks
from job.cluster.launch import exit_code
from job.errors import ConfigError

KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443", "HOSTNAME": "train-1-x7k2p"}
VERTEX_HOST = "cmle-training-workerpool0-ab-0"
VERTEX_CLUSTER = {"workerpool0": [f"{VERTEX_HOST}:2222"], "workerpool1": ["w1-0:2222", "w1-1:2222"]}


VERTEX_SERVERS = {**VERTEX_CLUSTER, "workerpool2": ["s-0:2222", "s-1:2222"], "workerpool3": ["e-0:2222"]}


def vertex(kind: str, index: int, cluster: dict[str, list[str]] = VERTEX_CLUSTER) -> dict[str, str]:
    """As the documentation and googleapis/python-aiplatform (``TestClusterSpec``) show it.

    Vertex AI sets the other variables for PyTorch, besides.
    """
    spec = {"cluster": cluster, "environment": "cloud", "task": {"type": kind, "index": index}, "job": "{}"}
    torchs = {"MASTER_ADDR": "x", "MASTER_PORT": "2222", "WORLD_SIZE": "3", "RANK": "1"}  # counting machines
    return {"CLUSTER_SPEC": json.dumps(spec), "CLOUD_ML_JOB_ID": "4242", **torchs}


TORCHRUN = {
    "LOCAL_RANK": "1",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "ROLE_RANK": "3",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "41231",
    "TORCHELASTIC_RUN_ID": "abc",
}
# A worker of a PyTorchJob with a master, nprocPerNode: auto (the default): kubeflow/training-operator v1.9.0,
# pkg/controller.v1/pytorch/envvar.go and master.go. RANK counts nodes there.
PYTORCHJOB = {
    **KUBERNETES,
    "MASTER_ADDR": "mnist-master-0",
    "MASTER_PORT": "23456",
    "WORLD_SIZE": "2",
    "RANK": "1",
    "PET_MASTER_ADDR": "mnist-master-0",
    "PET_MASTER_PORT": "23456",
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "auto",
    "PYTHONUNBUFFERED": "1",
}
# The same with nprocPerNode: "4". WORLD_SIZE is the number of replicas times that, RANK is still the node's.
PYTORCHJOB_PROCESSES = {**PYTORCHJOB, "WORLD_SIZE": "8", "PET_NPROC_PER_NODE": "4"}
# A worker of a PyTorchJob with an elasticPolicy: elastic.go. Its number of nodes is a range.
PYTORCHJOB_ELASTIC = {
    **KUBERNETES,
    "PYTHONUNBUFFERED": "1",
    "PET_RDZV_ENDPOINT": "mnist-worker-0:23456",
    "PET_RDZV_BACKEND": "c10d",
    "PET_NNODES": "1:4",
    "PET_MAX_RESTARTS": "100",
}
# The node of a TrainJob with Kubeflow Trainer v2.3.0's torch plugin (pkg/runtime/framework/plugins/torch/torch.go). Its
# JobSet's webhook makes the Jobs Indexed (kubernetes-sigs/jobset v0.12.0, pkg/webhooks/jobset_webhook.go), and
# PET_NODE_RANK is the annotation that JOB_COMPLETION_INDEX comes from.
TRAINJOB = {
    **KUBERNETES,
    "JOB_COMPLETION_INDEX": "2",
    "PET_NNODES": "3",
    "PET_NPROC_PER_NODE": "4",
    "PET_NODE_RANK": "2",
    "PET_MASTER_ADDR": "llm-node-0-0.llm",
    "PET_MASTER_PORT": "29500",
}
INDEXED = {
    **KUBERNETES,
    "JOB_COMPLETION_INDEX": "1",
    "LAUNCH_NODES": "4",
    "LAUNCH_COORDINATOR": "train-0.train",
    "LAUNCH_ID": "6f0c",
}
# As GKE's webhook, whose source is not public, sets it in a pod of an Indexed Job that asks for google.com/tpu:
# https://cloud.google.com/kubernetes-engine/docs/concepts/tpus
TPU = {
    **KUBERNETES,
    "JOB_COMPLETION_INDEX": "2",
    "LAUNCH_NODES": "4",
    "LAUNCH_COORDINATOR": "train-0.train",
    "LAUNCH_ID": "6f0c",
    "TPU_WORKER_ID": "2",
    "TPU_WORKER_HOSTNAMES": "train-0.train,train-1.train,train-2.train,train-3.train",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_TOPOLOGY": "4x4",
    "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
}
MULTISLICE = {  # and in a pod of a JobSet with two slices
    **TPU,
    "TPU_WORKER_HOSTNAMES": ",".join(f"train-slice-1-{n}.train" for n in range(4)),
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "train-slice-0-0.train:8080",
}
# As Google's webhook for Ray on GKE sets it, the only one with public source (ai-on-gke/kuberay-tpu-webhook, main.go):
# the port of the TPU runtime has a variable of its own.
MULTISLICE_RAY = {
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "workers-1-0.cluster-headless,workers-1-1.cluster-headless",
    "TPU_NAME": "workers-1",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "workers-0-0.cluster-headless",
    "MEGASCALE_PORT": "8081",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/root", "CUDA_VISIBLE_DEVICES": "0,1"}, ("plain", 1, 0, "localhost", 29400, 0, "")),
        ({"LAUNCH_PROCESSES": "2"}, ("plain", 1, 0, "localhost", 29400, 2, "")),
        (TORCHRUN, ("torchrun worker", 2, 1, "node0", 41231, 2, "")),
        (PYTORCHJOB, ("Kubeflow", 2, 1, "mnist-master-0", 23456, 0, "")),
        (PYTORCHJOB_PROCESSES, ("Kubeflow", 2, 1, "mnist-master-0", 23456, 4, "")),
        (TRAINJOB, ("Kubeflow", 3, 2, "llm-node-0-0.llm", 29500, 4, "")),
        ({**TRAINJOB, "LAUNCH_ID": "6f0c"}, ("Kubeflow", 3, 2, "llm-node-0-0.llm", 29500, 4, "6f0c")),
        ({**TRAINJOB, "PET_NPROC_PER_NODE": "auto"}, ("Kubeflow", 3, 2, "llm-node-0-0.llm", 29500, 0, "")),
        ({**TRAINJOB, "LAUNCH_PROCESSES": "1"}, ("Kubeflow", 3, 2, "llm-node-0-0.llm", 29500, 1, "")),
        ({**TRAINJOB, **TORCHRUN}, ("torchrun worker", 2, 1, "node0", 41231, 2, "")),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "8"}, ("Kubeflow", 1, 0, "localhost", 29400, 8, "")),
        (
            {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "etcd:2379", "PET_RDZV_ID": "r"},
            ("Kubeflow", 2, 0, "etcd", 2379, 0, "r"),
        ),
        (vertex("workerpool0", 0), ("Vertex AI", 3, 0, VERTEX_HOST, 2222, 0, "4242")),
        (vertex("workerpool1", 1), ("Vertex AI", 3, 2, VERTEX_HOST, 2222, 0, "4242")),
        (vertex("workerpool0", 0, {"workerpool0": ["h:2222"]}), ("Vertex AI", 1, 0, "h", 2222, 0, "4242")),
        (vertex("workerpool1", 1, VERTEX_SERVERS), ("Vertex AI", 3, 2, VERTEX_HOST, 2222, 0, "4242")),
        (INDEXED, ("Indexed Job", 4, 1, "train-0.train", 29400, 0, "6f0c")),
        ({**INDEXED, "LAUNCH_COORDINATOR": "a-0.a:1234"}, ("Indexed Job", 4, 1, "a-0.a", 1234, 0, "6f0c")),
        (TPU, ("TPU", 4, 2, "train-0.train", 29400, 1, "6f0c")),
        (MULTISLICE, ("TPU", 8, 6, "train-slice-0-0.train", 29400, 1, "6f0c")),
        (MULTISLICE_RAY, ("TPU", 4, 3, "workers-0-0.cluster-headless", 29400, 1, "")),
        ({**TRAINJOB, **TPU, "PET_NNODES": "4"}, ("TPU", 4, 2, "train-0.train", 29400, 1, "6f0c")),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, ("TPU", 1, 0, "localhost", 29400, 1, "")),
        ({**KUBERNETES, "JOB_COMPLETION_INDEX": "0"}, ("Indexed Job", 1, 0, "localhost", 29400, 0, "")),
    ],
)
def test_every_platform_is_recognised(environment: dict[str, str], expected: tuple[object, ...]) -> None:
    node = find_node(environment)
    fields = (node.platform, node.nodes, node.node_rank, node.host, node.port, node.processes, node.run_id)
    assert fields == expected
    assert all(environment[name] == value for name, value in node.evidence.items())
    assert node.platform in str(node)
    for name in node.evidence:
        assert name in str(node)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**INDEXED, **TRAINJOB}, "PET_NNODES=3, LAUNCH_NODES=4: these contradict one another"),
        ({**TRAINJOB, "JOB_COMPLETION_INDEX": "1"}, "PET_NODE_RANK=2, JOB_COMPLETION_INDEX=1: these contradict"),
        ({**TRAINJOB, **vertex("workerpool0", 0)}, "(Kubeflow, Vertex AI, Indexed Job) are set"),
        ({**INDEXED, **vertex("workerpool0", 0)}, "(Vertex AI, Indexed Job) are set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2: these are set, but not all variables of torchrun"),
        ({"LOCAL_RANK": "0", "RANK": "0"}, "WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
        ({**INDEXED, "JOB_COMPLETION_INDEX": "4"}, "there is no node 4 of 4"),
        ({"JOB_COMPLETION_INDEX": "2"}, "LAUNCH_NODES does not say how many"),
        ({"JOB_COMPLETION_INDEX": "0", "LAUNCH_NODES": "2"}, "LAUNCH_COORDINATOR, which is not set"),
        ({**INDEXED, "LAUNCH_NODES": "two"}, "LAUNCH_NODES must be a number, not 'two'"),
        ({**PYTORCHJOB, "PET_NODE_RANK": "2"}, "there is no node 2 of 2"),
        ({"PET_NNODES": "2"}, "PET_NODE_RANK, which is not set"),
        ({**INDEXED, "LAUNCH_COORDINATOR": "a-0.a:12x4"}, "a-0.a:12x4, the coordinator, needs a number"),
        ({**PYTORCHJOB, "PET_NPROC_PER_NODE": "two"}, "PET_NPROC_PER_NODE must be a number, not 'two'"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "neither PET_MASTER_ADDR nor PET_RDZV_ENDPOINT"),
        (PYTORCHJOB_ELASTIC, "PET_NNODES must be a number, not '1:4'"),
        ({"CLUSTER_SPEC": "{"}, "CLUSTER_SPEC is not as Vertex AI sets it"),
        ({"CLUSTER_SPEC": '{"cluster": [], "task": {"type": "", "index": 0}}'}, "is not as Vertex AI sets it"),
        (
            vertex("workerpool2", 1, VERTEX_SERVERS),
            "this machine is of workerpool2, and only workerpool0 and workerpool1",
        ),
        (vertex("workerpool1", 2), "there is no node 3 of 3"),
        ({"LAUNCH_PROCESSES": "0"}, "at least one process is needed"),
        ({**TPU, "TPU_WORKER_ID": "4"}, "there is no host 4 among the 4 of a slice"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID, which is not set"),
        ({**MULTISLICE, "MEGASCALE_SLICE_ID": "2"}, "there is no node 10 of 8"),
        ({**TPU, "MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_SLICE_ID, MEGASCALE_COORDINATOR_ADDRESS, which is not set"),
        ({**TPU, **vertex("workerpool0", 0)}, "(Vertex AI, TPU, Indexed Job) are set"),
        ({**TPU, "LAUNCH_PROCESSES": "4"}, "one process drives all chips"),
        ({"PET_NPROC_PER_NODE": "2"}, "PET_NPROC_PER_NODE=2: torchrun would take these as its options"),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "0"}, "PET_NPROC_PER_NODE=0: at least one process"),
    ],
)
def test_invalid_environments_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as excinfo:
        find_node(environment)
    assert message in str(excinfo.value)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        TORCHRUN,
        {**TORCHRUN, **SLURM, "SLURM_NTASKS": "2"},
        {**SLURM, "SLURM_NTASKS": "1"},
        {"MASTER_ADDR": "left-over"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},  # a PyTorchJob of one node
        {"JOB_COMPLETION_INDEX": "3"},  # independent runs, one per index
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"},
    ],
)
def test_ranks_of_torchrun_or_one_process(environment: dict[str, str]) -> None:
    require_ranks(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4: this is one of several processes, but RANK, LOCAL_RANK"),
        ({"RANK": "1"}, "RANK=1: this is one of several processes, but WORLD_SIZE"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1: this is one of several"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE must be a number, not 'four'"),
        ({"RANK": "x"}, "RANK must be a number"),
        ({**TORCHRUN, "RANK": "4"}, "these contradict one another"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "these contradict one another"),
        ({**SLURM, "SLURM_NTASKS": "2"}, "SLURM_NTASKS=2, but the ranks of this job are started by torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"PET_NNODES": "2"}, "PET_NNODES=2: Kubeflow has started several nodes"),
        (PYTORCHJOB, "RANK=1, WORLD_SIZE=2: this is one of several"),
    ],
)
def test_variables_of_other_launchers_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as excinfo:
        require_ranks(environment)
    assert message in str(excinfo.value)


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, 0), ({"PET_MAX_RESTARTS": "4"}, 4), ({"LAUNCH_RESTARTS": "2"}, 2)]
)
def test_restarts_in_place(variables: dict[str, str], expected: int) -> None:
    assert find_node({"PET_NNODES": "1", **variables}).restarts == expected


@pytest.mark.parametrize(("variables", "expected"), [({}, None), ({"LAUNCH_WAIT_SECONDS": "5"}, 5)])
def test_limit_of_the_wait_for_other_nodes(variables: dict[str, str], expected: int | None) -> None:
    assert find_node({**INDEXED, **variables}).wait_seconds == expected


def test_a_limit_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="LAUNCH_WAIT_SECONDS=0"):
        find_node({**INDEXED, "LAUNCH_WAIT_SECONDS": "0"})


def test_restarts_below_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="LAUNCH_RESTARTS=-1"):
        find_node({"LAUNCH_RESTARTS": "-1"})


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        *(([75, 2], 2), ([75, 143], 143), ([1, 75], 75), ([-9], 75), ([-9, 1], 75), ([1], 70)),
        *(([75, 70], 70), ([143, 130], 130), ([70, 2], 2)),
    ],
)
def test_one_exit_code_for_all_ranks(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


@pytest.mark.parametrize(
    ("codes", "mistakes", "expected"),
    [([75], [2], 2), ([75], [70], 70), ([-9], [70], 75), ([255], [70], 75), ([-9], [2], 2)],
)
def test_mistakes_of_other_ranks(codes: list[int], mistakes: list[int], expected: int) -> None:
    """An unexpected exception after the loss of another rank is its consequence."""
    assert exit_code(codes, mistakes) == expected


def test_variables_that_torchrun_would_read_are_reported() -> None:
    assert ignored_variables({"PET_NNODES": "1", "PET_MONITOR_INTERVAL": "5"}) == ["PET_MONITOR_INTERVAL"]
