"""The default precision."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from support import own_messages

from job.process.cpus import multiplies_bf16
from job.train.precision import announce, automatic_precision


def test_a_cpu_computes_in_bf16_where_it_has_units_for_it() -> None:
    """According to torch, which asks the CPU, not the kernel."""
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("needs a torch with torch.cpu.get_capabilities")
    features = torch.cpu.get_capabilities()
    expected = features.get("avx512_bf16") or features.get("amx_tile")
    assert automatic_precision("cpu") == ("bf16-mixed" if expected else "32-true")


@pytest.mark.parametrize(
    ("content", "expected"),
    [("flags : fpu avx512_bf16 sse2\n", True), ("flags : amx_tile\n", True), ("flags : avx512_bf16x\n", False)],
)
def test_bf16_units_by_the_kernels_list(content: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: content)
    assert multiplies_bf16() == expected


def test_a_system_without_proc_computes_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert not multiplies_bf16()


def test_the_hardware_in_use_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        announce("cpu", "32-true", automatic=True)
        announce("cpu", "bf16-mixed", automatic=False)
    first, second = own_messages(caplog)
    assert f"1 process(es), {torch.get_num_threads()} CPU thread(s) each, precision 32-true (chosen" in first
    assert second.endswith("precision bf16-mixed")
