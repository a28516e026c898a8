"""Containers made from pod templates, by podman."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from k8s.manifests import Manifest, environment_of, expanded

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Podman:
    """Runs podman and buildah.

    Attributes:
        environment: of those.
    """

    environment: dict[str, str]

    def __call__(self, *words: object, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return self.call("podman", *words, check=check, timeout=timeout)

    def call(self, *words: object, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command; with ``check``, fail the test with its output if it fails."""
        line = [str(word) for word in words]
        result = subprocess.run(line, capture_output=True, text=True, env=self.environment, timeout=timeout)
        assert not check or result.returncode == 0, f"{line}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result


@dataclass
class Cluster:
    """Containers on one network, made from pod templates.

    Attributes:
        podman: runs them.
        image: of all of them.
        folder: of their volumes.
    """

    podman: Podman
    image: str
    folder: Path
    network: str = f"job-test-{os.getpid()}"
    started: list[str] = field(default_factory=list)

    def start(self, pod: Manifest, name: str, *, config: Manifest | None = None, index: int | None = None) -> str:
        """Start the pod's container as kubelet would, under the names that its service would give it."""
        (container,) = pod["containers"]
        context, user = container["securityContext"], pod["securityContext"]["runAsUser"]
        hostname = name if index is None else f"{name}-{index}"
        fields = {
            "metadata.labels['batch.kubernetes.io/job-name']": name,
            "metadata.labels['batch.kubernetes.io/controller-uid']": "test",
        }
        environment = environment_of(container, fields)
        if index is not None:
            environment["JOB_COMPLETION_INDEX"] = str(index)
        flags = [f"--name={hostname}", f"--hostname={hostname}", f"--network={self.network}", f"--user={user}:{user}"]
        flags += [f"--network-alias={hostname}{'.' + pod['subdomain'] if 'subdomain' in pod else ''}"]
        flags += [f"--env={key}={value}" for key, value in environment.items()]
        flags += [f"--cap-drop={name}" for name in context["capabilities"]["drop"]]
        flags += ["--read-only"] if context["readOnlyRootFilesystem"] else []
        flags += ["--security-opt=no-new-privileges"] if context["allowPrivilegeEscalation"] is False else []
        flags += [f"--memory={container['resources']['limits']['memory'].removesuffix('i').lower()}"]
        paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        for volume in pod["volumes"]:
            path = paths[volume["name"]]
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                assert path == "/dev/shm"
                flags += [f"--shm-size={volume['emptyDir']['sizeLimit'].removesuffix('i').lower()}"]
                continue
            folder = self.folder / f"{hostname}-{len(self.started)}-{volume['name']}"
            folder.mkdir()
            os.chown(folder, user, user)
            for key, text in (config or {}).get("data", {}).items() if "configMap" in volume else ():
                (folder / key).write_text(text)
            flags += [f"--volume={folder}:{path}{':ro' if 'configMap' in volume else ''}"]
        if "command" in container:
            command = [expanded(word, environment) for word in container["command"]]
            flags += [f"--entrypoint={json.dumps(command)}"]
        self.started.append(hostname)
        self.podman("run", "--detach", "--replace", *flags, self.image, *container.get("args", []))
        return hostname

    def remove(self, name: str) -> None:
        """Remove the container, as when its pod is replaced."""
        self.podman("rm", "--force", "--time", 0, name, check=False)

    def log(self, name: str) -> str:
        """Return the container's output."""
        result = self.podman("logs", name, check=False)
        return result.stdout + result.stderr

    def wait_for(self, name: str, text: str, seconds: float = 900) -> None:
        """Wait until the container has printed ``text``."""
        deadline = time.monotonic() + seconds
        while text not in (log := self.log(name)):
            assert time.monotonic() < deadline, log
            state = self.podman("inspect", "--format", "{{.State.Status}}", name).stdout.strip()
            assert state == "running" or text in self.log(name), f"{name} is {state}:\n{self.log(name)}"
            time.sleep(0.5)

    def exit_code(self, name: str, seconds: float = 900) -> int:
        """Wait for the container to exit; return its exit code."""
        return int(self.podman("wait", name, timeout=seconds).stdout)
