"""Contract of job.cluster.xla_internals with the private API of torch-xla."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from support import REPOSITORY, environment

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch-xla is not in this environment"),
]


def xla_output(code: str) -> str:
    """Run code in a new process, since torch-xla starts threads when it is imported; return its output."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(PJRT_DEVICE="CPU", PYTHONPATH=str(REPOSITORY)),
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_machine_without_tpu_has_no_chips() -> None:
    assert xla_output("from job.cluster.xla_internals import tpu_chips; print(tpu_chips())") == "0\n"


def test_a_state_is_copied_to_host_memory() -> None:
    """Tensors at any depth; later changes on the device do not reach the copy."""
    code = """if True:
        import torch, torch_xla
        from job.cluster.xla_internals import to_host
        weight = torch.arange(3.0).to(torch_xla.device())
        host = to_host({"state": [{"weight": weight}], "step": 7})
        weight += 1
        torch_xla.sync()
        tensor = host["state"][0]["weight"]
        print(tensor.device, tensor.tolist(), host["step"])
    """
    assert xla_output(code) == "cpu [0.0, 1.0, 2.0] 7\n"
