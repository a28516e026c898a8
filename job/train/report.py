"""``report.json``, and the closing summary a person reads."""

from __future__ import annotations

import json
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table

from job import storage
from job.train import checkpoint

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "fsspec", "gcsfs")


class Report(Callback):
    """Measures throughput and writes ``<run_dir>/report.json`` at the end of a fit, on rank 0."""

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self.train_seconds = 0.0
        self.train_images = 0
        self.first_step = 0
        self._epoch_start: tuple[float, int] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where this start begins."""
        self.first_step = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the epoch."""
        self._epoch_start = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop the clock at the last batch, before validation."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and self._epoch_start is not None:
            began, _ = self._epoch_start
            seconds, images = time.monotonic() - began, len(trainer.datamodule.parts["train"])  # type: ignore[attr-defined]
            self.train_seconds += seconds
            self.train_images += images
            self._epoch_start = None
            for logger in trainer.loggers:
                logger.log_metrics({"train/images_per_second": images / seconds}, step=trainer.global_step - 1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report, unless this start found the run finished already."""
        if trainer.is_global_zero and trainer.global_step > self.first_step:
            run_dir = trainer.default_root_dir
            report = self._report(trainer, pl_module)
            storage.write_text(storage.join(run_dir, "report.json"), json.dumps(report, indent=2, ensure_ascii=False))

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        committed = checkpoint.manifests(trainer.default_root_dir)
        kept = {"best": checkpoint.best(committed), "last": committed[-1]} if committed else {}
        return {
            "run_dir": trainer.default_root_dir,
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "epochs": trainer.current_epoch,
            "global_step": trainer.global_step,
            "world_size": trainer.world_size,
            "accelerator": type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
            "classes": list(data.classes),
            "images": {part: len(index) for part, index in data.parts.items()},
            "bad_samples": sorted(data.bad_samples),
            "train_images_per_second": self.train_images / self.train_seconds if self.train_seconds else None,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "confusion_matrix": {"rows": "true class", "columns": "predicted class", "counts": pl_module.confusion},
            "checkpoints": {
                which: {
                    "uri": storage.join(trainer.default_root_dir, checkpoint.FOLDER, manifest.file),
                    "epoch": manifest.epoch,
                    manifest.monitor: manifest.value,
                }
                for which, manifest in kept.items()
            },
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }


def print_summary(run_dir: str) -> None:
    """Print metrics, where everything is, and the commands to type next, from ``report.json``."""
    report = json.loads(storage.read_bytes(storage.join(run_dir, "report.json")))
    table = Table(title="Finished", show_header=False, title_justify="left")
    speed = report["train_images_per_second"]
    rows = {
        "validation": "  ".join(
            f"{name} {report['metrics'][f'val/{name}']:.4f}" for name in ("accuracy", "f1", "auroc", "loss")
        ),
        "best checkpoint": report["checkpoints"]["best"]["uri"],
        "epochs": f"{report['epochs']} ({report['global_step']} steps)",
        "speed": f"{speed:.1f} images/s training, {report['world_size']} process(es)" if speed else "-",
        "run_dir": run_dir,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("Next:", highlight=False)
    console.print(f"  tensorboard --logdir {storage.join(run_dir, 'tensorboard')}", highlight=False)
    console.print(f"  python -m job predict --ckpt {run_dir} --input IMAGE_OR_FOLDER", highlight=False)
