"""``launch check`` and ``torchrun … check``: all ranks check together, and rank 0 reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
from support import REPOSITORY, TINY, environment, options, run

from job.check.finding import CheckReport


def report_of(output: str) -> CheckReport:
    document, _ = json.JSONDecoder().raw_decode(output[output.index("{\n") :])
    return msgspec.convert(document, CheckReport, strict=True)


def test_two_ranks_of_launch_exchange_tensors_and_findings(colours: Path, tmp_path: Path) -> None:
    arguments = options(TINY, data__root=colours, run_dir=tmp_path / "run")
    result = run("check", *arguments, "--json", processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    report = report_of(result.stdout)
    found = {(finding.check, finding.rank): finding for finding in report.findings}
    assert "2 ranks exchange" in found["ranks", 0].message
    for rank in (0, 1):
        for check in ("data_access", "open_files", "device", "memory", "loader", "ranks"):
            assert found[check, rank].status == "ok", found[check, rank]
    assert ("run_dir_access", 1) not in found  # one rank per node
    assert report.estimate is not None
    assert not (tmp_path / "run").exists()


def test_a_failure_ends_all_ranks_of_torchrun_with_one_report(colours: Path, tmp_path: Path) -> None:
    arguments = options(TINY, data__root=colours, run_dir=tmp_path / "run", model__backbone="timm/test_vit")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "job"]
    result = subprocess.run(
        [*torchrun, "check", *arguments, "--model.weights=/no/such/weights.safetensors", "--json"],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(),
        cwd=REPOSITORY,
    )
    assert result.returncode
    report = report_of(result.stdout)
    failed = {(finding.check, finding.rank) for finding in report.findings if finding.status == "fail"}
    assert ("weights", 0) in failed
    assert "1 check(s) failed: weights." in result.stderr
    assert result.stdout.count('"findings"') == 1


def test_data_and_options_that_stop_all_ranks_alike(colours: Path, tmp_path: Path) -> None:
    missing = options(TINY, data__root=tmp_path / "nothing", run_dir=tmp_path / "run")
    refused = options(TINY, data__root=colours, run_dir=tmp_path / "run", model__optimizer="torch.optim.SGD")
    for arguments, failed in ((missing, "data_access"), ([*refused, "--model.optimizer.momentum=-1"], "training_step")):
        result = run("check", *arguments, "--json", processes=2)
        assert result.returncode == 2, result.stdout + result.stderr
        report = report_of(result.stdout)
        found = {(finding.check, finding.rank) for finding in report.findings if finding.status == "fail"}
        assert {(failed, 0), (failed, 1)} <= found
        assert not any(check == "ranks" for check, _ in found), report.findings
