"""torch.compile for predictions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support import COLOURS, fit_here, picture, run_here, write_files

import job


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_here(tmp_path_factory.mktemp("compile"))


def test_a_machine_without_a_compiler_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    result = run_here("predict", trained, tmp_path, "--compile")
    assert result.returncode == 2
    assert "--compile needs a C++ compiler" in result.output


def test_a_compiler_that_fails_is_an_error_and_no_fallback(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_files(tmp_path / "images", {"a.jpg": picture(COLOURS["red"], 1)})
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken_compiler)
    torch.compiler.reset()
    result = run_here("predict", trained, images, "--output", tmp_path / "p.jsonl", "--compile")
    torch.compiler.reset()
    assert result.returncode == 2
    assert "--compile: torch.compile failed for timm/test_resnet on cpu" in result.output
    assert "no such instruction" in result.output
    assert not (tmp_path / "p.jsonl").exists()


def broken_compiler(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no such instruction")


@pytest.mark.integration
def test_compiled_predictions_equal_the_others(trained: Path, tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", {f"{n}.jpg": picture(COLOURS["red"], n) for n in range(5)})
    torch.compiler.reset()
    rows = {}
    for name, extra in (("eager", []), ("compiled", ["--compile"])):
        output = tmp_path / f"{name}.jsonl"
        command = ("predict", trained, images, "--output", output, "--batch_size", 4, "--precision", "fp32")
        result = run_here(*command, *extra)
        assert result.returncode == 0, result.output
        rows[name] = [json.loads(line)["probabilities"] for line in output.read_text().splitlines()]
    for eager, compiled in zip(rows["eager"], rows["compiled"], strict=True):
        assert compiled == pytest.approx(eager, abs=1e-5)

    predictor = job.load(str(trained))
    predictor.compile(4)
    compiled_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled_graphs
    for count in (1, 3, 4):
        assert len(predictor.predict([picture(COLOURS["red"], n) for n in range(count)], batch_size=4)) == count
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled_graphs
    assert os.environ.get("TORCHDYNAMO_DISABLE") is None
