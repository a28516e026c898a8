"""``report.json``, and the closing summary a person reads."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table

from job import storage
from job.logging.tensorboard import events_uri
from job.train import accounting, checkpoint
from job.train.accounting import Accounting

FILE = "report.json"
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "fsspec", "gcsfs")


class Report(Callback):
    """Measures throughput and writes ``<run_dir>/report.json`` at the end of a fit, on rank 0."""

    def __init__(self, accounting: Accounting, before_write: Callable[[], None] = lambda: None) -> None:
        self.accounting = accounting
        self.before_write = before_write
        self.train_seconds = 0.0
        self.train_images = 0
        self._epoch_start: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the epoch."""
        self._epoch_start = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop the clock at the last batch, before validation."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and self._epoch_start is not None:
            seconds, images = time.monotonic() - self._epoch_start, len(trainer.datamodule.parts["train"])  # type: ignore[attr-defined]
            self.train_seconds += seconds
            self.train_images += images
            self._epoch_start = None
            for logger in trainer.loggers:
                logger.log_metrics({"train/images_per_second": images / seconds}, step=trainer.global_step - 1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report. Its figures come from the bucket, so that a run found finished has one, too."""
        if trainer.is_global_zero:
            report = json.dumps(self._report(trainer), indent=2, ensure_ascii=False)
            storage.write_text(storage.join(trainer.default_root_dir, FILE), report, self.before_write)

    def _report(self, trainer: pl.Trainer) -> dict[str, Any]:
        run_dir, data = trainer.default_root_dir, trainer.datamodule  # type: ignore[attr-defined]
        committed = checkpoint.manifests(run_dir)
        last, best = committed[-1], (checkpoint.ranked(committed) or committed)[0]
        measured = next((m for m in reversed(committed) if m.metrics), last)
        starts = accounting.read(run_dir)
        return {
            "run_dir": run_dir,
            "started": _iso(starts[0].began),
            "finished": _iso(starts[-1].ended),
            "epochs": last.epoch,
            "global_step": last.global_step,
            "world_size": trainer.world_size,
            "accelerator": type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
            "classes": list(data.classes),
            "images": {part: len(index) for part, index in data.parts.items()},
            "bad_samples": sorted(data.bad_samples),
            "train_images_per_second": self.train_images / self.train_seconds if self.train_seconds else None,
            "metrics": measured.metrics,
            "confusion_matrix": {
                "rows": "true class",
                "columns": "predicted class",
                "counts": measured.confusion_matrix,
            },
            "checkpoints": {
                which: {"uri": storage.join(run_dir, checkpoint.FOLDER, m.file), "epoch": m.epoch, m.monitor: m.value}
                for which, m in (("best", best), ("last", last))
            },
            "starts": len(starts),
            "seconds": accounting.totals(starts),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def print_summary(run_dir: str) -> None:
    """Print metrics, where everything is, and the commands to type next, from ``report.json``."""
    report = json.loads(storage.read_bytes(storage.join(run_dir, FILE)))
    table = Table(title="Finished", show_header=False, title_justify="left")
    speed = report["train_images_per_second"]
    rows = {
        "validation": "  ".join(
            f"{name} {report['metrics'][f'val/{name}']:.4f}"
            for name in ("accuracy", "f1", "auroc", "loss")
            if f"val/{name}" in report["metrics"]
        ),
        "best checkpoint": report["checkpoints"]["best"]["uri"],
        "epochs": f"{report['epochs']} ({report['global_step']} steps)",
        "speed": f"{speed:.1f} images/s training, {report['world_size']} process(es)" if speed else "-",
        "time": _where_time_went(report["seconds"], report["starts"]),
        "run_dir": run_dir,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("Next:", highlight=False)
    console.print(f"  tensorboard --logdir {events_uri(run_dir)}", highlight=False)
    console.print(f"  python -m job predict --ckpt {run_dir} --input IMAGE_OR_FOLDER", highlight=False)


def print_findings(found: dict[str, Any]) -> None:
    """Print what ``tune`` found, as options to type next."""
    console = Console(soft_wrap=True)
    optimizer = f"{{class_path: {found['optimizer']}, init_args: {{lr: {found['lr']:.2g}}}}}"
    console.print(f"The loss falls fastest at a learning rate of {found['lr']:.2g}:", highlight=False)
    console.print(f"  --model.optimizer '{optimizer}'", highlight=False, markup=False)
    if most := found["global_batch_size_at_most"]:
        each, processes = found["bytes_an_image"] / 1e6, found["world_size"]
        console.print(
            f"Training all layers takes {each:.1f} MB an image. On {processes} process(es) like these, at most:",
            highlight=False,
        )
        console.print(f"  --data.global_batch_size {most}", highlight=False)


def _where_time_went(seconds: dict[str, float], starts: int) -> str:
    parts = "  ".join(
        f"{name.replace('_', ' ')} {seconds[name]:.0f}"
        for name in ("step", "data_wait", "validation", "checkpoint_stall", "startup", "features", "lost", "other")
    )
    return f"goodput {seconds['goodput']:.0%} of {seconds['wall']:.0f} s in {starts} start(s): {parts}"
