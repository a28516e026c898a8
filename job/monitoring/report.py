"""``report.json``, and the closing summary a person reads."""

from __future__ import annotations

import logging
import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import msgspec
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job import checkpoint, storage
from job.checkpoint import confusion
from job.checkpoint.manifest import Manifest
from job.cluster import ranks
from job.data.datamodule import image_data
from job.data.dataset import Batch
from job.errors import JobError
from job.monitoring import accounting
from job.monitoring.accounting import Accounting
from job.monitoring.event_folders import tensorboard_argument
from job.process.terminal import print_table, say
from job.storage.format_version import MALFORMED
from job.storage.json_files import read_limited, write_json

log = logging.getLogger(__name__)

FILE = "report.json"
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "fsspec", "gcsfs")


@dataclass(frozen=True)
class Report:
    """Result of a fit.

    Attributes:
        run_dir: folder of the run.
        metrics: validation metrics of the best checkpoint, by name; None for a value that is not finite.
        best: URI of the best checkpoint; None where there is none.
        last: URI of the newest checkpoint.
        epochs: epochs completed.
        global_step: optimizer steps done.
        classes: class names, in the order of the network's outputs.
        images: number of images by part.
        bad_samples: images that could not be read.
        images_per_second: throughput of training; None where this attempt trained less than an epoch.
        seconds: where the time went, over all attempts; see :func:`job.monitoring.accounting.totals`.
        content: all of ``report.json``.
    """

    run_dir: str
    metrics: dict[str, float | None]
    best: str | None
    last: str | None
    epochs: int
    global_step: int
    classes: tuple[str, ...]
    images: dict[str, int]
    bad_samples: tuple[str, ...]
    images_per_second: float | None
    seconds: dict[str, float]
    content: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Report:
        """The report with this content of ``report.json``."""
        checkpoints = content["checkpoints"]
        return cls(
            run_dir=content["run_dir"],
            metrics=content["metrics"],
            best=checkpoints["best"]["uri"] if checkpoints else None,
            last=checkpoints["last"]["uri"] if checkpoints else None,
            epochs=content["epochs"],
            global_step=content["global_step"],
            classes=tuple(content["classes"]),
            images=content["images"],
            bad_samples=tuple(content["bad_samples"]),
            images_per_second=content["train_images_per_second"],
            seconds=content["seconds"],
            content=content,
        )


def report_of(trainer: pl.Trainer) -> Report:
    """The report of a fit that has ended, on every rank; called by all ranks together."""
    (writer,) = (c for c in trainer.callbacks if isinstance(c, ReportWriter))  # type: ignore[attr-defined]
    return Report.of(ranks.from_rank_zero(lambda: writer.content))


