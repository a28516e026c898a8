"""TensorBoard's TEXT tab: the configuration, the data and the report of a run, as Markdown.

What others have named (classes, files) is shown as code, so that it can be no markup. TensorBoard itself removes
scripts from Markdown.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job import redact
from job.data.datamodule import ImageDataModule, image_data
from job.monitoring.report.writer import ReportWriter
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.process.terminal import escape

MOST_CHARACTERS = 20_000
"""Of a configuration."""
MOST_CLASSES = 100
MOST_NAMES = 20
"""Bad samples, sources and kinds of files left out that are listed."""


class RunText(Callback):
    """Writes ``run/configuration`` and ``run/data`` at the start, and ``run/report`` at the end, on rank 0.

    Args:
        config: the resolved configuration, as YAML.
        report: whose content is written at the end; it must come before this callback.
        logger: of TensorBoard.
    """

    def __init__(self, config: str, report: ReportWriter, logger: BucketTensorBoardLogger) -> None:
        self.config = config
        self.report = report
        self.logger = logger
        self._has_started = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the run starts from."""
        if trainer.is_global_zero:
            self._has_started = True
            self.logger.add_text("run/configuration", configuration_text(self.config), trainer.global_step)
            self.logger.add_text("run/data", data_text(image_data(trainer)), trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what came of it, unless the run was found finished."""
        if self._has_started and self.report.content is not None:
            content = msgspec.to_builtins(self.report.content)
            self.logger.add_text("run/report", report_text(content), trainer.global_step)


def configuration_text(config: str) -> str:
    """The configuration as a block of code."""
    text = redact.redact(config)
    more = len(text) - MOST_CHARACTERS
    return _block(text[:MOST_CHARACTERS]) + (f"\n\n{more:,} more characters are in config.yaml." if more > 0 else "")


def data_text(data: ImageDataModule) -> str:
    """Images per part and class, and what was left out."""
    counts = {part: index.class_counts() for part, index in data.parts.items()}
    parts = list(counts)
    lines = [f"{len(data.classes)} classes", "", _row(["images", *parts]), _row(["---", *["---:"] * len(parts)])]
    lines.append(_row(["all", *(f"{len(data.parts[part]):,}" for part in parts)]))
    for number, name in enumerate(data.classes[:MOST_CLASSES]):
        lines.append(_row([_code(name), *(f"{counts[part][number]:,}" for part in parts)]))
    if len(data.classes) > MOST_CLASSES:
        lines.append(_row([f"{len(data.classes) - MOST_CLASSES:,} more classes", *[""] * len(parts)]))
    sources = data.parts["train"].sources
    notes = [f"no {part}: {reason}" for part, reason in data.absent_parts.items()]
    notes += [f"left out: {each.count:,} {each.kind}" for each in data.left_out[:MOST_NAMES]]
    notes += [f"from {redact.identity(source.uri)}" for source in sources[:MOST_NAMES]]
    if len(sources) > MOST_NAMES:
        notes.append(f"and {len(sources) - MOST_NAMES:,} more sources")
    return "\n".join([*lines, "", *(f"- {_code(note)}" for note in notes)])


def report_text(report: dict[str, Any]) -> str:
    """The report: metrics of the best and the last checkpoint, speed, where the time went, bad samples."""
    checkpoints, seconds, speed = report["checkpoints"], report["seconds"], report["train_images_per_second"]
    lines = [f"{report['epochs']} epochs, {report['global_step']:,} steps, {report['world_size']} process(es)", ""]
    if checkpoints:
        best, last = checkpoints["best"], checkpoints["last"]
        lines += [_row(["", "best checkpoint", "last checkpoint"]), _row(["---", "---:", "---:"])]
        lines.append(_row(["epoch", str(best["epoch"]), str(last["epoch"])]))
        for name in best["metrics"]:
            if name.count("/") == 1:  # not those of each class
                lines.append(_row([_code(name), *(_number(each["metrics"].get(name)) for each in (best, last))]))
        lines += ["", f"- best: {_code(best['uri'])}", f"- last: {_code(last['uri'])}"]
    lines.append(f"- speed: {f'{speed:.1f} images/s' if speed else 'not measured'}")
    lines.append(f"- goodput {seconds['goodput']:.0%} of {seconds['wall']:,.0f} s in {report['starts']} attempt(s)")
    spent = ((name, value) for name, value in seconds.items() if name not in ("goodput", "wall"))
    lines += [f"    - {name.replace('lost', 'recomputed').replace('_', ' ')} {value:,.0f} s" for name, value in spent]
    bad = report["bad_samples"]
    lines.append(f"- unreadable images: {len(bad)}")
    lines += [f"    - {_code(name)}" for name in bad[:MOST_NAMES]]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "-"


def _code(text: str) -> str:
    """Text as code, also within a table."""
    return f"`{escape(redact.redact(text)).replace('`', 'ˋ').replace('|', '¦')[:200]}`"


def _block(text: str) -> str:
    return "\n".join(f"    {escape(line)}" for line in text.split("\n"))
