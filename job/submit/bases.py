"""The kustomizations of ``k8s/`` that a run builds on; the package ships them."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from job.errors import ConfigError
from job.submit.run import Run

MANIFESTS = Path(__file__).with_name("k8s")
"""In a checkout a link to its folder ``k8s``; in a wheel, a copy."""
RUNTIME = "trainer/runtime.yaml"
"""The ClusterTrainingRuntime that an administrator has created for TrainJobs."""
_TPUS = {"tpu-v5-lite-podslice": "tpu-v5e", "tpu-v6e-slice": "tpu-v6e", "tpu7x": "tpu7x"}


def base_of(run: Run) -> str:
    """Folder below :data:`MANIFESTS` that the run's kustomization builds on.

    Raises:
        ConfigError: there are no manifests for such a run.
    """
    name = _overlay(run)
    if not (MANIFESTS / name / "kustomization.yaml").is_file():
        if not (MANIFESTS / "base" / "kustomization.yaml").is_file():
            raise ConfigError(f"the manifests are missing: {MANIFESTS}. Install the package again, as a wheel.")
        raise ConfigError(
            f"there are no manifests for --kind {run.kind} with --machine {run.machine.name} and --nodes {run.nodes}. "
            "Give another --kind."
        )
    return name


def components_of(run: Run) -> list[str]:
    """Folders of components that the run's kustomization adds."""
    return ["components/kueue"] if run.queue and run.kind != "trainjob" else []


def path_of(name: str) -> Path:
    """The folder of a kustomization, without links: kustomize compares such paths."""
    return (MANIFESTS / name).resolve()


def copy_bases(names: list[str], target: Path) -> None:
    """Copy kustomizations, and all that these build on, so that they need no installed package.

    Args:
        names: folders below :data:`MANIFESTS`.
        target: the folder that takes the place of :data:`MANIFESTS`.
    """
    root = MANIFESTS.resolve()
    remaining, copied = [path_of(name) for name in names], set()
    while remaining:
        folder = remaining.pop()
        if folder in copied:
            continue
        copied.add(folder)
        shutil.copytree(folder, target / folder.relative_to(root), dirs_exist_ok=True)
        content = yaml.safe_load((folder / "kustomization.yaml").read_text())
        used = [(folder / entry).resolve() for key in ("resources", "components") for entry in content.get(key, [])]
        remaining += [path for path in used if path.is_dir()]


def _overlay(run: Run) -> str:
    if run.kind == "trainjob":
        return "overlays/trainjob"
    if run.family == "tpu":
        if run.kind == "jobset":
            return "overlays/tpu-multislice"
        generation = _TPUS.get(run.machine.accelerator, run.machine.accelerator)
        return f"overlays/{generation}-multihost" if run.nodes > 1 else f"overlays/{generation}"
    if run.family == "gpu":
        if run.kind == "jobset":
            return "overlays/gpu-jobset"
        return "overlays/gpu-multinode" if run.nodes > 1 else "overlays/gpu"
    return "base"
