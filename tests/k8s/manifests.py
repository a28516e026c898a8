"""Render the kustomizations; ``python tests/k8s/manifests.py`` rewrites the golden files."""

from __future__ import annotations

import copy
import functools
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
NOT_TRAINING = {
    path.replace("/", "-"): REPOSITORY / "k8s" / path
    for path in ("accounts", "predict", "queues", "queues/flex-start", "storage", "tensorboard", "trainer")
}
"""What is set up once, beside the runs, by name."""
TRAINING = {
    folder.name: folder
    for folder in sorted([*(REPOSITORY / "k8s" / "overlays").iterdir(), *Path(__file__).parent.glob("with-*")])
}
"""The overlays, and components on overlays as a user would put them together."""
KUSTOMIZATIONS = {**NOT_TRAINING, **TRAINING}
"""Every kustomization that can be applied, by name."""

RUN = """\
namePrefix: {name}-
labels:
  - {{pairs: {{app.kubernetes.io/instance: {name}}}, includeSelectors: true, includeTemplates: true}}
resources: [{overlay}]
components: [{components}]
images:
  - {{name: job, newName: registry.example/{name}/job, newTag: "1"}}
configMapGenerator:
  - {{name: config, behavior: replace, files: [config.yaml]}}
"""
"""A run's own kustomization, outside the repository, as in k8s/README.md."""

Manifest = dict[str, Any]
COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@functools.cache
def render(name: str) -> str:
    """Return the YAML that ``kubectl apply -k`` would send."""
    return kustomize(KUSTOMIZATIONS[name])


def kustomize(folder: Path) -> str:
    """Render the kustomization in ``folder``."""
    result = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not result.stderr, result.stderr  # warnings of what is deprecated
    return result.stdout


def rendered_run(name: str, overlay: str, folder: Path, components: Sequence[str] = ()) -> list[Manifest]:
    """Return the manifests of a run of its own name, whose kustomization is written to ``folder``."""
    folder.mkdir(parents=True)
    used = [KUSTOMIZATIONS[overlay], *(REPOSITORY / "k8s" / "components" / component for component in components)]
    paths = [os.path.relpath(path, folder.resolve()) for path in used]
    text = RUN.format(name=name, overlay=paths[0], components=", ".join(paths[1:]))
    (folder / "kustomization.yaml").write_text(text)
    (folder / "config.yaml").write_text(f"run_dir: gs://bucket/{name}\n")
    return list(yaml.safe_load_all(kustomize(folder)))


def rendered(name: str) -> list[Manifest]:
    """Return the parsed manifests."""
    return list(yaml.safe_load_all(render(name)))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Return the manifests of one kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def job_of(manifests: list[Manifest]) -> Manifest:
    """The Job's spec, be it a JobSet's, or that of the JobSet that Kubeflow Trainer makes of a TrainJob."""
    if jobs := of_kind(manifests, "Job"):
        return dict(jobs[0]["spec"])
    if trainjobs := of_kind(manifests, "TrainJob"):
        return _trainer_job(trainjobs[0])
    jobset = of_kind(manifests, "JobSet")[0]
    return dict(jobset["spec"]["replicatedJobs"][0]["template"]["spec"])


def _trainer_job(trainjob: Manifest) -> Manifest:
    """What Trainer v2.3.0 makes of the runtime's job "node": torch.go, jobset.go and builder.go of its plugins.

    First it merges runtimePatches into the runtime, lists by their names (core/trainingruntime.go).
    """
    (runtime,) = of_kind(rendered("trainer"), "ClusterTrainingRuntime")
    assert runtime["metadata"]["name"] == trainjob["spec"]["runtimeRef"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    assert replicated["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    job: Manifest = copy.deepcopy(replicated["template"]["spec"])
    (container,) = job["template"]["spec"]["containers"]
    assert container["name"] == "node"
    for patch in trainjob["spec"].get("runtimePatches", []):
        (patched,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        assert patched["name"] == "node"
        pod = patched["template"]["spec"]["template"]
        job["template"]["metadata"]["labels"] |= pod["metadata"]["labels"]
        for volume in pod["spec"]["volumes"]:
            (index,) = (n for n, v in enumerate(job["template"]["spec"]["volumes"]) if v["name"] == volume["name"])
            job["template"]["spec"]["volumes"][index] = volume
    name, trainer = trainjob["metadata"]["name"], trainjob["spec"]["trainer"]
    job["parallelism"] = job["completions"] = trainer["numNodes"]
    container["image"] = trainer["image"]
    container["args"] = trainer.get("args", container.get("args", []))
    container["env"] += [
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": "auto"},  # on nodes with GPUs
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": COMPLETION_INDEX}}},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]
    return job


def arguments_of(container: Manifest) -> list[str]:
    """The arguments of ``python -m job``: the container's, after those in its command, if it has one."""
    command = container.get("command", ["job"])
    return [*command[command.index("job") + 1 :], *container.get("args", [])]


def pod_of(manifests: list[Manifest]) -> Manifest:
    """Return the pod spec of the Job or JobSet."""
    return dict(job_of(manifests)["template"]["spec"])


def environment_of(container: Manifest, fields: dict[str, str]) -> dict[str, str]:
    """Return the container's environment as the kubelet sets it; ``fields`` are the pod's downward-API fields."""
    values: dict[str, str] = {}
    for variable in container.get("env", []):
        if "value" in variable:
            values[variable["name"]] = expanded(variable["value"], values)
        elif "fieldRef" in variable["valueFrom"]:
            values[variable["name"]] = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
    return values


def expanded(text: str, environment: dict[str, str]) -> str:
    """Return ``text`` with each ``$(NAME)`` replaced, as the kubelet does in a container's variables and command."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], text)


if __name__ == "__main__":
    import submitted

    submitted.write()
    for name in KUSTOMIZATIONS:
        (GOLDEN / f"{name}.yaml").write_text(render(name))
