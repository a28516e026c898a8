"""Fixtures: a bucket behind a faulty proxy, and an uninterrupted run as reference."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
from harness import SETTINGS, Job
from proxy import FaultyProxy
from support import GCS_SERVERS, free_port, options, picture_files, run_well, write_files

from job import storage
from job.demo.gcs_server import create_bucket, gcs_server

_FOLDERS = itertools.count()


@pytest.fixture(scope="session")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProxy]:
    """A GCS server behind a proxy, with a bucket ``gs://faults`` that holds the pictures."""
    port = free_port()
    folder = tmp_path_factory.mktemp("faults") / "buckets"
    with gcs_server(folder, port=free_port(), public_host=f"127.0.0.1:{port}") as backend:
        faulty = FaultyProxy(backend, port)
        GCS_SERVERS["proxy"] = faulty.url
        storage.use_gcs_emulator(faulty.url)
        storage.filesystem("gs://faults")[0].clear_instance_cache()
        create_bucket("gs://faults")
        storage.write_many("gs://faults/colours", picture_files(["blue", "red"], 20))
        yield faulty
        faulty.stop()


@pytest.fixture(autouse=True)
def healthy(proxy: FaultyProxy) -> Iterator[None]:
    """Disable the proxy's faults, and end what still runs, after each test."""
    yield
    Job.kill_all()
    proxy.fault = lambda request: None
    proxy.damage = lambda request: None
    proxy.delay = lambda request: 0.0


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """run_dir of an uninterrupted run of 2 processes."""
    root = tmp_path_factory.mktemp("uninterrupted")
    data = write_files(root / "colours", picture_files(["blue", "red"], 20))
    run_well("fit", *options(SETTINGS, data__root=data, run_dir=root / "run"), processes=2)
    return str(root / "run")


@pytest.fixture
def run_dir(request: pytest.FixtureRequest) -> str:
    """An empty folder of the bucket, also where a test is run once more after a failure."""
    name = re.sub(r"\W+", "-", request.node.name)
    return f"gs://faults/{name}-{next(_FOLDERS)}"
