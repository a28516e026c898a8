"""The checks of ``benchmarks/gpu.py``, on a machine with a GPU; and the script itself, on any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from gpu_checks import CHECKS
from gpu_machine import Machine, NotMeasured


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_checks_on_a_gpu(check: Callable[[Machine], str], tmp_path: Path) -> None:
    try:
        check(Machine("cuda", quick=False, photos=None, scratch=tmp_path))
    except NotMeasured as reason:
        pytest.skip(str(reason))


@pytest.mark.integration
@pytest.mark.timeout(2500)
def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    """A run on the CPU finds mistakes in the script before a GPU is used."""
    line = [sys.executable, "benchmarks/gpu.py", "--device=cpu", "--quick", "--minutes=30", f"--out={tmp_path}"]
    result = subprocess.run(
        line, cwd=REPOSITORY, capture_output=True, text=True, timeout=2400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    skipped = {name: check["detail"] for name, check in results["checks"].items() if check["state"] != "passed"}
    assert all("CUDA" in why for why in skipped.values()), skipped
    assert {"all layers, resnet50", "features, resnet50"} <= {row["name"] for row in results["rows"]}
    assert all("CUDA" in why or "photographs" in why for why in results["not_measured"].values()), results
