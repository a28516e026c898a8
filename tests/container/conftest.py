"""Fixtures: the CPU image, built from the Dockerfile, and the pods of the manifests as containers on one network."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pods import REPOSITORY, Cluster, Podman

IMAGE = "localhost/job:cpu"
BASE = "localhost/python:3.11-stand-in"
"""Debian's Python instead of the base image, which a machine without access to a registry cannot pull."""
TOOLS = ("buildah", "podman", "runc", "debootstrap", "kubectl")
MACHINE_S_OWN = ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
"""How pip finds its registry here: mounted while building, part of no image."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    reason = f"needs {', '.join(missing)}" if missing else "needs root" if os.geteuid() else ""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.container)
            item.add_marker(pytest.mark.timeout(3600))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    """Podman and buildah, configured to run also inside a container."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    file = tmp_path_factory.mktemp("podman") / "containers.conf"
    file.write_text(
        f'[containers]\ndefault_ulimits = ["nofile={limit}:{limit}", "nproc=32768:32768"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    )
    return Podman({**os.environ, "CONTAINERS_CONF": str(file)})


@pytest.fixture(scope="session")
def image(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image's cpu target, removed afterwards; ``JOB_TEST_IMAGE`` names a prebuilt one.

    PyPI has torch with CUDA alone: so it is larger here than with the index that the Dockerfile names.
    """
    if built := os.environ.get("JOB_TEST_IMAGE"):
        yield built
        return
    dockerfile = REPOSITORY / "docker" / "Dockerfile"
    if podman("image", "exists", BASE, check=False).returncode:
        stand_in(podman, BASE, tmp_path_factory.mktemp("base"))
    mounts = [f"--volume={path}:{path}:ro" for path in MACHINE_S_OWN if Path(path).exists()]
    runc = shutil.which("runc")
    options = [
        *["--isolation", "oci", "--network", "host", "--layers=false", "--target", "cpu"],
        f"--runtime={runc}",
        *mounts,
    ]
    words = [
        f"--build-arg=BASE={BASE}",
        "--build-arg=TORCH_INDEX=",
        "--label=org.opencontainers.image.revision=abc",
        f"--file={dockerfile}",
    ]
    podman.call("buildah", "bud", *options, *words, f"--tag={IMAGE}", REPOSITORY, timeout=2700)
    yield IMAGE
    podman("image", "rm", "--force", IMAGE)


def stand_in(podman: Podman, name: str, folder: Path) -> None:
    """Make an image of Debian with Python."""
    root = folder / "root"
    packages = "ca-certificates,python3,python3-pip,python3-venv"
    podman.call("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root, timeout=1200)
    (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()  # the official image lets pip work, too
    podman.call("sh", "-c", f"tar -C {root} -c . | podman import - {name}", timeout=600)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def cluster(podman: Podman, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A network without containers; at the end all containers are removed."""
    cluster = Cluster(podman, image, tmp_path_factory.mktemp("volumes"))
    podman("network", "create", cluster.network)
    yield cluster
    for name in dict.fromkeys(cluster.started):
        cluster.remove(name)
    podman("network", "rm", "--force", cluster.network, check=False)