class ReportWriter(Callback):
    """Measures throughput and writes ``<run_dir>/report.json`` at the end of a fit, on rank 0."""

    def __init__(self, accounting: Accounting, before_write: Callable[[], None] = storage.unconditionally) -> None:
        self.accounting = accounting
        self.before_write = before_write
        self.train_seconds = 0.0
        self.train_images = 0
        self.content: dict[str, Any] = {}
        self._clock: float | None = None
        self._epoch_seconds, self._epoch_images = 0.0, 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the epoch."""
        self._clock = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start the clock where an epoch was resumed in its middle."""
        if self._clock is None:
            self._clock = time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock for a validation within the epoch."""
        self._stop_clock()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the clock after it."""
        if not trainer.is_last_batch:
            self._clock = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the images of the batch, and stop the clock at the epoch's last one."""
        self._epoch_images += int(batch["global_size"])
        if trainer.is_last_batch:
            self._stop_clock()
            self.train_seconds += self._epoch_seconds
            self.train_images += self._epoch_images
            rate = self._epoch_images / self._epoch_seconds
            self._epoch_seconds, self._epoch_images = 0.0, 0
            for logger in trainer.loggers:
                logger.log_metrics({"train/images_per_second": rate}, step=trainer.global_step - 1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report. Its figures come from the bucket, so that a run found finished has one, too."""
        if trainer.is_global_zero:
            uri = storage.join(trainer.default_root_dir, FILE)
            self.content = self._report(trainer)
            if not self.train_seconds:
                self.content |= _figures_of_training(uri)
            write_json(uri, self.content, self.before_write)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._epoch_seconds += time.monotonic() - self._clock
            self._clock = None

    def _report(self, trainer: pl.Trainer) -> dict[str, Any]:
        run_dir, data = trainer.default_root_dir, image_data(trainer)
        committed = checkpoint.manifests(run_dir)
        attempts = self.accounting.attempts
        if not self.train_seconds:
            attempts = accounting.read(run_dir) or attempts
        report = {
            "run_dir": run_dir,
            "started": _iso(attempts[0].began),
            "finished": _iso(attempts[-1].ended),
            "epochs": committed[-1].epoch if committed else 0,
            "global_step": committed[-1].global_step if committed else 0,
            "world_size": trainer.world_size,
            "accelerator": type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
            "classes": list(data.classes),
            "images": {part: len(index) for part, index in data.parts.items()},
            "bad_samples": sorted(data.bad_samples),
            "skipped_steps": trainer.lightning_module.skipped_steps,
            "train_images_per_second": self.train_images / self.train_seconds if self.train_seconds else None,
            "metrics": {},
            "confusion_matrix": None,
            "checkpoints": {},
            "starts": len(attempts),
            "seconds": accounting.totals(attempts),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
        if committed:
            last, best = committed[-1], (checkpoint.ranked(committed) or committed[-1:])[0]
            report["metrics"] = best.metrics
            report["confusion_matrix"] = _confusion_matrix(run_dir, best)
            report["checkpoints"] = {"best": _entry(run_dir, best), "last": _entry(run_dir, last)}
        return report


def _entry(run_dir: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "uri": storage.join(run_dir, checkpoint.FOLDER, manifest.file),
        "epoch": manifest.epoch,
        "global_step": manifest.global_step,
        manifest.monitor: manifest.value,
        "metrics": manifest.metrics,
    }


def _confusion_matrix(run_dir: str, manifest: Manifest) -> dict[str, Any] | None:
    try:
        cells = checkpoint.confusion_cells(run_dir, manifest)
    except JobError as error:
        log.warning("the report has no confusion matrix: %s", error)
        return None
    if cells is None or manifest.confusion is None:
        return None
    return confusion.as_json(cells, manifest.confusion.classes, checkpoint.confusion_uri(run_dir, manifest))


def _figures_of_training(uri: str) -> dict[str, Any]:
    """Figures of training in an earlier report, for an attempt that did not train since the run was complete."""
    if not storage.exists(uri):
        return {}
    try:
        earlier = msgspec.json.decode(read_limited(uri), type=_Figures)
    except (*MALFORMED, JobError) as error:
        log.warning("the figures of the earlier report %s cannot be read: %s", uri, error)
        return {}
    return {name: value for name, value in msgspec.structs.asdict(earlier).items() if value is not msgspec.UNSET}


class _Figures(msgspec.Struct):
    world_size: int | msgspec.UnsetType = msgspec.UNSET
    accelerator: str | msgspec.UnsetType = msgspec.UNSET
    bad_samples: list[str] | msgspec.UnsetType = msgspec.UNSET
    train_images_per_second: float | msgspec.UnsetType | None = msgspec.UNSET
    versions: dict[str, str] | msgspec.UnsetType = msgspec.UNSET


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def print_summary(result: Report) -> None:
    """Print metrics, where everything is, and the commands to type next."""
    run_dir, report = result.run_dir, result.content
    speed, checkpoints = report["train_images_per_second"], report["checkpoints"]
    rows: list[tuple[str, object]] = []
    if checkpoints:
        best, last = checkpoints["best"], checkpoints["last"]
        rows += [("best checkpoint, predicts", _metrics(best)), ("", best["uri"])]
        if last["uri"] == best["uri"]:
            rows.append(("last checkpoint", "the same"))
        else:
            rows += [("last checkpoint", _metrics(last)), ("", last["uri"])]
    rows += [
        ("epochs", f"{report['epochs']} ({report['global_step']} steps)"),
        ("speed", f"{speed:.1f} images/s training, {report['world_size']} process(es)" if speed else "-"),
        ("time", _where_time_went(report["seconds"], report["starts"])),
        ("run_dir", run_dir),
    ]
    print_table(["", ""], rows, title="Finished", fold=True)
    say("Next:")
    say(f"  python -m job tensorboard {shlex.quote(tensorboard_argument(run_dir))}")
    say(f"  python -m job predict --run_dir {shlex.quote(run_dir)} --input IMAGE_OR_FOLDER")


def _metrics(entry: dict[str, Any]) -> str:
    shown = "  ".join(
        f"{name} {entry['metrics'][f'val/{name}']:.4f}"
        for name in ("accuracy", "f1", "auroc", "mAP", "micro_f1", "macro_f1", "loss")
        if entry["metrics"].get(f"val/{name}") is not None
    )
    return f"epoch {entry['epoch']}: {shown or 'not validated'}"


def print_suggestions(result: dict[str, Any]) -> None:
    """Print the result of ``tune`` as options to type next."""
    say(f"The loss falls fastest at a learning rate of {result['lr']:.2g}:")
    say(f"  --model.lr {result['lr']:.2g}")
    if most := result["global_batch_size_at_most"]:
        each, processes = result["bytes_per_image"] / 1e6, result["world_size"]
        say(f"Training all layers needs {each:.1f} MB per image. Largest batch for {processes} such process(es):")
        say(f"  --data.global_batch_size {most}")


def _where_time_went(seconds: dict[str, float], starts: int) -> str:
    parts = "  ".join(
        f"{name.replace('lost', 'recomputed').replace('_', ' ')} {seconds[name]:.0f}"
        for name in ("step", "data_wait", "validation", "checkpoint_stall", "startup", "features", "lost", "other")
    )
    return f"goodput {seconds['goodput']:.0%} of {seconds['wall']:.0f} s in {starts} attempt(s): {parts}"
