"""A run as the cluster knows it: its Job, JobSet or TrainJob, and its pods."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from job import typed
from job.errors import EXIT_PREEMPTED, EXIT_RETRY, EXIT_USER_ERROR, ConfigError
from job.process.terminal import escape
from job.submit.kubectl import Kubectl, NoSuchKind
from job.submit.overlay import INSTANCE_LABEL, PART_OF_LABEL, QUEUE_LABEL
from job.submit.run import object_name

State = Literal["runs", "waits in its queue", "is stopped", "is complete", "has failed"]

RESOURCES = {"Job": "jobs.batch", "TrainJob": "trainjobs.trainer.kubeflow.org", "JobSet": "jobsets.jobset.x-k8s.io"}
"""In the order in which they are looked up: a TrainJob has a JobSet of the same name."""
PARTS = (
    "services",
    "configmaps",
    "serviceaccounts",
    "networkpolicies.networking.k8s.io",
    "poddisruptionbudgets.policy",
)
"""Kinds of the other objects that a run may have."""
_WORKLOADS_OF_KUEUE = "workloads.kueue.x-k8s.io"
CONTENT_ANNOTATION = "job/submitted-content"
"""Digest of what was applied, by which the same command is recognised."""
IGNORED_EXIT_CODES = (0, 69, 143)
"""Of pods that ended without a failure of their own."""
CONTAINERS = ("train", "node")
"""Name of the container that trains, of a TrainJob the latter."""
_INDEX = "batch.kubernetes.io/job-completion-index"
_JOB_INDEX = "jobset.sigs.k8s.io/job-index"
_MAX_MESSAGE = 500
_Type = TypeVar("_Type")


class Condition(msgspec.Struct, frozen=True):
    """A condition of an object."""

    type: str
    status: str
    reason: str | None = None
    message: str | None = None

    @property
    def text(self) -> str:
        """Reason and message, in one line."""
        parts = [part for part in (self.reason, self.message) if part]
        return escape(": ".join(parts)[:_MAX_MESSAGE])


class Owner(msgspec.Struct, frozen=True):
    """An owner of an object."""

    kind: str
    name: str


class Metadata(msgspec.Struct, frozen=True, rename="camel"):
    """Metadata of an object."""

    name: str = ""
    uid: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    owner_references: tuple[Owner, ...] = ()


class Terminated(msgspec.Struct, frozen=True, rename="camel"):
    """How a container ended."""

    exit_code: int = 0
    reason: str | None = None
    finished_at: str | None = None


class Waiting(msgspec.Struct, frozen=True):
    """Why a container has not begun."""

    reason: str | None = None
    message: str | None = None


class ContainerState(msgspec.Struct, frozen=True):
    """What a container does; one of the three is there."""

    waiting: Waiting | None = None
    running: dict[str, Any] | None = None
    terminated: Terminated | None = None


class ContainerStatus(msgspec.Struct, frozen=True, rename="camel"):
    """The status of a container."""

    name: str
    restart_count: int = 0
    state: ContainerState = ContainerState()


class PodStatus(msgspec.Struct, frozen=True, rename="camel"):
    """The status of a pod."""

    phase: str = "Unknown"
    reason: str | None = None
    message: str | None = None
    conditions: tuple[Condition, ...] | None = None
    container_statuses: tuple[ContainerStatus, ...] | None = None


class PodSpec(msgspec.Struct, frozen=True, rename="camel"):
    """The spec of a pod."""

    node_name: str | None = None


class Pod(msgspec.Struct, frozen=True):
    """A pod of the run."""

    metadata: Metadata
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def container(self) -> ContainerStatus | None:
        """The status of the container that trains; sidecars, which a mesh adds, may precede it."""
        statuses = self.status.container_statuses or ()
        return next((each for each in statuses if each.name in CONTAINERS), next(iter(statuses), None))

    @property
    def exit_code(self) -> int | None:
        """Of its container, once it has ended."""
        container = self.container
        ended = container.state.terminated if container else None
        return ended.exit_code if ended else None

    @property
    def index(self) -> tuple[int, int]:
        """Slice, and host within it."""
        both = {**(self.metadata.labels or {}), **(self.metadata.annotations or {})}
        numbers = [both.get(name, "0") for name in (_JOB_INDEX, _INDEX)]
        first, second = (int(number) if number.isdecimal() else 0 for number in numbers)
        return first, second

    @property
    def problem(self) -> str:
        """Why it does not run yet, or why it ended; empty while it runs."""
        for condition in self.status.conditions or ():
            if condition.type == "PodScheduled" and condition.status == "False":
                return condition.text
        container = self.container
        waiting = container.state.waiting if container else None
        if waiting is not None and waiting.reason:
            return escape(": ".join(part for part in (waiting.reason, waiting.message) if part)[:_MAX_MESSAGE])
        if self.status.reason:
            parts = [part for part in (self.status.reason, self.status.message) if part]
            return escape(": ".join(parts)[:_MAX_MESSAGE])
        ended = container.state.terminated if container else None
        return escape(ended.reason or "") if ended and ended.exit_code else ""


class _Spec(msgspec.Struct, frozen=True):
    suspend: bool | None = None
    active: bool = True


class _Status(msgspec.Struct, frozen=True, rename="camel"):
    conditions: tuple[Condition, ...] | None = None


class _Object(msgspec.Struct, frozen=True):
    metadata: Metadata
    spec: _Spec = _Spec()
    status: _Status = _Status()


class _Pods(msgspec.Struct, frozen=True):
    items: tuple[Pod, ...] = ()


class _Objects(msgspec.Struct, frozen=True):
    items: tuple[_Object, ...] = ()


@dataclass(frozen=True)
class Workload:
    """The Job, JobSet or TrainJob of a run.

    Attributes:
        run: name of the run.
        kind: of the object.
        metadata: of the object.
        is_suspended: whether it has no pods for the time being.
        is_stopped: whether it stays suspended: by ``stop``, and not because it waits in a queue.
        conditions: those that are true.
    """

    run: str
    kind: str
    metadata: Metadata
    is_suspended: bool
    is_stopped: bool
    conditions: tuple[Condition, ...]

    @property
    def resource(self) -> str:
        """The object, as kubectl's arguments name it."""
        return f"{RESOURCES[self.kind]}/{self.metadata.name}"

    @property
    def queue(self) -> str:
        """Its queue of Kueue; empty without."""
        return (self.metadata.labels or {}).get(QUEUE_LABEL, "")

    @property
    def content(self) -> str:
        """Digest of what was applied; empty if ``submit`` did not apply it."""
        return (self.metadata.annotations or {}).get(CONTENT_ANNOTATION, "")

    @property
    def is_own(self) -> bool:
        """Whether its labels are those of a run."""
        labels = self.metadata.labels or {}
        return labels.get(INSTANCE_LABEL) == self.run and labels.get(PART_OF_LABEL) == "job"

    @property
    def ending(self) -> Condition | None:
        """The condition by which it is complete or failed."""
        return next((each for each in self.conditions if each.type in ("Complete", "Completed", "Failed")), None)

    @property
    def state(self) -> State:
        """How it is doing."""
        if self.ending is not None:
            return "has failed" if self.ending.type == "Failed" else "is complete"
        if self.is_suspended:
            return "is stopped" if self.is_stopped else "waits in its queue"
        return "runs"

    @property
    def has_ended(self) -> bool:
        """Whether no pod will follow."""
        return self.ending is not None

    @property
    def pod_selector(self) -> str:
        """Labels of its pods."""
        label = "batch.kubernetes.io/job-name" if self.kind == "Job" else "jobset.sigs.k8s.io/jobset-name"
        return f"{label}={self.metadata.name}"


