"""``python -m job predict``: classify images with a checkpoint."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Literal

from job import redact, storage
from job.cli.parser import call_with_options
from job.cluster import ranks
from job.data.bad_samples import BadSampleLimit, BadSamples
from job.data.index.access import from_options, is_local_uri
from job.data.index.build import build
from job.data.index.file import load_index_info
from job.data.index.index import Index
from job.data.index.sources.columns import from_option as columns_from_option
from job.data.pixels import MAX_IMAGE_PIXELS
from job.errors import ConfigError
from job.process import logs
from job.process.cpus import available_cpus
from job.storage.local_cache import default_cache_dir, usable_cache_dir

FileFormat = Literal["jsonl", "parquet"]
SUFFIXES: dict[str, FileFormat] = {".jsonl": "jsonl", ".parquet": "parquet"}
INDEX_PART = "all"


def predict(args: list[str]) -> None:
    """Run ``python -m job predict ARGS``."""
    call_with_options("predict", main, args, positional=("run_dir", "input"))


def main(
    input: str,
    run_dir: str | None = None,
    ckpt: str | None = None,
    output: str | None = None,
    format: FileFormat = "parquet",
    top_k: int | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
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
        output: URI of a .jsonl or .parquet file, or of a folder. A folder is written in parts, by any number of
            processes; the same command continues what was interrupted.
        format: of the parts of a folder.
        top_k: number of most probable classes whose probabilities are written. Default: all.
        batch_size: images per batch.
        num_workers: number of decoding threads. Default: one per CPU core, divided among the ranks of the node.
        cache_dir: local folder for copies of archives that cannot be read in parts. Default: ~/.cache/job.
        max_bad_samples: unreadable images to tolerate: a number, or a share of the images ("0.5%"). Each is named, and
            is a row with an error; above the limit the command fails once all images are done.
        max_image_pixels: height times width of the largest image; a larger one is unreadable. Default: 178956970, as
            in Pillow.
        tta: test-time augmentation: hflip averages predictions over horizontal flips.
        allow: hosts and URI prefixes that a table may name although they are local or internal; a host or prefix,
            or a list of them.
        columns: name of the column of a table that names the images, as uri=NAME. Default: the usual names.
    """
    for name, value in (("batch_size", batch_size), ("max_image_pixels", max_image_pixels), ("top_k", top_k)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}.")
    limit = BadSampleLimit.parse(max_bad_samples, "--max_bad_samples")
    checkpoint_uri = ckpt or run_dir
    if checkpoint_uri is None:
        raise ConfigError("predict needs a checkpoint. Give --run_dir or --ckpt.")
    file_format = None if output is None else _file_format(output)
    if output is None and ranks.world_size() > 1:
        raise ConfigError("several processes need a folder for their predictions. Give --output FOLDER.")
    # torch takes seconds to import: not for --help or a misspelt option.
    from job.predict.predictor import load
    from job.predict.run import Reading, predict_to_file, predict_to_folder
    from job.predict.summary import Totals
    from job.predict.terminal import print_totals, show
    from job.predict.work import prepare

    access = from_options(allow, [input], "--allow")
    table_columns = columns_from_option(columns, "--columns")
    cache = usable_cache_dir(Path(cache_dir or default_cache_dir()).expanduser())
    predictor = load(checkpoint_uri, tta=tta, max_image_pixels=max_image_pixels)
    threads = max(available_cpus() // ranks.local_world_size(), 1) if num_workers is None else num_workers
    reading = Reading(batch_size, threads, str(cache))

    def list_images(folder: Path) -> None:
        build({INDEX_PART: [input]}, folder, str(cache), "images", access=access, columns=table_columns)

    if output is not None and file_format is None:
        request = {
            "input": redact.identity(input),
            "model": predictor.fingerprint,
            "format": format,
            "top_k": top_k,
            "tta": tta,
            "max_image_pixels": max_image_pixels,
            "columns": columns,
        }
        work, folder = prepare(output, request, list_images, batch_size, cache)
        sources = [source.uri for source in load_index_info(folder).sources]
        access.require_sources(sources, output, local=is_local_uri(input))
        index = Index(folder, INDEX_PART, access)
        own = sum(len(work.samples_of(part)) for part in range(ranks.rank(), work.parts, ranks.world_size()))
        show(predict_to_folder(predictor, index, reading, output, work, format, top_k), own)
        if ranks.rank():
            return
        totals = Totals.of_folder(output, work, format)
        totals.write(output, work, predictor.fingerprint)
    else:
        with tempfile.TemporaryDirectory(prefix="job-index-") as scratch:
            list_images(Path(scratch))
            index = Index(scratch, INDEX_PART, access)
            batches = predict_to_file(predictor, index, reading, output, file_format or "jsonl", top_k)
            totals = show(batches, len(index))
    print_totals(totals, predictor.classes)
    if output is not None:
        logs.report(f"{totals.images - len(totals.unreadable)} predictions in {output}", logging.INFO)
    BadSamples(limit, "--max_bad_samples").add(totals.unreadable, {INDEX_PART: totals.images})


def _file_format(output: str) -> FileFormat | None:
    """The format of a single file, by its suffix; None for a folder.

    Raises:
        ConfigError: the suffix is that of another format, or there are several processes.
    """
    suffix = Path(storage.basename(output)).suffix.lower()
    form = SUFFIXES.get(suffix)
    if form is None and suffix in (".csv", ".json", ".txt", ".tsv", ".xlsx", ".gz", ".zip"):
        raise ConfigError(f"--output {output}: predictions are written as .jsonl or .parquet, or into a folder.")
    if form is not None and ranks.world_size() > 1:
        raise ConfigError(f"several processes cannot write one file, --output {output}. Give a folder.")
    return form
