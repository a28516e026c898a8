"""What the user wants to run, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from job.cluster.machines import Machine
from job.errors import ConfigError
from job.submit.machine import Family, Requests, family, requests_of
from job.submit.values import Image

Kind = Literal["job", "jobset", "trainjob", "kueue"]


@dataclass(frozen=True)
class Run:
    """A named run in a cluster.

    Attributes:
        name: of the run; all its objects begin with it.
        image: container image.
        machine: of each node.
        run_dir: URI of all results.
        data: URI of the images; None: ``fit_options`` or ``fit_args`` say.
        nodes: number of machines in all.
        slices: number of TPU slices that the machines form.
        spot: on Spot machines.
        kind: of the object that runs the pods.
        disk_gb: size of each machine's boot disk.
        namespace: or None, for that of the context.
        queue: of Kueue; empty without.
        service_account: of Kubernetes, which exists already.
        fit_options: options of fit, as in one of its configuration files.
        fit_args: further arguments of fit.
        fit_files: text of configuration files that ``fit_args`` name, by the name they have in the pods.
    """

    name: str
    image: Image
    machine: Machine
    run_dir: str
    data: str | None = None
    nodes: int = 1
    slices: int = 1
    spot: bool = False
    kind: Kind = "job"
    disk_gb: int = 200
    namespace: str | None = None
    queue: str = ""
    service_account: str = "train"
    fit_options: dict[str, Any] = field(default_factory=dict)
    fit_args: tuple[str, ...] = ()
    fit_files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, number in (("nodes", self.nodes), ("slices", self.slices)):
            if not 1 <= number <= 1000:
                raise ConfigError(f"--{option} must be from 1 to 1000, not {number}.")
        if self.kind != "jobset" and self.slices > 1:
            raise ConfigError(f"--slices {self.slices}: several slices need --kind jobset.")
        if self.nodes % self.slices:
            raise ConfigError(f"--nodes {self.nodes} cannot be divided into --slices {self.slices} of the same size.")
        if self.kind == "kueue" and not self.queue:
            raise ConfigError(
                "--kind kueue needs the name of a queue: give --queue. kubectl get localqueues lists them."
            )
        if self.kind == "trainjob" and self.family != "gpu":
            raise ConfigError(
                f"--kind trainjob is for GPUs, and {self.machine.name} has none. Give --kind job or another --machine."
            )
        if self.kind == "jobset" and self.family == "cpu":
            raise ConfigError(f"--kind jobset is for GPUs and TPUs, and {self.machine.name} has none. Give --kind job.")

    @property
    def family(self) -> Family:
        """Which manifests the machine needs."""
        return family(self.machine)

    @property
    def requests(self) -> Requests:
        """What each pod requests."""
        return requests_of(self.machine, self.disk_gb)

    @property
    def object_name(self) -> str:
        """Name of the Job, JobSet or TrainJob."""
        return object_name(self.name)


def object_name(run: str) -> str:
    """Name of the Job, JobSet or TrainJob of a run, and of its Service and NetworkPolicy."""
    return f"{run}-train"