def instance_selector(run: str) -> str:
    """Labels of all objects of a run."""
    return f"{INSTANCE_LABEL}={run},{PART_OF_LABEL}=job"


def find(kubectl: Kubectl, run: str) -> Workload | None:
    """The Job, JobSet or TrainJob of a run; None if there is none."""
    for kind, resource in RESOURCES.items():
        content = None
        with contextlib.suppress(NoSuchKind):
            content = kubectl.get(f"{resource}/{object_name(run)}")
        if content is not None:
            return _workload(kubectl, run, kind, _convert(content, _Object))
    return None


def require(kubectl: Kubectl, run: str) -> Workload:
    """The Job, JobSet or TrainJob of a run.

    Raises:
        ConfigError: there is none, or it is not this package's.
    """
    workload = find(kubectl, run)
    if workload is None or not workload.is_own:
        where = f"the namespace {kubectl.namespace}" if kubectl.namespace else "the namespace of kubectl's context"
        known = ", ".join(each.run for each in find_all(kubectl))
        others = f"There are {known}." if known else "There is none at all."
        raise ConfigError(
            f"there is no run {run} in {where}. {others} One that "
            "has ended is removed after a day; its results stay in run_dir. --namespace and --context look elsewhere."
        )
    return workload


def find_all(kubectl: Kubectl) -> list[Workload]:
    """All runs of the namespace."""
    found: dict[str, Workload] = {}
    for kind, resource in RESOURCES.items():
        content = None
        with contextlib.suppress(NoSuchKind):
            content = kubectl.get(resource, f"--selector={PART_OF_LABEL}=job,{INSTANCE_LABEL}")
        for each in _convert(content or {}, _Objects).items:
            run = (each.metadata.labels or {})[INSTANCE_LABEL]
            if each.metadata.name == object_name(run):
                found.setdefault(run, _workload(kubectl, run, kind, each))
    return [found[run] for run in sorted(found)]


