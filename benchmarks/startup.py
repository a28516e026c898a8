"""CPU seconds (user and system, children included) that each command takes to start: python benchmarks/startup.py."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from job.cli.versions import library_versions

REPEATS = 3
HERE = Path(__file__).parent


def cpu_seconds(*words: str) -> tuple[float, float]:
    """Median CPU and wall seconds of a command."""
    cpu, wall = [], []
    for _ in range(REPEATS):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=HERE.parent,
            env={**os.environ, "LAUNCH_PROCESSES": "1", "OMP_NUM_THREADS": "1"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        wall.append(time.perf_counter() - start)
    return statistics.median(cpu), statistics.median(wall)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "nothing.py").write_text("")
        job, nothing = ("-m", "job"), str(Path(folder) / "nothing.py")
        commands = {
            "import torch": ("-c", "import torch"),
            "import torchvision": ("-c", "import torchvision"),
            "import pytorch_lightning": ("-c", "import pytorch_lightning, torchvision"),
            "torchrun, nothing": ("-m", "torch.distributed.run", "--standalone", nothing),
            "--help": (*job, "--help"),
            "--version": (*job, "--version"),
            "unknown command": (*job, "fti"),
            "fit --help": (*job, "fit", "--help"),
            "fit --help-all": (*job, "fit", "--help-all"),
            "fit, misspelt option": (*job, "fit", folder, "--epohcs=1"),
            "index, misspelt option": (*job, "index", "--outptu=x"),
            "index": (*job, "index", folder),
            "checkpoints ls": (*job, "checkpoints", "ls", folder),
            "predict, no checkpoint": (*job, "predict", folder, folder),
            "launch, a light command": (*job, "launch", "checkpoints", "ls", folder),
        }
        seconds = {name: cpu_seconds(*words) for name, words in commands.items()}
    table = Table(title=f"{library_versions()}, median of {REPEATS}")
    for column in ("command", "CPU s", "wall s", "of import torch", "of torchrun"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for name, (cpu, wall) in seconds.items():
        ratios = (f"{cpu / seconds[other][0]:.0%}" for other in ("import torch", "torchrun, nothing"))
        table.add_row(name, f"{cpu:.2f}", f"{wall:.2f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
