"""Detect the platform, the nodes and the node rank from environment variables.

Sources:

- torchrun: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
- Kubeflow Trainer 2.3 (kubeflow/trainer, pkg/runtime/framework/plugins/torch/torch.go): PET_ variables, in the pods of
  a JobSet, whose Jobs are Indexed (kubernetes-sigs/jobset, pkg/webhooks/jobset_webhook.go).
- PyTorchJob of Kubeflow's Training Operator 1.9 (kubeflow/training-operator, pkg/controller.v1/pytorch/envvar.go,
  master.go, elastic.go): PET_ variables, and RANK of the node; RANK and WORLD_SIZE are not torchrun's there.
- Vertex AI: https://cloud.google.com/vertex-ai/docs/training/distributed-training#cluster-variables, and the tests of
  its client (googleapis/python-aiplatform, TestClusterSpec).
- Indexed Job: https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode
- TPU hosts on GKE: https://cloud.google.com/kubernetes-engine/docs/concepts/tpus. The source of GKE's webhook is not
  public; that of its sibling for Ray is (ai-on-gke/kuberay-tpu-webhook, main.go).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from job.errors import ConfigError

Platform = Literal["plain", "torchrun worker", "Kubeflow", "Vertex AI", "TPU", "Indexed Job"]
DEFAULT_PORT = 29400
_MARKER_VARIABLES: dict[str, Platform] = {
    "PET_NNODES": "Kubeflow",
    "CLUSTER_SPEC": "Vertex AI",
    "TPU_WORKER_HOSTNAMES": "TPU",
    "JOB_COMPLETION_INDEX": "Indexed Job",
}
"""The variable by which each platform is recognised."""
_MAY_COEXIST: tuple[Platform, ...] = ("TPU", "Kubeflow", "Indexed Job")
"""Platforms whose variables stand together in one pod, in the order in which they are preferred.

