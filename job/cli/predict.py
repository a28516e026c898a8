"""``python -m job predict``: classify images with a checkpoint."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from job import redact, storage
from job.cli.parser import call_with_options, function_parser
from job.cluster import ranks
from job.data.bad_samples import BadSampleLimit, BadSamples
from job.data.index.access import from_options, is_local_uri
from job.data.index.build import build
from job.data.index.file import UNLABELLED_PART as INDEX_PART
from job.data.index.file import load_index_info
from job.data.index.index import Index
from job.data.index.sources.columns import from_option as columns_from_option
from job.data.pixels import MAX_IMAGE_PIXELS
from job.errors import ConfigError
from job.process import logs
from job.process.cpus import available_cpus
from job.storage.local_cache import default_cache_dir, usable_cache_dir

log = logging.getLogger(__name__)

FileFormat = Literal["jsonl", "parquet"]
SUFFIXES: dict[str, FileFormat] = {".jsonl": "jsonl", ".parquet": "parquet"}
EVALUATION_FILE = "evaluation.json"
POSITIONAL = ("run_dir", "input")


def predict(args: list[str]) -> None:
    """Run ``python -m job predict ARGS``."""
    call_with_options("predict", main, args, positional=POSITIONAL)


def check(verb: str, args: list[str], *, writes: bool) -> None:
    """Check the options of ``python -m job predict ARGS``, its checkpoint, and access to its images and output."""
    options = function_parser(verb, main, POSITIONAL).parse_args(args)
    ckpt = options.ckpt or options.run_dir
    if None in (options.input, ckpt, options.output) or _file_format(options.output) is not None:
        return  # several processes refuse these at once
    from job.check.start import check_prediction

    check_prediction(options.input, ckpt, options.output, writes=writes)


def main(
    input: str | None = None,
    run_dir: str | None = None,
    ckpt: str | None = None,
    output: str | None = None,
    format: FileFormat = "parquet",
    top_k: int | None = None,
    labels: Literal["auto", "none"] = "auto",
    batch_size: int = 64,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    compile: bool = False,
    num_workers: int | None = None,
    cache_dir: str | None = None,
    max_bad_samples: int | str = 0,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    tta: Literal["none", "hflip"] = "none",
    from_stdin: bool = False,
    allow: str | list[str] | None = None,
    columns: str | None = None,
    calibrated: Literal["auto", "true", "false"] = "auto",
    reject_below: float | None = None,
    target_precision: float | None = None,
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
        labels: auto compares the predictions with the labels that the images have, if any: in a table or archive, or
            as class folders. none ignores them.
        batch_size: images per batch.
        precision: bf16 computes by autocast, fp32 in float32. auto is bf16 where the hardware multiplies it natively,
            as in training and validation.
        compile: compile the network by torch.compile, which takes a minute and a C++ compiler.
        num_workers: number of decoding threads. Default: one per CPU core, divided among the ranks of the node.
        cache_dir: local folder for copies of archives that cannot be read in parts. Default: ~/.cache/job.
        max_bad_samples: unreadable images to tolerate: a number, or a share of the images ("0.5%"). Each is named, and
            is a row with an error; above the limit the command fails once all images are done.
        max_image_pixels: height times width of the largest image; a larger one is unreadable. Default: 178956970, as
            in Pillow.
        tta: test-time augmentation: hflip averages predictions over horizontal flips.
        from_stdin: in place of an input, read a URI or path per line from standard input, and write the predictions to
            standard output as JSON lines, in this order and as they come.
        allow: hosts and URI prefixes that a table or a line may name although they are local or internal; a host or
            prefix, or a list of them.
        columns: names of the columns of a table, as uri=NAME,label=NAME. Default: the usual names.
        calibrated: auto calibrates probabilities where the checkpoint has a calibration; true requires one; false
            leaves them as the network computes them.
        reject_below: mark predictions whose probability is lower as rejected (selective classification).
        target_precision: the same with the threshold at which this share of the accepted validation predictions was
            right, such as 0.95.
    """
    for name, value in (("batch_size", batch_size), ("max_image_pixels", max_image_pixels), ("top_k", top_k)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}.")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"--num_workers must be at least 0, not {num_workers}.")
    limit = BadSampleLimit.parse(max_bad_samples, "--max_bad_samples")
    checkpoint_uri = ckpt or run_dir
    if checkpoint_uri is None:
        raise ConfigError("predict needs a checkpoint. Give --run_dir or --ckpt.")
    if from_stdin:
        check_stdin({"input": input, "output": output, "columns": columns})
    elif input is None:
        raise ConfigError("predict needs images. Give --input, or --from_stdin.")
    file_format = None if output is None else _file_format(output)
    if output is None and ranks.world_size() > 1:
        raise ConfigError("several processes need a folder for their predictions. Give --output FOLDER.")
    access = from_options(allow, [] if input is None else [input], "--allow")
    table_columns = columns_from_option(columns, "--columns")
    # torch takes seconds to import: not for --help or a misspelt option.
    from job.predict.evaluator import evaluator_of
    from job.predict.precision import describe_device
    from job.predict.predictor import load
    from job.predict.run import Reading, predict_to_file, predict_to_folder
    from job.predict.stream import answer_lines
    from job.predict.summary import Totals
    from job.predict.terminal import print_rejected, print_totals, show
    from job.predict.work import prepare

    cache = usable_cache_dir(Path(cache_dir or default_cache_dir()).expanduser())
    predictor = load(
        checkpoint_uri,
        tta=tta,
        max_image_pixels=max_image_pixels,
        precision=precision,
        calibrated=calibrated,
        reject_below=reject_below,
        target_precision=target_precision,
    )
    why = " (chosen for this hardware; change it by --precision)" if precision == "auto" else ""
    log.info("%s, precision %s%s", describe_device(predictor.device), predictor.precision, why)
    threads = max(available_cpus() // ranks.local_world_size(), 1) if num_workers is None else num_workers
    in_parts = output is not None and file_format is None
    if compile and not in_parts:
        predictor.compile(batch_size)
    if input is None:
        # A reader of its own, which is never closed: a thread that waits for a line holds its lock.
        stdin = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
        answer_lines(predictor, stdin, sys.stdout, access, batch_size, threads, top_k=top_k, limit=limit)
        return
    reading = Reading(batch_size, threads, str(cache))
    known = predictor.classes if labels == "auto" else None

    def list_images(folder: Path) -> None:
        build(
            {INDEX_PART: [input]},
            folder,
            str(cache),
            "images",
            access=access,
            columns=table_columns,
            known_classes=known,
        )

    if output is not None and file_format is None:
        request: dict[str, str | int | float | None] = {
            "input": redact.identity(input),
            "model": predictor.fingerprint,
            "format": format,
            "top_k": top_k,
            "labels": labels,
            "precision": predictor.precision,
            "tta": tta,
            "max_image_pixels": max_image_pixels,
            "columns": columns,
        }
        # Absent where they do nothing: folders of earlier versions lack them, and are continued.
        if predictor.calibrated:
            request["calibrated"] = "true"
        if predictor.reject_below is not None:
            request["reject_below"] = predictor.reject_below
        adopted = ("precision",) if precision == "auto" else ()
        work, folder = prepare(output, request, list_images, batch_size, cache, adopted=adopted)
        if work.precision != predictor.precision:
            log.warning("precision %s, as of the other parts in %s", work.precision, output)
            predictor.precision = work.precision
        if compile:
            predictor.compile(batch_size)
        sources = [source.uri for source in load_index_info(folder).sources]
        access.require_sources(sources, output, local=is_local_uri(input))
        index = Index(folder, INDEX_PART, access)
        own = sum(len(work.samples_of(part)) for part in range(ranks.rank(), work.parts, ranks.world_size()))
        show(predict_to_folder(predictor, index, reading, output, work, format, top_k), own)
        if ranks.rank():
            return
        evaluator = evaluator_of(predictor, index, top_k)
        totals = Totals.of_folder(output, work, format, evaluator)
        evaluation = None if evaluator is None else evaluator.compute()
        if evaluator is not None and evaluation is not None:
            evaluator.write(storage.join(output, EVALUATION_FILE), evaluation)
        totals.write(output, work, predictor, None if evaluation is None else evaluation.metrics)
    else:
        with tempfile.TemporaryDirectory(prefix="job-index-") as scratch:
            list_images(Path(scratch))
            index = Index(scratch, INDEX_PART, access)
            batches = predict_to_file(predictor, index, reading, output, file_format or "jsonl", top_k)
            evaluator = evaluator_of(predictor, index)
            totals = show(batches if evaluator is None else evaluator.watch(batches), len(index))
            evaluation = None if evaluator is None else evaluator.compute()
            if evaluator is not None and evaluation is not None and output is not None:
                evaluator.write(f"{output.removesuffix(Path(output).suffix)}.{EVALUATION_FILE}", evaluation)
    print_totals(totals, predictor.classes)
    if predictor.reject_below is not None:
        print_rejected(totals, predictor.reject_below)
    if evaluator is not None and evaluation is not None:
        evaluator.print(evaluation)
    if output is not None:
        logs.report(f"{totals.images - len(totals.unreadable)} predictions in {output}", logging.INFO)
    BadSamples(limit, "--max_bad_samples").add(totals.unreadable, {INDEX_PART: totals.images})


def check_stdin(others: Mapping[str, str | int | None]) -> None:
    """Refuse what cannot be combined with ``--from_stdin``.

    Args:
        others: options that cannot, by name.

    Raises:
        ConfigError: there is such an option, there are several processes, or there is no standard input.
    """
    for name, value in others.items():
        if value:
            raise ConfigError(
                f"--from_stdin reads URIs from standard input and writes to standard output. Leave --{name} out."
            )
    if ranks.world_size() > 1:
        raise ConfigError("--from_stdin needs one process. Give a table of the URIs by --input, and --output FOLDER.")
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError("--from_stdin: there is no standard input.")


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