def pods(kubectl: Kubectl, workload: Workload) -> list[Pod]:
    """The pods of a run, replaced ones included while Kubernetes keeps them, in the order of their nodes."""
    content = kubectl.get("pods", f"--selector={workload.pod_selector}")
    found = _convert(content or {}, _Pods).items
    return sorted(found, key=lambda pod: (pod.index, pod.metadata.creation_timestamp or ""))


def has_active(pods: Sequence[Pod]) -> bool:
    """Whether some pods have not ended yet."""
    return any(pod.status.phase in ("Pending", "Running") for pod in pods)


def exit_code(workload: Workload, codes: list[int]) -> int:
    """The exit code of a run that has ended.

    Args:
        workload: as it ended.
        codes: exit codes of its pods, in the order in which they ended.
    """
    if workload.state == "is complete":
        return 0
    failures = [code for code in codes if code not in IGNORED_EXIT_CODES]
    reason = workload.ending.text if workload.ending else ""
    if EXIT_USER_ERROR in failures or "exit code 2 " in reason:
        return EXIT_USER_ERROR
    if failures:
        return failures[-1]
    return EXIT_PREEMPTED if EXIT_PREEMPTED in codes else EXIT_RETRY


def of_kueue(kubectl: Kubectl, uid: str) -> dict[str, bool]:
    """Kueue's Workloads of a Job, JobSet or TrainJob, as kubectl's arguments name them, and whether each is active."""
    content = None
    with contextlib.suppress(NoSuchKind):
        content = kubectl.get(_WORKLOADS_OF_KUEUE, f"--selector=kueue.x-k8s.io/job-uid={uid}")
    items = _convert(content or {}, _Objects).items
    return {f"{_WORKLOADS_OF_KUEUE}/{item.metadata.name}": item.spec.active for item in items}


def _workload(kubectl: Kubectl, run: str, kind: str, each: _Object) -> Workload:
    conditions = tuple(one for one in each.status.conditions or () if one.status == "True")
    is_suspended = bool(each.spec.suspend)
    is_stopped = is_suspended
    if is_suspended and QUEUE_LABEL in (each.metadata.labels or {}):
        is_stopped = not all(of_kueue(kubectl, each.metadata.uid).values())
    return Workload(run, kind, each.metadata, is_suspended, is_stopped, conditions)


def _convert(content: Any, kind: type[_Type]) -> _Type:
    try:
        return typed.from_builtins(content, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"kubectl printed something else than Kubernetes documents: {error}.") from error
