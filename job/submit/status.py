"""Print how runs are doing."""

from __future__ import annotations

from datetime import UTC, datetime

from job.process.terminal import print_table, say
from job.submit import workload
from job.submit.kubectl import Kubectl
from job.submit.workload import Pod, Workload


def print_runs(kubectl: Kubectl) -> None:
    """Print a line per run of the namespace."""
    runs = workload.find_all(kubectl)
    if not runs:
        say("There are no runs in this namespace.")
        return
    rows = [[each.run, each.kind, each.state, _age(each.metadata.creation_timestamp)] for each in runs]
    print_table(["run", "kind", "state", "age"], rows)


def print_run(kubectl: Kubectl, run: str) -> None:
    """Print the state of a run, and of each of its pods.

    Raises:
        ConfigError: there is no such run.
    """
    found = workload.require(kubectl, run)
    say(f"{run} {_state(found)} ({found.kind} {found.metadata.name}, {_age(found.metadata.creation_timestamp)} old)")
    pods = workload.pods(kubectl, found)
    if not pods:
        say("It has no pods." if found.has_ended or found.is_suspended else "It has no pods yet.")
        return
    rows = [_row(pod) for pod in pods]
    print_table(
        ["node", "pod", "phase", "on", "exit code", "restarts", "age", ""], rows, right=["exit code", "restarts"]
    )


def _state(found: Workload) -> str:
    if found.ending is not None and found.ending.text:
        return f"{found.state}: {found.ending.text}"
    return f"{found.state} {found.queue}" if found.state == "waits in its queue" else found.state


def _row(pod: Pod) -> list[str]:
    container = pod.container
    phase = "Terminating" if pod.metadata.deletion_timestamp else pod.status.phase
    return [
        f"{pod.index[0]}.{pod.index[1]}" if pod.index[0] else str(pod.index[1]),
        pod.metadata.name,
        phase,
        pod.spec.node_name or "",
        "" if pod.exit_code is None else str(pod.exit_code),
        str(container.restart_count if container else 0),
        _age(pod.metadata.creation_timestamp),
        pod.problem,
    ]


def _age(timestamp: str | None) -> str:
    """Time since a timestamp of Kubernetes, as kubectl shows it."""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(timestamp or "")).total_seconds()
    except (ValueError, TypeError):
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"
