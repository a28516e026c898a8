"""``python -m job predict``: classify images with a checkpoint."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from job import storage
from job.cli.parser import call_with_options
from job.cluster import ranks
from job.data.bad_samples import BadSample, BadSampleLimit, BadSamples
from job.data.index.access import from_options
from job.data.index.build import build
from job.data.index.index import Index
from job.data.index.sources.columns import from_option as columns_from_option
from job.data.pixels import MAX_IMAGE_PIXELS
from job.errors import ConfigError
from job.process import logs
from job.process.progress import Progress
from job.process.terminal import print_table, say
from job.storage.local_cache import default_cache_dir, usable_cache_dir

ROWS_SHOWN = 20
"""Predictions shown on the terminal; all of them go to --output."""


def predict(args: list[str]) -> None:
    """Run ``python -m job predict ARGS``."""
    call_with_options("predict", main, args, positional=("run_dir", "input"))


def main(
    input: str,
    run_dir: str | None = None,
    ckpt: str | None = None,
    output: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    cache_dir: str | None = None,
    max_bad_samples: int | str = 0,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    tta: Literal["none", "hflip"] = "none",
    allow: str | list[str] | None = None,
    columns: str | None = None,
) -> None:
    """Classify one image, a folder, an archive or everything under a bucket prefix.

    Args:
        input: URI of an image, a folder or prefix, a .zip, .tar or .tar.gz, shards, or a table.
        run_dir: folder of the run; its best checkpoint is used unless --ckpt names another one.
        ckpt: checkpoint file, RUN_DIR/checkpoints/last, or a run_dir, which means its best checkpoint.
        output: URI of a JSON lines file to write: one object per readable image. With several processes
            (torchrun), each writes its part, ``….part-RANK-of-WORLD``.
        batch_size: images per batch.
        num_workers: number of loader processes.
        cache_dir: local folder for copies of archives that cannot be read in parts. Default: ~/.cache/job.
        max_bad_samples: unreadable images to tolerate per process: a number, or a share of the images ("0.5%"). Each
            is named; above the limit the command fails.
        max_image_pixels: height times width of the largest image; a larger one is unreadable. Default: 178956970, as
            in Pillow.
        tta: test-time augmentation: hflip averages predictions over horizontal flips.
        allow: hosts and URI prefixes that a table may name although they are local or internal; a host or prefix,
            or a list of them.
        columns: name of the column of a table that names the images, as uri=NAME. Default: the usual names.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch_size must be at least 1, not {batch_size}.")
    if max_image_pixels < 1:
        raise ConfigError(f"--max_image_pixels must be at least 1, not {max_image_pixels}.")
    bad = BadSamples(BadSampleLimit.parse(max_bad_samples, "--max_bad_samples"), "--max_bad_samples")
    checkpoint_uri = ckpt or run_dir
    if checkpoint_uri is None:
        raise ConfigError("predict needs a checkpoint. Give --run_dir or --ckpt.")
    # torch takes seconds to import: not for --help or a misspelt option.
    from job.predict import load, predict_index

    rank, world_size = ranks.rank(), ranks.world_size()
    access = from_options(allow, [input], "--allow")
    table_columns = columns_from_option(columns, "--columns")
    cache = str(usable_cache_dir(Path(cache_dir or default_cache_dir()).expanduser()))
    predictor = load(checkpoint_uri, tta=tta, max_image_pixels=max_image_pixels)
    unreadable: list[BadSample] = []
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        build({"all": [input]}, Path(folder), cache, "images", access=access, columns=table_columns)
        index = Index(folder, "all", access)
        share = len(range(rank, len(index), world_size))
        with Progress("predict", "images", share, is_shown=rank == 0) as progress:
            for sample, prediction in predict_index(
                predictor, index, batch_size=batch_size, num_workers=num_workers, cache_dir=cache, unreadable=unreadable
            ):
                lines.append({"uri": index.uri(sample), **prediction.as_json()})
                progress.update(min(len(lines) + len(unreadable), share))
    if rank == 0:
        _print_table(lines, predictor.classes)
    if output is not None:
        part = output if world_size == 1 else f"{output}.part-{rank:05d}-of-{world_size:05d}"
        storage.write_text(part, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        logs.report(f"{len(lines)} predictions in {part}", logging.INFO)
    bad.add(unreadable, {index.part: len(lines) + len(unreadable)})


def _print_table(lines: list[dict[str, Any]], classes: Sequence[str]) -> None:
    labels = [line["labels"] if "labels" in line else [line["label"]] for line in lines]
    rows = []
    for line, names in zip(lines[:ROWS_SHOWN], labels, strict=False):
        chances = ", ".join(f"{line['probabilities'][name]:.4f}" for name in names)
        rows.append((line["uri"], ", ".join(names) or "-", chances or "-"))
    print_table(["image", "class", "probability"], rows, right=["probability"])
    if len(lines) > ROWS_SHOWN:
        totals = Counter(name for names in labels for name in names)
        counts = ", ".join(f"{name} {totals[name]}" for name in classes)
        say(f"… and {len(lines) - ROWS_SHOWN} more. In all: {counts}")
