"""The default precision."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from job.train.precision import announce, automatic_precision


def test_a_cpu_computes_in_bf16_where_it_has_units_for_it() -> None:
    """According to the kernel's list of CPU features, which torch does not read."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = "bf16-mixed" if flags & {"avx512_bf16", "amx_tile"} else "32-true"
    assert automatic_precision("cpu") == expected


def test_the_hardware_in_use_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        announce("cpu", "32-true", automatic=True)
        announce("cpu", "bf16-mixed", automatic=False)
    first, second = caplog.messages
    assert f"1 process(es), {torch.get_num_threads()} CPU thread(s) each, precision 32-true (chosen" in first
    assert second.endswith("precision bf16-mixed")
