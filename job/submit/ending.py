"""Stop a run, or delete its objects; what it has saved stays in its run_dir."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from job.errors import ConfigError
from job.process.terminal import say
from job.submit import workload
from job.submit.kubectl import ClusterUnreachable, Kubectl
from job.submit.workload import PARTS, Workload, instance_selector

STOP_SECONDS = 120.0
"""Time in which all pods should have saved and ended; their grace is 15 or 30 s."""
POLL_SECONDS = 2.0
DELETE_SECONDS = 180


def stop(kubectl: Kubectl, run: str, *, wait: Callable[[float], None] = time.sleep) -> None:
    """Let a run save and end its pods. Its objects stay, and ``submit`` with the same options lets it go on.

    A Job, JobSet or TrainJob is suspended: Kubernetes sends SIGTERM to its pods, and counts no failure. One that Kueue
    has admitted would be admitted again: its Workload is deactivated, by which Kueue suspends it.

    Raises:
        ConfigError: there is no such run, or it has ended.
    """
    found = workload.require(kubectl, run)
    if found.has_ended:
        raise ConfigError(f"the run {run} {found.state}: there is nothing to stop.")
    if not (found.queue and _deactivate(kubectl, found)):
        kubectl.run("patch", found.resource, "--type=merge", '--patch={"spec":{"suspend":true}}')
    if _wait_for_pods(kubectl, found, wait):
        say(f"{run} is stopped: its pods have saved and ended. The command that started it lets it go on.")
    else:
        say(
            f"{run} is being stopped: some pods have not ended after {STOP_SECONDS:.0f} s. "
            f"python -m job status {run}{kubectl.flags} names them."
        )


def delete(kubectl: Kubectl, run: str) -> None:
    """Delete all objects of a run and no others; its pods save and end first.

    Raises:
        ConfigError: there are none.
    """
    selector = f"--selector={instance_selector(run)}"
    found = workload.find(kubectl, run)
    removed = []
    if found is not None and found.is_own:
        # In the foreground: it is gone when its pods are, so that a new run can have the name.
        options = ("--ignore-not-found", "--cascade=foreground", f"--timeout={DELETE_SECONDS}s")
        removed.append(kubectl.run("delete", found.resource, *options, seconds=DELETE_SECONDS + 30))
    removed.append(kubectl.run("delete", ",".join(PARTS), selector, "--ignore-not-found", seconds=DELETE_SECONDS))
    text = "\n".join(line for part in removed for line in part.splitlines() if line and line != "No resources found")
    if not text:
        workload.require(kubectl, run)  # raises, and names the runs that there are
    say(text)


def resume_queued(kubectl: Kubectl, found: Workload) -> bool:
    """Activate the Workload of a stopped run in a queue; returns whether it was inactive."""
    return _set_active(kubectl, found, active=True)


def _deactivate(kubectl: Kubectl, found: Workload) -> bool:
    return _set_active(kubectl, found, active=False)


def _set_active(kubectl: Kubectl, found: Workload, *, active: bool) -> bool:
    """Set ``spec.active`` of the run's Workload in Kueue; returns whether that changed anything."""
    changed = [name for name, was in workload.of_kueue(kubectl, found.metadata.uid).items() if was != active]
    for name in changed:
        kubectl.run("patch", name, "--type=merge", f'--patch={{"spec":{{"active":{str(active).lower()}}}}}')
    return bool(changed)


def _wait_for_pods(kubectl: Kubectl, found: Workload, wait: Callable[[float], None]) -> bool:
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ClusterUnreachable):
            if not workload.has_active(workload.pods(kubectl, found)):
                return True
        wait(POLL_SECONDS)
    return False
