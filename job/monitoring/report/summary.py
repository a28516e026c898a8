"""The summary of a run that a person reads on the terminal."""

from __future__ import annotations

import shlex
from typing import Any

from job.monitoring.report.content import CheckpointEntry, Report, ReportContent
from job.monitoring.report.files import page_uri
from job.monitoring.report.text import METRICS, TIMES
from job.monitoring.tensorboard.event_folders import tensorboard_argument
from job.process.terminal import print_table, say

TITLES = {
    "running": "Running",
    "finished": "Finished",
    "stopped": "Stopped; the same command continues the run",
    "failed": "Failed",
}


def print_summary(result: Report) -> None:
    """Print metrics, where everything is, and the commands to type next."""
    print_results(result.typed_content, result.run_dir)
    run_dir = result.run_dir
    say("Next:")
    say(f"  python -m job tensorboard {shlex.quote(tensorboard_argument(run_dir))}")
    say(f"  python -m job predict {shlex.quote(run_dir)} IMAGE_OR_FOLDER")
    say(f"  python -m job report {shlex.quote(run_dir)}")


def print_results(report: ReportContent, run_dir: str) -> None:
    """Print metrics, speed, time and advice.

    Args:
        report: of the run.
        run_dir: where the run is now; the report names where it was written.
    """
    rows: list[tuple[str, object]] = []
    if report.failure:
        rows.append(("failure", report.failure))
    if report.checkpoints:
        best, last = report.checkpoints.best, report.checkpoints.last
        rows += [("best checkpoint, predicts", _metrics(best)), ("", best.uri)]
        if last.uri == best.uri:
            rows.append(("last checkpoint", "the same"))
        else:
            rows += [("last checkpoint", _metrics(last)), ("", last.uri)]
    speed = report.train_images_per_second
    if report.initial_weights:
        rows.append(("initial weights", report.initial_weights.uri))
    rows += [
        ("epochs", f"{report.epochs} ({report.global_step} steps)"),
        ("speed", f"{speed:.1f} images/s training, {report.world_size} process(es)" if speed else "-"),
        ("time", _where_time_went(report.seconds, report.attempt_count)),
        ("run_dir", run_dir),
        ("report", page_uri(run_dir)),
    ]
    rows += [("advice", f"{each.message} {each.suggestion}") for each in report.advice]
    print_table(["", ""], rows, title=TITLES[report.status])


def _metrics(entry: CheckpointEntry) -> str:
    values = ((name, entry.metrics.get(f"val/{name}")) for name in METRICS)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in values if value is not None)
    return f"epoch {entry.epoch}: {shown or 'not validated'}"


def print_suggestions(result: dict[str, Any]) -> None:
    """Print the result of ``tune`` as options to type next."""
    say(f"The loss falls fastest at a learning rate of {result['lr']:.2g}:")
    say(f"  --model.lr {result['lr']:.2g}")
    if most := result["global_batch_size_at_most"]:
        each, processes = result["bytes_per_image"] / 1e6, result["world_size"]
        say(f"Training all layers needs {each:.1f} MB per image. Largest batch for {processes} such process(es):")
        say(f"  --data.global_batch_size {most}")


def _where_time_went(seconds: dict[str, float], attempts: int) -> str:
    goodput, wall = seconds.get("goodput", 0.0), seconds.get("wall", 0.0)
    parts = ", ".join(f"{title} {seconds.get(name, 0.0):.0f} s" for name, title in TIMES.items())
    return f"goodput {goodput:.0%} of {wall:.0f} s in {attempts} attempt(s): {parts}"
