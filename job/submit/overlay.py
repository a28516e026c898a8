"""A run as a kustomization on the manifests in ``k8s/``: what ``kubectl apply -k`` takes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from job.errors import ConfigError
from job.process import temporary
from job.submit import bases, kubectl
from job.submit.machine import TMP_GIB, tpu_topology
from job.submit.run import Run

CONFIG_FOLDER = "/etc/job"
"""Where the pods find the files of the ConfigMap."""
CONFIG_FILE = "config.yaml"
CACHE_FOLDER = "/cache"
CHECKPOINT_MINUTES = 10
INSTANCE_LABEL = "app.kubernetes.io/instance"
PART_OF_LABEL = "app.kubernetes.io/part-of"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
WORKLOADS = ("Job", "JobSet", "TrainJob")
SPOT_GRACE, SPOT_TERMINATION = 12, 15
"""Seconds to save, and until a pod is killed: GKE leaves pods 15 of the 30 seconds before a Spot machine's end."""
MAX_CONFIG_BYTES = 900_000
"""Kubernetes takes ConfigMaps of 1 MiB."""

Manifest = dict[str, Any]
Operation = dict[str, Any]

_SELECTORS: dict[str, tuple[str, str]] = {
    "cpu": ("node.kubernetes.io/instance-type", ""),
    "gpu": ("cloud.google.com/gke-accelerator", "nvidia.com/gpu"),
    "tpu": ("cloud.google.com/gke-tpu-accelerator", "google.com/tpu"),
}
"""Label of the nodes, and resource that stands for their chips."""
_SPOT_LABEL = "cloud.google.com/gke-spot"
_TRAINJOB_POD = "/spec/runtimePatches/0/trainingRuntimeSpec/template/spec/replicatedJobs/0/template/spec/template/spec"
_POD_PATHS = {
    "Job": "/spec/template/spec",
    "JobSet": "/spec/replicatedJobs/0/template/spec/template/spec",
    "TrainJob": _TRAINJOB_POD,
}


class _Dumper(yaml.SafeDumper):
    """Quotes strings that another program's YAML might read as something else: y, 0o17. Writes no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        """Whether a value is written again where it occurs again."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    if "\n" in text:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
    plain = len(text) > 1 and re.fullmatch(r"[A-Za-z][\w./:@-]*", text) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Overlay:
    """The files of a kustomization, and the manifests that it renders to.

    Attributes:
        files: text by name.
        text: the manifests, as YAML.
        manifests: the same, parsed.
    """

    files: Mapping[str, str]
    text: str
    manifests: Sequence[Manifest]

    @property
    def workload(self) -> Manifest:
        """The Job, JobSet or TrainJob."""
        return _workload(self.manifests)