JobSet makes Indexed Jobs, so the pods of Kubeflow Trainer have a JOB_COMPLETION_INDEX, too. TPU hosts are pods of an
Indexed Job or a JobSet, whose index is within their slice.
"""
_VERTEX_POOLS = ("workerpool0", "workerpool1")
"""Worker pools that train: one machine, node 0, and all others."""

_KUBEFLOW_VARIABLES = (
    *("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    *("PET_RDZV_ENDPOINT", "PET_RDZV_ID", "PET_MAX_RESTARTS"),
)
_OTHER_LAUNCHERS = {
    "SLURM_NTASKS": "Slurm (srun --ntasks-per-node=1)",
    "OMPI_COMM_WORLD_SIZE": "mpirun (--npernode 1)",
    "PMI_SIZE": "MPI",
}
"""Variables with the number of tasks that launchers other than torchrun have started."""


@dataclass(frozen=True)
class Node:
    """This machine or container among the nodes of the job.

    Attributes:
        platform: the platform that started it.
        nodes: number of nodes.
        node_rank: of this node, from 0.
        host: name or address of node 0.
        port: rendezvous port on node 0.
        processes: training processes per node; 0: one per GPU, or one.
        run_id: distinguishes jobs with the same rendezvous endpoint; may be empty.
        evidence: the variables that this was derived from.
        restarts: how often the ranks are started again, besides the times at which another node was replaced.
        wait_seconds: how long the node waits for the others; None: without limit.
    """

    platform: Platform
    nodes: int = 1
    node_rank: int = 0
    host: str = "localhost"
    port: int = DEFAULT_PORT
    processes: int = 0
    run_id: str = ""
    evidence: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    wait_seconds: int | None = None

    def __str__(self) -> str:
        variables = ", ".join(f"{name}={value}" for name, value in self.evidence.items())
        where = (
            f"node {self.node_rank} of {self.nodes}, meeting at {self.host}:{self.port}" if self.nodes > 1 else "alone"
        )
        return f"{self.platform}: {where} ({variables or 'no variable says otherwise'})"


def find_node(environment: Mapping[str, str]) -> Node:
    """Find the node that this process runs on.

    On any platform ``LAUNCH_PROCESSES`` sets the processes per node, and ``LAUNCH_RESTARTS`` how often its ranks are
    restarted in place, and ``LAUNCH_WAIT_SECONDS`` how long it waits for the other nodes.

    Raises:
        ConfigError: variables are missing, contradict one another, or make no sense; the message names them.
    """
    if "LOCAL_RANK" in environment:
        return _torchrun_worker(environment)
    platforms = {name: platform for name, platform in _MARKER_VARIABLES.items() if name in environment}
    if len(platforms) > 1 and not set(platforms.values()) <= set(_MAY_COEXIST):
        raise ConfigError(
            f"the environment variables of several platforms ({', '.join(platforms.values())}) are set: "
            f"{', '.join(platforms)}. Unset those of the other platforms."
        )
    readers = {"Vertex AI": _vertex, "TPU": _tpu, "Kubeflow": _kubeflow, "Indexed Job": _indexed_job}
    read = next((readers[platform] for platform in readers if platform in platforms.values()), _plain)
    node = read(environment)
    if not 0 <= node.node_rank < node.nodes:
        settings = _settings(environment, *node.evidence)
        raise ConfigError(f"there is no node {node.node_rank} of {node.nodes} ({settings}).")
    return replace(node, restarts=_restarts(environment), wait_seconds=_wait_seconds(environment))


def require_ranks(environment: Mapping[str, str]) -> None:
    """Check the variables of a process that trains or evaluates: torchrun's, all of them, or none that counts ranks.

    Raises:
        ConfigError: a launcher other than torchrun started this process, or some of torchrun's variables are left over.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, world_size, local_rank, local_world_size = (
        _number(environment, name, default) for name, default in zip(names, (0, 1, 0, 1), strict=True)
    )
    variables = _settings(environment, *(name for name in names if name in environment))
    if (rank, world_size, local_rank, local_world_size) != (0, 1, 0, 1):
        needed = (*names, "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in environment]:
            raise ConfigError(
                f"{variables}: this is one of several processes, but {', '.join(missing)} is not set. Start them by "
                "python -m job launch or torchrun, which set all of these; or unset them for one process alone."
            )
        if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
            raise ConfigError(f"{variables}: these contradict one another. Start the ranks by python -m job launch.")
    if "LOCAL_RANK" in environment or "TORCHELASTIC_RUN_ID" in environment:
        return
    for name in _OTHER_LAUNCHERS:
        if name in environment and _number(environment, name) > 1:
            raise ConfigError(
                f"{name}={environment[name]}, but the ranks of this job are started by torchrun. Let "
                f"{_OTHER_LAUNCHERS[name]} start one task per node, which runs python -m job launch …; or unset {name} "
                "for one process alone."
            )
    if "PET_NNODES" in environment and environment["PET_NNODES"] != "1":
        raise ConfigError(
            f"PET_NNODES={environment['PET_NNODES']}: Kubeflow has started several nodes, which meet under "
            "python -m job launch … alone. Or unset PET_NNODES for one process alone."
        )


def ignored_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables of Kubeflow, which torchrun would take as its options, that :func:`find_node` does not read."""
    return sorted(name for name in environment if name.startswith("PET_") and name not in _KUBEFLOW_VARIABLES)


def _restarts(environment: Mapping[str, str]) -> int:
    """``LAUNCH_RESTARTS``, else Kubeflow's ``PET_MAX_RESTARTS``, else 0: the platform restarts the container."""
    name = "LAUNCH_RESTARTS" if "LAUNCH_RESTARTS" in environment else "PET_MAX_RESTARTS"
    restarts = _number(environment, name, 0)
    if restarts < 0:
        raise ConfigError(f"{name}={restarts}: restarts cannot be fewer than 0.")
    return restarts


def _wait_seconds(environment: Mapping[str, str]) -> int | None:
    if "LAUNCH_WAIT_SECONDS" not in environment:
        return None
    seconds = _number(environment, "LAUNCH_WAIT_SECONDS")
    if seconds < 1:
        raise ConfigError(f"LAUNCH_WAIT_SECONDS={seconds}: at least 1 is needed; unset it to wait without limit.")
    return seconds


def _plain(environment: Mapping[str, str]) -> Node:
    if present := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "NODE_RANK") if name in environment]:
        raise ConfigError(
            f"{_settings(environment, *present)}: these are set, but not all variables of torchrun. Start the ranks by "
            "torchrun; or unset them, so that launch starts the ranks."
        )
    if pet_variables := sorted(name for name in environment if name.startswith("PET_")):
        raise ConfigError(
            f"{_settings(environment, *pet_variables)}: torchrun would take these as its options, but PET_NNODES, "
            f"which Kubeflow sets with them, is missing. Unset {', '.join(pet_variables)}, or set PET_NNODES."
        )
    return Node("plain", processes=_processes(environment), evidence=_present(environment, "LAUNCH_PROCESSES"))


