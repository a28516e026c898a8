"""Fixtures: images in folders and on a real GCS server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import GCS_SERVERS, INDEXES, free_port, picture_files, write_files

from job import storage
from job.demo.gcs_server import create_bucket, gcs_server

# gcsfs reads it when it is imported, by whichever test module comes first: see job.storage.use_gcs_emulator.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let gs:// mean the server of this test: those of both fixtures run until the session ends."""
    name = "proxy" if "proxy" in getattr(item, "fixturenames", ()) else "gcs"
    if name in GCS_SERVERS:
        storage.use_gcs_emulator(GCS_SERVERS[name])


@pytest.fixture(scope="session", autouse=True)
def stop_signals_as_in_a_terminal() -> None:
    """A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP: processes would inherit that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for this session of tests only."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("TEST_INDEXES", str(INDEXES))  # for processes that tests start
        yield
    shutil.rmtree(INDEXES, ignore_errors=True)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Two classes, 20 pictures each."""
    return write_files(tmp_path / "colours", picture_files(["blue", "red"], 20))


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A GCS server with an empty bucket; yields ``gs://tests``."""
    with gcs_server(tmp_path_factory.mktemp("gcs") / "buckets", port=free_port()) as url:
        GCS_SERVERS["gcs"] = url
        create_bucket("gs://tests")
        yield "gs://tests"


@pytest.fixture(scope="session")
def gcs_colours(gcs: str) -> str:
    """Two classes of 20 pictures each in the bucket."""
    storage.write_many(f"{gcs}/colours", picture_files(["blue", "red"], 20))
    return f"{gcs}/colours"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server (moto) with an empty bucket; yields ``s3://tests``."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            environment.setenv(name, value)
        try:
            storage.filesystem("s3://tests")[0].clear_instance_cache()  # of an earlier server
            fs, _ = storage.filesystem("s3://tests")
            deadline = time.monotonic() + 300
            while True:
                try:
                    fs.mkdir("tests")
                    break
                except Exception:  # not up yet
                    if time.monotonic() > deadline or server.poll() is not None:
                        raise
                    time.sleep(0.2)
            yield "s3://tests"
        finally:
            server.terminate()
            server.wait()