def dump(content: object) -> str:
    """YAML for people to read, in which no string can be anything else."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def build(run: Run) -> Overlay:
    """Render the kustomization of a run.

    Raises:
        ConfigError: there are no manifests for such a run, or kustomize refuses them.
    """
    base = bases.base_of(run)
    folder = temporary.folder("submit").resolve()
    try:
        operations = _operations(run, _parse(kubectl.kustomize(str(bases.path_of(base)))))
        files = _files(run, operations, os.path.relpath(bases.MANIFESTS.resolve(), folder))
        for name, text in files.items():
            (folder / name).write_text(text)
        rendered = kubectl.kustomize(str(folder))
    finally:
        temporary.remove(folder)
    return Overlay(files, rendered, _parse(rendered))


def write(run: Run, target: Path, *, replace: bool) -> None:
    """Write the kustomization of a run, with all that it builds on, for ``kubectl apply -k TARGET``.

    Raises:
        ConfigError: the folder has files, or cannot be written.
    """
    base = bases.base_of(run)
    try:
        if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"--output {target} exists already. Give another folder, or --replace.")
        names = [base, *bases.components_of(run)]
        bases.copy_bases(names, target / "k8s")
        operations = _operations(run, _parse(kubectl.kustomize(str(bases.path_of(base)))))
        for name, text in _files(run, operations, "k8s").items():
            (target / name).write_text(text)
        kubectl.kustomize(str(target))
    except OSError as error:
        raise ConfigError(f"--output {target} cannot be written: {error.strerror or error}.") from error


def arguments_of(overlay: Overlay) -> list[str]:
    """The arguments of ``python -m job`` in the pods."""
    workload = overlay.workload
    if workload["kind"] != "TrainJob":
        return [_literal(arg) for arg in _container(workload)["args"]]
    return [*_runtime_arguments(), *map(_literal, workload["spec"]["trainer"].get("args", []))]


def _files(run: Run, operations: list[Operation], bases_path: str) -> dict[str, str]:
    config = _config(run)
    files = {CONFIG_FILE: dump(config), **run.fit_files}
    if sum(len(text.encode()) for text in files.values()) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"the configuration of fit is larger than the {MAX_CONFIG_BYTES:,} bytes that a ConfigMap takes. Shorten "
            f"{', '.join(files)}."
        )
    image = {"name": "job", "newName": run.image.name}
    if run.image.tag:
        image["newTag"] = run.image.tag
    if run.image.digest:
        image["digest"] = run.image.digest
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namePrefix": f"{run.name}-",
        **({"namespace": run.namespace} if run.namespace else {}),
        "labels": [{"pairs": {INSTANCE_LABEL: run.name}, "includeSelectors": True, "includeTemplates": True}],
        "resources": [f"{bases_path}/{bases.base_of(run)}"],
        **({"components": [f"{bases_path}/{name}" for name in names]} if (names := bases.components_of(run)) else {}),
        "images": [image],
        "configMapGenerator": [{"name": "config", "behavior": "replace", "files": list(files)}],
        "patches": [{"target": {"kind": "|".join(WORKLOADS)}, "patch": dump(operations)}],
    }
    return {"kustomization.yaml": dump(kustomization), **files}


def _config(run: Run) -> dict[str, Any]:
    """The configuration of fit that the pods read first: what submit's own options say, and ``fit_options``."""
    config: dict[str, Any] = {
        "run_dir": run.run_dir,
        "data": {
            **({"root": run.data} if run.data else {}),
            "cache_dir": CACHE_FOLDER,
            "cache_gb": run.requests.cache_gb,
        },
        "checkpoint": {"every_minutes": CHECKPOINT_MINUTES},
    }
    return _merged(config, run.fit_options)


