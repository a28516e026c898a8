"""Real data, in folders and on a real GCS server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import picture_files, write_files

from job import storage
from job.demo.gcs_server import create_bucket, gcs_server

# gcsfs reads it when it is imported, by whichever test module comes first: see job.storage.use_gcs_emulator.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture(scope="session", autouse=True)
def stop_signals_as_in_a_terminal() -> None:
    """A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP: processes would inherit that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


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


@pytest.fixture(scope="session")
def gcs_colours(gcs: str) -> str:
    """Two classes of 20 pictures each in the bucket."""
    storage.write_many(f"{gcs}/colours", picture_files(["blue", "red"], 20))
    return f"{gcs}/colours"
