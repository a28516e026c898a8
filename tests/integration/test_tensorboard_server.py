"""``python -m job tensorboard`` as a process, on buckets behind an endpoint: its HTTP API, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support import environment, start

from job.monitoring.tensorboard.logger import BucketTensorBoardLogger

pytestmark = pytest.mark.integration


def scalars_shown(*uris: str, stop: signal.Signals = signal.SIGINT) -> tuple[dict[str, Any], int, str]:
    """Scalar tags by run; exit code; output."""
    with tempfile.TemporaryFile("w+") as output:
        process = start(
            "tensorboard", *uris, "--port=0", stdout=output, stderr=output, variables=environment(), session=True
        )
        address, deadline = None, time.monotonic() + 300
        while address is None and time.monotonic() < deadline:
            time.sleep(0.2)
            output.seek(0)
            address = re.search(r"http://\S+", output.read())
        found: dict[str, Any] = {}
        while address and len(found) < len(uris) and time.monotonic() < deadline:
            time.sleep(0.5)
            found = json.load(urllib.request.urlopen(f"{address[0]}data/plugin/scalars/tags"))
        process.send_signal(stop)
        code = process.wait(300)
        output.seek(0)
        return found, code, output.read()


def write_run(run_dir: str) -> str:
    logger = BucketTensorBoardLogger(f"{run_dir}/tensorboard")
    logger.log_metrics({"val/accuracy": 1.0}, 0)
    logger.finalize("success")
    return run_dir


def test_runs_in_gcs_and_on_disk_until_ctrl_c(gcs: str, tmp_path: Path) -> None:
    uris = write_run(f"{gcs}/tb/exp/1"), write_run(str(tmp_path / "exp" / "1"))
    found, code, output = scalars_shown(*uris)
    assert len(found) == 2, output
    assert all(list(tags) == ["val/accuracy"] for tags in found.values())
    assert next(iter(sorted(found))).startswith("gs/tests/tb")
    assert (code, "Traceback" in output, "INFO" in output) == (0, False, False), output


def test_runs_in_s3_until_sigterm(s3: str) -> None:
    write_run(f"{s3}/tb/1")
    write_run(f"{s3}/tb/2")
    found, code, output = scalars_shown(f"{s3}/tb", f"{s3}/none", stop=signal.SIGTERM)
    assert set(found) == {"tb/1", "tb/2"}, output
    assert (code, "Traceback" in output) == (143, False), output
