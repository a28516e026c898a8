"""CUDA shown to work, and how fast, in eight minutes: one table, and JSON that is written as it goes.

    python benchmarks/gpu.py --photos FOLDER --out FOLDER      on a machine with one GPU
    python benchmarks/gpu.py --device cpu --quick              whether the script itself works; its speeds mean nothing

``--photos`` is a folder of train/ and validation/ with class folders of photographs. Checks come first, measurements
after them, each beside its limit or a peer in the same run. Export is not checked: there is no such command yet.
Several GPUs are not tried.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_checks import CHECKS
from gpu_machine import Machine, NotMeasured
from gpu_speed import MEASUREMENTS, Row
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "simplejpeg", "pillow", "fsspec")


def machine_facts(device: str) -> dict[str, Any]:
    """Card, driver, cores and versions."""
    facts: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if device == "cuda":
        facts["card"], facts["cuda"] = torch.cuda.get_device_name(0), torch.version.cuda
        facts["gigabytes"] = round(torch.cuda.mem_get_info(0)[1] / 1e9, 1)
        line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        try:
            facts["driver"] = subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            facts["driver"] = None
    return facts


class Results:
    """Outcomes so far, written to ``file`` after each.

    Args:
        file: the JSON file.
        facts: the machine.
        seconds: after which nothing more is begun.
    """

    def __init__(self, file: Path, facts: dict[str, Any], seconds: float) -> None:
        self.file = file
        self.seconds = seconds
        self.began = time.monotonic()
        self.content: dict[str, Any] = {"machine": facts, "checks": {}, "rows": [], "not_measured": {}}

    @property
    def failed(self) -> list[str]:
        """Names of checks and measurements that failed."""
        checks = [name for name, check in self.content["checks"].items() if check["state"] == "failed"]
        return checks + [name for name, why in self.content["not_measured"].items() if why.startswith("failed")]

    def check(self, name: str, state: str, detail: str, seconds: float) -> None:
        """Note the outcome of a check."""
        self.content["checks"][name] = {"state": state, "detail": detail, "seconds": round(seconds, 1)}
        self._write(f"check {name}: {state} ({seconds:.0f} s) {detail}")

    def row(self, row: Row) -> None:
        """Note a measurement."""
        self.content["rows"].append({**asdict(row), "ratio": row.ratio})
        self._write(f"{row.name}: {row.value:,.1f} {row.unit}" + (f" of {row.limit:,.1f}" if row.limit else ""))

    def missing(self, name: str, why: str) -> None:
        """Note a measurement that was not made."""
        self.content["not_measured"][name] = why
        self._write(f"{name}: {why}")

    @property
    def time_is_over(self) -> bool:
        """Whether nothing more should be begun."""
        return time.monotonic() - self.began > self.seconds

    def _write(self, line: str) -> None:
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        self.file.write_text(json.dumps(self.content, indent=2, allow_nan=False))
        print(line, file=sys.stderr, flush=True)

    def table(self) -> Table:
        """Everything in one table."""
        table = Table(title=", ".join(f"{k} {v}" for k, v in self.content["machine"].items()), title_justify="left")
        for column in ("", "result", "limit or peer", "ratio", "goal"):
            table.add_column(column, overflow="fold")
        for name, check in self.content["checks"].items():
            table.add_row(name, check["state"], check["detail"][:120], "", "")
        for row in self.content["rows"]:
            limit = f"{row['limit']:,.1f} {row['limit_name']}" if row["limit"] else ""
            ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
            goal = (
                "" if row["goal"] is None else f"{row['goal']}: {'met' if row['ratio'] >= row['goal'] else 'not met'}"
            )
            table.add_row(row["name"], f"{row['value']:,.1f} {row['unit']}", limit, ratio, goal)
        for name, why in self.content["not_measured"].items():
            table.add_row(name, "not measured", why[:120], "", "")
        return table


def run_checks(machine: Machine, results: Results) -> None:
    """Run every check; one that fails does not stop the others."""
    for check in CHECKS:
        name, began = check.__name__, time.monotonic()
        if results.time_is_over:
            results.check(name, "skipped", "the time was over", 0.0)
            continue
        try:
            state, detail = "passed", check(machine)
        except NotMeasured as reason:
            state, detail = "skipped", str(reason)
        except Exception as error:  # whatever it is, it is this check's outcome
            traceback.print_exc()
            state, detail = "failed", f"{type(error).__name__}: {error}"[:2000]
        results.check(name, state, detail, time.monotonic() - began)


def run_measurements(machine: Machine, results: Results) -> None:
    """Take every measurement for which there is time."""
    for measure in MEASUREMENTS:
        name = measure.__name__
        if results.time_is_over:
            results.missing(name, "the time was over")
            continue
        try:
            for row in measure(machine):
                results.row(row)
        except NotMeasured as reason:
            results.missing(name, str(reason))
        except Exception as error:
            traceback.print_exc()
            results.missing(name, f"failed: {type(error).__name__}: {error}"[:2000])


def main() -> None:
    """Run everything, print the table; exit with 1 if a check or a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest networks and images")
    parser.add_argument("--photos", type=Path, help="train/ and validation/ of class folders")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of gpu.json")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which nothing more is begun")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device: --device cpu --quick tries the script itself")
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out / "gpu.json", machine_facts(given.device), 60 * given.minutes)
    with tempfile.TemporaryDirectory() as scratch:
        photos = given.photos.resolve() if given.photos else None
        machine = Machine(given.device, given.quick, photos, Path(scratch))
        run_checks(machine, results)
        run_measurements(machine, results)
    Console(width=160).print(results.table())
    if results.failed:
        sys.exit(f"failed: {', '.join(results.failed)}")


if __name__ == "__main__":
    main()
