"""The table of an export on the terminal."""

from __future__ import annotations

from job.export.manifest import ExportManifest, FormatEntry
from job.monitoring.report.text import size
from job.process.terminal import print_table, say


def print_export(content: ExportManifest) -> None:
    """Print size, speed and equality of each format, beside the speed of the checkpoint in PyTorch."""
    check = content.check
    own = (
        "checkpoint in PyTorch",
        "",
        f"{check.checkpoint_milliseconds:.1f}",
        f"{check.checkpoint_images_per_second:.0f}",
        "",
        "",
    )
    rows = [own, *(_cells(entry) for entry in content.formats)]
    columns = ["format", "size", "ms/image", "images/s", "difference", "whole images"]
    print_table(columns, rows, title="exported", right=columns[1:])
    origin = {"run": "validation images of the run", "data": "images of --data", "generated": "generated images"}
    say(
        f"difference: largest of a probability from the checkpoint's, on {check.compared} {origin[check.images]}. "
        f"images/s: in batches of {check.batch_size}, on {check.threads} CPU threads."
    )
    for entry in content.formats:
        if result := entry.quantization:
            loss = "not measured" if result.loss is None else f"{result.loss:.4f} on {result.validation_images} images"
            say(f"int8: loss of {result.metric} {loss}")


def _cells(entry: FormatEntry) -> tuple[str, ...]:
    resized = "" if entry.resize_difference is None else f"{entry.resize_difference:.2g}"
    speed = (f"{entry.milliseconds:.1f}", f"{entry.images_per_second:.0f}")
    return entry.format, size(entry.bytes), *speed, f"{entry.difference:.2g}", resized