def _torchrun_worker(environment: Mapping[str, str]) -> Node:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environment]:
        raise ConfigError(f"LOCAL_RANK is set, {', '.join(missing)} not: start the ranks by torchrun, which sets all.")
    world_size, local_world_size = _number(environment, "WORLD_SIZE"), _number(environment, "LOCAL_WORLD_SIZE")
    return Node(
        "torchrun worker",
        nodes=-(-world_size // max(local_world_size, 1)),
        node_rank=_number(environment, "RANK") // max(local_world_size, 1),
        host=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        processes=local_world_size,
        evidence=_present(environment, *names),
    )


def _kubeflow(environment: Mapping[str, str]) -> Node:
    """Trainer's torch plugin and PyTorchJob; PET_NODE_RANK of the former is its pod's JOB_COMPLETION_INDEX."""
    if ":" in environment["PET_NNODES"]:
        raise ConfigError(
            f"PET_NNODES must be a number, not {environment['PET_NNODES']!r}: all nodes train from the start. Remove "
            "the PyTorchJob's elasticPolicy."
        )
    nodes = _number(environment, "PET_NNODES")
    _require_equal(environment, "PET_NODE_RANK", "JOB_COMPLETION_INDEX")
    _require_equal(environment, "PET_NNODES", "LAUNCH_NODES")
    host, port = environment.get("PET_MASTER_ADDR", ""), environment.get("PET_MASTER_PORT", "")
    if not host and "PET_RDZV_ENDPOINT" in environment:
        host, _, port = environment["PET_RDZV_ENDPOINT"].partition(":")
    if nodes > 1:
        _require(environment, "Kubeflow", "PET_NODE_RANK")
        if not host:
            raise ConfigError("Kubeflow set PET_NNODES, but neither PET_MASTER_ADDR nor PET_RDZV_ENDPOINT.")
    processes = environment.get("PET_NPROC_PER_NODE", "auto")
    if processes not in ("auto", "gpu", "cpu") and _number(environment, "PET_NPROC_PER_NODE") < 1:
        raise ConfigError(f"PET_NPROC_PER_NODE={processes}: at least one process is needed.")
    return Node(
        "Kubeflow",
        nodes=nodes,
        node_rank=_number(environment, "PET_NODE_RANK", 0),
        host=host or "localhost",
        port=_port(host, port),
        processes=_processes(environment) or (int(processes) if processes.isdecimal() else 0),
        run_id=environment.get("PET_RDZV_ID") or environment.get("LAUNCH_ID", ""),
        evidence=_present(environment, *_KUBEFLOW_VARIABLES, "LAUNCH_ID", "LAUNCH_PROCESSES"),
    )


def _vertex(environment: Mapping[str, str]) -> Node:
    """Pool 0 is one machine, node 0; pool 1 are the others.

    Pools 2 and 3 (parameter servers or Vertex AI's Reduction Server, evaluators) run other programs.
    """
    try:
        spec = json.loads(environment["CLUSTER_SPEC"])
        pools, pool, index = spec["cluster"], spec["task"]["type"], int(spec["task"]["index"])
        hosts = [host for name in _VERTEX_POOLS for host in pools.get(name, [])]
        node_rank = index if pool == _VERTEX_POOLS[0] else index + len(pools[_VERTEX_POOLS[0]])
        name, _, port = hosts[0].partition(":")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"CLUSTER_SPEC is not as Vertex AI sets it ({error!r}): {environment['CLUSTER_SPEC']}"
        ) from error
    if pool not in _VERTEX_POOLS:
        raise ConfigError(
            f"CLUSTER_SPEC: this machine is of {pool}, and only {' and '.join(_VERTEX_POOLS)} train. Move its replicas "
            "to the second of workerPoolSpecs."
        )
    return Node(
        "Vertex AI",
        nodes=len(hosts),
        node_rank=node_rank,
        host=name,
        port=_port(name, port),
        processes=_processes(environment),
        run_id=environment.get("CLOUD_ML_JOB_ID", ""),
        evidence=_present(environment, "CLUSTER_SPEC", "CLOUD_ML_JOB_ID", "LAUNCH_PROCESSES"),
    )


