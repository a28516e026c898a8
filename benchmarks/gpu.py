"""Checks and benchmarks on a GPU, in ten minutes: one table, and JSON that is updated after each result.

    python benchmarks/gpu.py --photos FOLDER --out FOLDER      on a machine with one GPU
    python benchmarks/gpu.py --device cpu --quick              test of the script itself; its speeds mean nothing

``--photos`` is a folder of train/ and validation/ with class folders of photographs. Checks run first, then
measurements, each with its upper bound or a peer in the same run. With less time, ``--only`` chooses some: the checks
alone take four minutes on an H100. Several GPUs are not tested.
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
from collections.abc import Callable, Iterator, Sequence
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
    """Return GPU, driver, cores and versions."""
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
    """Results, written to ``file`` after each.

    Args:
        file: the JSON file.
        facts: description of the machine.
        seconds: time limit, after which no check or measurement starts.
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
        """Record the result of a check."""
        self.content["checks"][name] = {"state": state, "detail": detail, "seconds": round(seconds, 1)}
        self._write(f"check {name}: {state} ({seconds:.0f} s) {detail}")

    def row(self, row: Row) -> None:
        """Record a measurement."""
        self.content["rows"].append({**asdict(row), "ratio": row.ratio})
        self._write(f"{row.name}: {row.value:,.1f} {row.unit}" + (f" of {row.limit:,.1f}" if row.limit else ""))

    def missing(self, name: str, why: str) -> None:
        """Record a measurement that was skipped or failed."""
        self.content["not_measured"][name] = why
        self._write(f"{name}: {why}")

    @property
    def time_is_up(self) -> bool:
        """Whether the time limit is exceeded."""
        return time.monotonic() - self.began > self.seconds

    def _write(self, line: str) -> None:
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        self.file.write_text(json.dumps(self.content, indent=2, allow_nan=False))
        print(line, file=sys.stderr, flush=True)

    def table(self) -> Table:
        """Return all results as one table."""
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


def run_checks(machine: Machine, results: Results, checks: Sequence[Callable[[Machine], str]]) -> None:
    """Run all of ``checks``, also after a failed one."""
    for check in checks:
        name, began = check.__name__, time.monotonic()
        if results.time_is_up:
            results.check(name, "skipped", "the time limit was exceeded", 0.0)
            continue
        try:
            state, detail = "passed", check(machine)
        except NotMeasured as reason:
            state, detail = "skipped", str(reason)
        except Exception as error:  # any error is the result of this check
            traceback.print_exc()
            state, detail = "failed", f"{type(error).__name__}: {error}"[:2000]
        results.check(name, state, detail, time.monotonic() - began)


def run_measurements(
    machine: Machine, results: Results, measurements: Sequence[Callable[[Machine], Iterator[Row]]]
) -> None:
    """Run ``measurements`` within the time limit."""
    for measure in measurements:
        name = measure.__name__
        if results.time_is_up:
            results.missing(name, "the time limit was exceeded")
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
    """Run everything and print the table; exit with 1 if a check or a measurement has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="use the smallest networks and images")
    parser.add_argument("--photos", type=Path, help="train/ and validation/ of class folders")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of gpu.json")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="time limit, after which no check or measurement starts"
    )
    names = [one.__name__ for one in (*CHECKS, *MEASUREMENTS)]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --device cpu --quick tests the script itself")
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "gpu.json", machine_facts(options.device), 60 * options.minutes)
    with tempfile.TemporaryDirectory() as scratch:
        photos = options.photos.resolve() if options.photos else None
        machine = Machine(options.device, options.quick, photos, Path(scratch))
        run_checks(machine, results, [check for check in CHECKS if check.__name__ in options.only])
        run_measurements(machine, results, [one for one in MEASUREMENTS if one.__name__ in options.only])
    Console(width=160).print(results.table())
    if results.failed:
        sys.exit(f"failed: {', '.join(results.failed)}")


if __name__ == "__main__":
    main()
