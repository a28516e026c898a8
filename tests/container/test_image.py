"""Contents of the image."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pods import REPOSITORY, Podman

LIMITS = [
    "--rm",
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--network=none",
    "--tmpfs=/tmp:rw,mode=1777",
]


def inside(podman: Podman, image: str, script: str) -> str:
    """Return the output of a shell script in the image."""
    return podman("run", *LIMITS, "--entrypoint", '["sh", "-c"]', image, script, timeout=600).stdout


def test_hadolint_reports_nothing() -> None:
    line = [Path(sys.executable).parent / "hadolint", REPOSITORY / "docker" / "Dockerfile"]
    result = subprocess.run(line, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_entrypoint_runs_job(podman: Podman, image: str) -> None:
    assert "python -m job COMMAND" in podman("run", *LIMITS, image).stdout
    result = podman("run", *LIMITS, image, "launch", "fit", "--run_dir=/tmp/run", "--data.root=/nowhere", check=False)
    assert result.returncode == 2
    assert "/nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_image_has_no_build_tools(podman: Podman, image: str) -> None:
    tools = "gcc cc make git /opt/venv/bin/pip"
    output = inside(podman, image, f"id -u; id -g; for tool in {tools}; do command -v $tool; done; ls -A /tmp; true")
    assert output.split() == ["10001", "10001"]
    assert inside(podman, image, "command -v python") == "/opt/venv/bin/python\n"
    assert inside(podman, image, "touch /x || echo read-only").strip() == "read-only"
    packages = inside(podman, image, "ls /opt/venv/lib/python3.11/site-packages /opt/app")
    assert "\ntorch\n" in packages
    assert "\njob\n" in packages
    assert "\npytest\n" not in packages


def test_image_labels_user_and_history(podman: Podman, image: str) -> None:
    (metadata,) = json.loads(podman("image", "inspect", image).stdout)
    labels, config = metadata["Labels"], metadata["Config"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.revision"] == "abc"
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"][0] == "dumb-init"
    assert "Healthcheck" not in config
    history = json.dumps([metadata["History"], config["Env"]])
    for secret in ("index-url=", "@", "TOKEN", "PASSWORD"):
        assert secret not in history
    assert inside(podman, image, "cat /etc/pip.conf 2>/dev/null || true") == ""


def test_installed_versions_are_the_pinned_ones(podman: Podman, image: str) -> None:
    sbom = json.loads(inside(podman, image, "cat /opt/venv/sbom.json"))
    assert sbom["bomFormat"] == "CycloneDX"
    installed = {item["name"].lower().replace("_", "-"): item["version"] for item in sbom["components"]}
    assert sum(bool(item.get("licenses")) for item in sbom["components"]) > 0.9 * len(installed)
    lines = (REPOSITORY / "requirements" / "cpu.txt").read_text().splitlines()
    pinned = dict(line.split()[0].split("==") for line in lines if "==" in line)
    assert installed.keys() >= {"torch", "torchvision", "pytorch-lightning", "gcsfs", "tensorboard", "dumb-init"}
    assert {n: v.partition("+")[0] for n, v in installed.items()} == {n: pinned.get(n) for n in installed}
    sizes = inside(podman, image, "du -sm /opt/venv /opt/app | sort -n").split()
    assert int(sizes[0]) <= 10, "the layer of the code alone is small"


def test_the_image_is_below_3_gb_where_torch_comes_without_cuda(podman: Podman, image: str) -> None:
    packages = "/opt/venv/lib/python3.11/site-packages"
    cuda = f"{packages}/nvidia* {packages}/triton {packages}/cuda* {packages}/torch/lib/*cuda*"
    everything, of_cuda = inside(podman, image, f"du -smx / | cut -f1; du -scm {cuda} | tail -1 | cut -f1").split()
    assert int(of_cuda) > 1000, "PyPI's torch, with CUDA"
    assert int(everything) - int(of_cuda) < 3000
