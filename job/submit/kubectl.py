"""Run kubectl, and say in plain words why it failed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.errors import EXIT_RETRY, ConfigError, JobError
from job.process.terminal import clean

SECONDS = 60
"""Limit of one request. A cluster that does not answer at all would be waited for without one."""
_SHOWN = 2000
"""Characters of kubectl's own message that are shown."""
_LOG_LINE = re.compile(r"[EWI]\d{4} \d\d:\d\d:\d\d")
_NO_KIND = re.compile(r"no matches for kind \"(\w+)\"|the server doesn't have a resource type \"([\w.]+)\"")
_UNREACHABLE = re.compile(
    r"(?i)unable to connect to the server|connection refused|no such host|i/o timeout|tls handshake timeout|"
    r"context deadline exceeded|connection reset|timed out|network is unreachable|server is currently unable|EOF$|"
    r"etcdserver|too many requests|http2: client connection lost"
)
_NO_CLUSTER = re.compile(
    r"(?i)current-context is not set|context .* does not exist|no context exists|invalid configuration|"
    r"missing or incomplete configuration|localhost:8080"
)
_NO_LOGIN = re.compile(
    r"(?i)unauthorized|you must be logged in|getting credentials|exec plugin|executable .* not found"
)
_CONTROLLERS = {
    "JobSet": "JobSet (https://jobset.sigs.k8s.io)",
    "TrainJob": "Kubeflow Trainer v2 (https://trainer.kubeflow.org)",
}


class ClusterUnreachable(JobError):
    """A cluster that does not answer."""

    exit_code = EXIT_RETRY


class NoSuchKind(ConfigError):
    """A kind of object that the cluster does not know, since its controller is not installed."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl with the options of all its calls.

    Args:
        namespace: or None, for that of the context.
        context: of the kubeconfig; None: the current one.
    """

    namespace: str | None = None
    context: str | None = None

    def command(self, *args: str) -> list[str]:
        """The words of a call.

        Raises:
            ConfigError: kubectl is not installed.
        """
        return [
            executable(),
            *([f"--context={self.context}"] if self.context else []),
            *([f"--namespace={self.namespace}"] if self.namespace else []),
            *args,
        ]

    def run(self, *args: str, stdin: str | None = None, seconds: float = SECONDS) -> str:
        """What a call prints.

        Raises:
            ClusterUnreachable: the cluster did not answer in time.
            ConfigError: kubectl failed otherwise.
        """
        return _run(self.command(*args), stdin=stdin, seconds=seconds)

    def get(self, *args: str) -> Any:
        """The objects of ``kubectl get ARGS`` as parsed JSON; None if nothing was found."""
        text = self.run("get", *args, "--ignore-not-found", "--output=json", f"--request-timeout={SECONDS // 2}s")
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            raise ConfigError(f"kubectl get {' '.join(args)} printed no JSON: {text[:200]}") from error

    @property
    def flags(self) -> str:
        """Options of ``python -m job status`` that name the same cluster and namespace."""
        namespace = f" --namespace {self.namespace}" if self.namespace else ""
        return namespace + (f" --context {self.context}" if self.context else "")


def executable() -> str:
    """The path of kubectl.

    Raises:
        ConfigError: it is not installed.
    """
    path = shutil.which("kubectl")
    if path is None:
        raise ConfigError(
            "kubectl is not installed, or not on PATH. It renders the manifests and talks to the cluster: "
            "https://kubernetes.io/docs/tasks/tools/"
        )
    return path


def kustomize(folder: str) -> str:
    """The manifests of a kustomization, as YAML. Needs no cluster.

    Raises:
        ConfigError: kustomize refuses it.
    """
    return _run([executable(), "kustomize", folder], stdin=None, seconds=SECONDS)


def _run(command: Sequence[str], *, stdin: str | None, seconds: float) -> str:
    try:
        # In a session of its own: Ctrl-C ends the waiting, and never half of an apply.
        result = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=seconds,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterUnreachable(
            f"the cluster did not answer within {seconds:.0f} s ({_words(command)}). Is it up, and reachable from "
            "here? kubectl cluster-info shows it."
        ) from error
    except OSError as error:
        raise ConfigError(f"kubectl cannot be started: {error}. See https://kubernetes.io/docs/tasks/tools/") from error
    if result.returncode:
        raise _error(command, result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}")
    return result.stdout


def _error(command: Sequence[str], text: str) -> JobError:
    # What kubectl's library logs of its attempts, unless it is all.
    text = "\n".join(line for line in text.splitlines() if not _LOG_LINE.match(line)) or text
    message = clean(text[:_SHOWN])
    if match := _NO_KIND.search(text):
        kind = match[1] or match[2]
        controller = next((words for name, words in _CONTROLLERS.items() if name.lower() in kind.lower()), None)
        need = f" Install {controller} in it, or choose another --kind." if controller else ""
        return NoSuchKind(f"the cluster does not know {kind}.{need}\n{message}")
    if _NO_CLUSTER.search(text):
        return ConfigError(
            "kubectl knows no cluster, or not this one. Create its entry (gcloud container clusters get-credentials "
            f"CLUSTER), or name one by --context: kubectl config get-contexts lists them.\n{message}"
        )
    if "exceeded quota" in text:
        return ConfigError(f"a quota of this namespace does not allow it.\n{message}")
    if "forbidden" in text.lower():
        return ConfigError(
            "you do not have the right to do this in this namespace. Ask an administrator for the role edit, or give "
            f"another --namespace.\n{message}"
        )
    if re.search(r"namespaces \"[^\"]+\" not found", text):
        return ConfigError(f"there is no such namespace. Create it, or give another --namespace.\n{message}")
    if _NO_LOGIN.search(text):
        return ConfigError(f"the cluster does not know who you are. Log in again (gcloud auth login).\n{message}")
    if "timed out waiting for" in text:
        return ClusterUnreachable(f"not all objects are gone yet. Try again when their pods have ended.\n{message}")
    if _UNREACHABLE.search(text):
        return ClusterUnreachable(f"the cluster cannot be reached. Try again.\n{message}")
    return ConfigError(f"{_words(command)} failed:\n{message}")


def _words(command: Sequence[str]) -> str:
    """A call as the message names it."""
    verbs = [word for word in command[1:] if not word.startswith("--")]
    return clean(" ".join(["kubectl", *verbs]))[:200]
