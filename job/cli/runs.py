"""``python -m job status``, ``logs``, ``stop`` and ``delete``: runs that ``python -m job submit`` has started."""

from __future__ import annotations

import sys

from job.cli.parser import call_with_options
from job.process.signals import Stopped
from job.submit import ending
from job.submit.follow import follow
from job.submit.kubectl import Kubectl
from job.submit.status import print_run, print_runs
from job.submit.values import require_name, require_object_name


def status(args: list[str]) -> None:
    """Run ``python -m job status ARGS``."""
    call_with_options("status", main_status, args, positional=("name",))


def logs(args: list[str]) -> None:
    """Run ``python -m job logs ARGS``."""
    call_with_options("logs", main_logs, args, positional=("name",))


def stop(args: list[str]) -> None:
    """Run ``python -m job stop ARGS``."""
    call_with_options("stop", main_stop, args, positional=("name",))


def delete(args: list[str]) -> None:
    """Run ``python -m job delete ARGS``."""
    call_with_options("delete", main_delete, args, positional=("name",))


def main_status(name: str | None = None, namespace: str | None = None, context: str | None = None) -> None:
    """Say how a submitted run is doing, and each of its pods.

    Args:
        name: of the run. Default: a line for each run of the namespace.
        namespace: of Kubernetes. Default: that of kubectl's context.
        context: of kubectl. Default: the current one.
    """
    kubectl = cluster(namespace, context)
    if name is None:
        print_runs(kubectl)
    else:
        print_run(kubectl, require_name(name))


def main_logs(name: str, namespace: str | None = None, context: str | None = None) -> None:
    """Follow the logs of all pods of a submitted run, from their first lines on, until it ends.

    The exit code is that of the run. Ctrl-C ends the command and not the run.

    Args:
        name: of the run.
        namespace: of Kubernetes. Default: that of kubectl's context.
        context: of kubectl. Default: the current one.
    """
    follow_to_the_end(cluster(namespace, context), require_name(name))


def main_stop(name: str, namespace: str | None = None, context: str | None = None) -> None:
    """Stop a submitted run after it has saved. The command that submitted it lets it go on.

    Args:
        name: of the run.
        namespace: of Kubernetes. Default: that of kubectl's context.
        context: of kubectl. Default: the current one.
    """
    ending.stop(cluster(namespace, context), require_name(name))


def main_delete(name: str, namespace: str | None = None, context: str | None = None) -> None:
    """Delete what a submitted run has in the cluster; its pods save first, and its run_dir stays.

    Args:
        name: of the run.
        namespace: of Kubernetes. Default: that of kubectl's context.
        context: of kubectl. Default: the current one.
    """
    ending.delete(cluster(namespace, context), require_name(name))


def cluster(namespace: str | None, context: str | None) -> Kubectl:
    """kubectl for a namespace and a context.

    Raises:
        ConfigError: the name of the namespace is not valid.
    """
    if namespace is not None:
        require_object_name("namespace", namespace)
    return Kubectl(namespace, context)


def follow_to_the_end(kubectl: Kubectl, name: str) -> None:
    """Follow the logs of a run; ends the process with its exit code."""
    try:
        code = follow(kubectl, name)
    except Stopped as stopped:
        message = f"the run goes on. python -m job logs {name}{kubectl.flags} follows it, python -m job stop {name}"
        raise Stopped(f"{message}{kubectl.flags} stops it.", stopped.exit_code) from None
    if code:
        sys.exit(code)