def _merged(one: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(one)
    for key, value in other.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return result


def _operations(run: Run, manifests: Sequence[Manifest]) -> list[Operation]:
    """What distinguishes the run's workload from that of the manifests it builds on, as a JSON patch."""
    workload = _workload(manifests)
    pod_path = _POD_PATHS[workload["kind"]]
    operations = [_add(f"{pod_path}/{key}", value) for key, value in _placement(run).items()]
    if run.service_account != "train":
        operations.append(_add(f"{pod_path}/serviceAccountName", run.service_account))
    if run.queue:
        operations.append(_add(f"/metadata/labels/{QUEUE_LABEL.replace('/', '~1')}", run.queue))
        operations.append(_add("/spec/suspend", True))
    args = [argument.replace("$", "$$") for argument in run.fit_args]  # the kubelet expands $(NAME)
    if workload["kind"] == "TrainJob":
        trainer = workload["spec"]["trainer"]
        operations.append(_add("/spec/trainer/numNodes", run.nodes))
        operations.append(_add("/spec/trainer/resourcesPerNode", _resources(run)))
        if run.spot:
            operations.append(_add(f"{pod_path}/terminationGracePeriodSeconds", SPOT_TERMINATION))
            args.insert(0, f"--grace={SPOT_GRACE}")
        if args:
            operations.append(_add("/spec/trainer/args", [*trainer.get("args", []), *args]))
        # Trainer merges them into the runtime's by their names.
        return [*operations, *(_add(f"{pod_path}/volumes/-", volume) for volume in _volumes(run))]
    pod, container_path = _pod(workload), f"{pod_path}/containers/0"
    operations.append(_add(f"{container_path}/resources", _resources(run)))
    names = [volume["name"] for volume in pod["volumes"]]
    for volume in _volumes(run):
        operations.append(_replace(f"{pod_path}/volumes/{names.index(volume['name'])}", volume))
    if run.spot:
        grace = _grace_index(_container(workload)["args"])
        operations.append(_replace(f"{container_path}/args/{grace}", f"--grace={SPOT_GRACE}"))
        operations.append(_replace(f"{pod_path}/terminationGracePeriodSeconds", SPOT_TERMINATION))
    operations += [_add(f"{container_path}/args/-", argument) for argument in args]
    if workload["kind"] == "JobSet":
        job_path = "/spec/replicatedJobs/0"
        hosts = run.nodes // run.slices
        if run.family == "tpu":
            operations.append(_replace(f"{job_path}/replicas", run.slices))
    else:
        job_path, hosts = "", run.nodes
    job_spec = f"{job_path}/template/spec" if job_path else "/spec"
    operations += [_replace(f"{job_spec}/{key}", hosts) for key in ("completions", "parallelism")]
    for place, variable in enumerate(_container(workload).get("env", [])):
        if variable["name"] == "LAUNCH_NODES":
            operations.append(_replace(f"{container_path}/env/{place}/value", str(run.nodes)))
    return operations


def _placement(run: Run) -> dict[str, Any]:
    """Where the pods run: node selector and tolerations."""
    label, resource = _SELECTORS[run.family]
    selector = {label: run.machine.accelerator or run.machine.name}
    if run.family == "tpu":
        selector["cloud.google.com/gke-tpu-topology"] = tpu_topology(run.machine, run.nodes // run.slices)
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}] if resource else []
    if run.spot:
        selector[_SPOT_LABEL] = "true"
        tolerations.append({"key": _SPOT_LABEL, "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    return {"nodeSelector": selector, **({"tolerations": tolerations} if tolerations else {})}


def _resources(run: Run) -> dict[str, dict[str, Any]]:
    requests, resource = run.requests, _SELECTORS[run.family][1]
    limits: dict[str, Any] = {
        "memory": f"{requests.memory_gib}Gi",
        "ephemeral-storage": f"{requests.disk_gib}Gi",
        **({resource: run.machine.accelerators} if resource else {}),
    }
    return {"requests": {"cpu": str(requests.cpus), **limits}, "limits": limits}


def _volumes(run: Run) -> list[dict[str, Any]]:
    """The volumes whose sizes follow from the machine."""
    return [
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{TMP_GIB}Gi"}},
        {"name": "cache", "emptyDir": {"sizeLimit": f"{run.requests.cache_gib}Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{run.requests.shm_gib}Gi"}},
    ]


def _parse(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def _workload(manifests: Sequence[Manifest]) -> Manifest:
    return next(manifest for manifest in manifests if manifest["kind"] in WORKLOADS)


def _pod(workload: Manifest) -> Manifest:
    """The spec of its pods: all of it, or of a TrainJob what differs from the runtime's."""
    value: Any = workload
    for key in _POD_PATHS[workload["kind"]].strip("/").split("/"):
        value = value[int(key)] if key.isdecimal() else value[key]
    return dict(value)


def _container(workload: Manifest) -> Manifest:
    return dict(_pod(workload)["containers"][0])


def _runtime_arguments() -> list[str]:
    """The arguments of ``python -m job`` in the runtime of TrainJobs, before those of the TrainJob."""
    runtime = yaml.safe_load((bases.MANIFESTS / bases.RUNTIME).read_text())
    job = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    command: list[str] = job["template"]["spec"]["containers"][0]["command"]
    return command[command.index("job") + 1 :]


def _grace_index(args: Sequence[str]) -> int:
    return next(place for place, argument in enumerate(args) if argument.startswith("--grace="))


def _literal(argument: str) -> str:
    """An argument as the container gets it."""
    return argument.replace("$$", "$")


def _add(path: str, value: object) -> Operation:
    return {"op": "add", "path": path, "value": value}


def _replace(path: str, value: object) -> Operation:
    return {"op": "replace", "path": path, "value": value}