def _tpu(environment: Mapping[str, str]) -> Node:
    """The hosts of a slice in TPU_WORKER_HOSTNAMES' order, slice after slice; one process drives a host's chips."""
    hosts = environment["TPU_WORKER_HOSTNAMES"].split(",")
    _require(environment, "a TPU host", "TPU_WORKER_ID")
    worker, slices, slice_id = _number(environment, "TPU_WORKER_ID"), 1, 0
    coordinator = hosts[0]
    if "MEGASCALE_NUM_SLICES" in environment:
        _require(environment, "a TPU host of several slices", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
        slices, slice_id = _number(environment, "MEGASCALE_NUM_SLICES"), _number(environment, "MEGASCALE_SLICE_ID")
        coordinator = environment["MEGASCALE_COORDINATOR_ADDRESS"].partition(":")[0]  # its port is the TPU runtime's
    if not 0 <= worker < len(hosts):
        raise ConfigError(
            f"there is no host {worker} among the {len(hosts)} of a slice "
            f"({_settings(environment, 'TPU_WORKER_ID', 'TPU_WORKER_HOSTNAMES')})."
        )
    if _processes(environment) > 1:
        raise ConfigError(f"{_settings(environment, 'LAUNCH_PROCESSES')}: one process drives all chips of a TPU host.")
    names = ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    return Node(
        "TPU",
        nodes=slices * len(hosts),
        node_rank=slice_id * len(hosts) + worker,
        host=coordinator,
        processes=1,
        run_id=environment.get("LAUNCH_ID", ""),
        evidence=_present(environment, *names, "MEGASCALE_COORDINATOR_ADDRESS", "LAUNCH_ID"),
    )


def _indexed_job(environment: Mapping[str, str]) -> Node:
    """Kubernetes sets only the index of a pod; the manifest must set the number of nodes and the address of node 0."""
    nodes = _number(environment, "LAUNCH_NODES", 1)
    if nodes > 1:
        _require(environment, "a Job of several nodes", "LAUNCH_COORDINATOR")
    elif _number(environment, "JOB_COMPLETION_INDEX") > 0:
        raise ConfigError(
            f"{_settings(environment, 'JOB_COMPLETION_INDEX')}, so there are other nodes, but LAUNCH_NODES does not "
            "say how many. Set it, and LAUNCH_COORDINATOR (<job>-0.<service>), in the manifest."
        )
    host, _, port = environment.get("LAUNCH_COORDINATOR", "localhost").partition(":")
    return Node(
        "Indexed Job",
        nodes=nodes,
        node_rank=_number(environment, "JOB_COMPLETION_INDEX"),
        host=host,
        port=_port(host, port),
        processes=_processes(environment),
        run_id=environment.get("LAUNCH_ID", ""),
        evidence=_present(
            environment, "JOB_COMPLETION_INDEX", "LAUNCH_NODES", "LAUNCH_COORDINATOR", "LAUNCH_ID", "LAUNCH_PROCESSES"
        ),
    )


def _processes(environment: Mapping[str, str]) -> int:
    count = _number(environment, "LAUNCH_PROCESSES", 0)
    if count < 0 or environment.get("LAUNCH_PROCESSES") == "0":
        raise ConfigError(f"{_settings(environment, 'LAUNCH_PROCESSES')}: at least one process is needed.")
    return count


def _port(host: str, text: str) -> int:
    if text and not text.isdecimal():
        raise ConfigError(f"{host}:{text}, the coordinator, needs a number as its port.")
    return int(text or DEFAULT_PORT)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in environment and default is not None:
        return default
    try:
        return int(environment[name])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name} must be a number, not {environment.get(name)!r}.") from error


def _require(environment: Mapping[str, str], platform: str, *names: str) -> None:
    if missing := [name for name in names if name not in environment]:
        raise ConfigError(f"{platform} needs {', '.join(missing)}, which is not set.")


def _require_equal(environment: Mapping[str, str], one: str, other: str) -> None:
    if one in environment and other in environment and _number(environment, one) != _number(environment, other):
        raise ConfigError(f"{_settings(environment, one, other)}: these contradict one another. Unset {other}.")


def _present(environment: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: environment[name] for name in names if name in environment}


def _settings(environment: Mapping[str, str], *names: str) -> str:
    return ", ".join(f"{name}={environment.get(name)}" for name in names)
