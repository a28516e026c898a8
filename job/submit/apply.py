"""Create a run's objects in the cluster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from job.errors import ConfigError
from job.process.terminal import say
from job.submit import workload
from job.submit.ending import delete, resume_queued
from job.submit.kubectl import Kubectl
from job.submit.overlay import INSTANCE_LABEL, Manifest, Overlay
from job.submit.run import Run
from job.submit.workload import CONTENT_ANNOTATION, Workload

APPLY_SECONDS = 120


def apply(kubectl: Kubectl, run: Run, overlay: Overlay, *, replace: bool) -> None:
    """Create the objects of a run; the same command twice creates them once.

    Args:
        replace: first delete a run of the same name.

    Raises:
        ConfigError: the name is taken, or the cluster refuses the objects.
        ClusterUnreachable: it does not answer.
    """
    content = hashlib.sha256(overlay.text.encode()).hexdigest()[:16]
    existing = workload.find(kubectl, run.name)
    _require_free(kubectl, run, overlay.manifests)
    if existing is not None:
        _require_own(existing)
        if not replace:
            _continue(kubectl, existing, content)
            return
    _require_service_account(kubectl, run)
    items = [_with_digest(manifest, content) for manifest in overlay.manifests]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    if existing is None:
        # All of it or nothing: rights, quotas and unknown kinds are found out first.
        kubectl.run("apply", "--dry-run=server", "--filename=-", stdin=text, seconds=APPLY_SECONDS)
    else:
        delete(kubectl, run.name)
    say(kubectl.run("apply", "--filename=-", stdin=text, seconds=APPLY_SECONDS).strip())


def _continue(kubectl: Kubectl, existing: Workload, content: str) -> None:
    """Leave a run alone that is what is wanted, or let a stopped one go on."""
    if existing.content != content:
        raise ConfigError(
            f"the run {existing.run} exists already, with other options, and {existing.state}. Give another --name, or "
            "--replace: it saves and ends, and starts again with these options."
        )
    if existing.ending is not None:
        raise ConfigError(
            f"the run {existing.run} exists already, and {existing.state} ({existing.ending.text}). --replace starts "
            "it again; with the same run_dir it resumes."
        )
    if existing.queue and resume_queued(kubectl, existing):
        say(f"{existing.run} was stopped, and waits in its queue again.")
    elif existing.state == "is stopped":
        kubectl.run("patch", existing.resource, "--type=merge", '--patch={"spec":{"suspend":false}}')
        say(f"{existing.run} was stopped, and goes on.")
    else:
        say(f"{existing.run} exists already, with the same options: nothing was applied.")


def _require_own(existing: Workload) -> None:
    if not existing.is_own:
        raise ConfigError(
            f"there is a {existing.kind} {existing.metadata.name} already, which is no run of job. Give another --name."
        )


def _require_free(kubectl: Kubectl, run: Run, manifests: Sequence[Manifest]) -> None:
    """Check that the other objects with these names, if there are any, are those of this run."""
    names = [
        f"{kind}/{manifest['metadata']['name']}"
        for manifest in manifests
        for kind in ("Service", "NetworkPolicy", "ConfigMap")
        if manifest["kind"] == kind
    ]
    for item in (kubectl.get(*names) or {}).get("items", []):
        metadata = item.get("metadata", {})
        if (metadata.get("labels") or {}).get(INSTANCE_LABEL) != run.name:
            raise ConfigError(
                f"there is a {item.get('kind')} {metadata.get('name')} already, which is not of a run {run.name}. Give "
                "another --name."
            )


def _require_service_account(kubectl: Kubectl, run: Run) -> None:
    """Without it the Job would create no pod, and say so only in an event."""
    if kubectl.get(f"serviceaccounts/{run.service_account}") is None:
        raise ConfigError(
            f"there is no service account {run.service_account} in the namespace. The pods of all runs use one, which "
            "may read the data and write run_dir. Create it once: "
            f"kubectl create serviceaccount {run.service_account}; or name another one by --service_account."
        )


def _with_digest(manifest: Manifest, content: str) -> Manifest:
    if manifest["kind"] not in workload.RESOURCES:
        return manifest
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), CONTENT_ANNOTATION: content}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}
