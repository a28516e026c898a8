"""Real images, a real GCS server, real processes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.demo.gcs_server import create_bucket, gcs_server

REPOSITORY = Path(__file__).parents[1]
COLOURS = {"blue": (30, 60, 200), "green": (20, 160, 60), "red": (200, 40, 30)}

Run = Callable[..., subprocess.CompletedProcess[str]]


def picture(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 32), form: str = "JPEG") -> bytes:
    """A noisy picture of one colour: learnable, and no two alike."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    pixels = (np.asarray(colour) + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def picture_files(classes: list[str], count: int, seed: int = 0) -> dict[str, bytes]:
    """``CLASS/NNN.jpg`` for ``count`` pictures a class."""
    return {
        f"{name}/{n:03d}.jpg": picture(COLOURS[name], seed + 1000 * c + n)
        for c, name in enumerate(classes)
        for n in range(count)
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for key, content in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, content in files.items():
            archive.writestr(key, content)
    return buffer.getvalue()


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Two classes, 20 pictures each."""
    return write_files(tmp_path / "colours", picture_files(["blue", "red"], 20))


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A GCS server with an empty bucket; yields ``gs://tests``."""
    with gcs_server(tmp_path_factory.mktemp("gcs") / "buckets"):
        create_bucket("gs://tests")
        yield "gs://tests"


@pytest.fixture
def run() -> Run:
    """Run ``python -m job …``, by torchrun when ``processes`` is given."""

    def call(
        *args: object, processes: int = 0, env: dict[str, str] | None = None, timeout: float = 400
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*args, processes=processes),
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            cwd=REPOSITORY,
        )

    return call


def command(*args: object, processes: int = 0) -> list[str]:
    launcher = [sys.executable, "-m"]
    if processes:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launcher, "job", *map(str, args)]
