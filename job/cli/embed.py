"""``python -m job embed``: a vector per image, and the search for similar ones."""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from job import redact, storage
from job.cli.parser import call_with_options
from job.cli.predict import check_stdin
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

POSITIONAL = ("run_dir", "input")
PARQUET = ".parquet"
OTHER_FORMATS = (".csv", ".json", ".jsonl", ".txt", ".tsv", ".npy", ".npz", ".gz", ".zip")
MOST_SHOWN = 5000
"""Images that the projector shows in a browser, at most."""


@dataclass(frozen=True)
class BackboneOptions:
    """A pretrained backbone in place of a run.

    Args:
        backbone: architecture: a name of torchvision.models, or timm/NAME.
        weights: pretrained weights: DEFAULT (the library's own), none (random), the URI of a state dict or checkpoint,
            or a run_dir.
        pooling: how a vision transformer of timm makes one vector of an image's tokens: cls, mean, cls+mean, or auto
            (the architecture's own).
        mean: per-channel mean of the pretraining images, in [0, 1]. Default: that of the pretrained weights.
        std: per-channel standard deviation of the pretraining images. Default: that of the pretrained weights.
    """

    backbone: str | None = None
    weights: str = "DEFAULT"
    pooling: Literal["auto", "cls", "mean", "cls+mean"] = "auto"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


def embed(args: list[str]) -> None:
    """Run ``python -m job embed ARGS``."""
    call_with_options("embed", main, args, positional=POSITIONAL)


def main(
    input: str | None = None,
    run_dir: str | None = None,
    ckpt: str | None = None,
    model: BackboneOptions = BackboneOptions(),
    image_size: int | Literal["auto"] | None = None,
    resize: Literal["squash", "crop"] | None = None,
    output: str | None = None,
    vector_type: Literal["float32", "float16"] = "float32",
    labels: Literal["auto", "folders", "none"] = "auto",
    query: str | None = None,
    k: int = 10,
    projector: int = 0,
    batch_size: int = 64,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    num_workers: int | None = None,
    cache_dir: str | None = None,
    max_bad_samples: int | str = 0,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    from_stdin: bool = False,
    allow: str | list[str] | None = None,
    columns: str | None = None,
) -> None:
    """Compute the backbone's features of images, a vector each, and search for similar images.

    Args:
        input: URI of an image, a folder or prefix, a .zip, .tar or .tar.gz, shards, or a table.
        run_dir: folder of the run; its best checkpoint is used unless --ckpt names another one.
        ckpt: checkpoint file, RUN_DIR/checkpoints/last, or a run_dir, which means its best checkpoint.
        model: a pretrained backbone in place of a run.
        image_size: height and width of images for --model.backbone, in pixels; auto is that of the pretrained weights.
            Default: 224; a run has its own.
        resize: how images are made square for --model.backbone. Default: squash; a run has its own.
        output: URI of a .parquet file, or of a folder. A folder is written in parts, by any number of processes; the
            same command continues what was interrupted.
        vector_type: type of the numbers in --output.
        labels: auto keeps the labels of a table or archive, or of class folders with the names of the run's classes;
            folders takes all folders as classes. none ignores labels.
        query: image whose most similar ones are searched in --output, which is written first if there is an input.
        k: number of similar images.
        projector: images that the files for TensorBoard's projector in --output, a folder, show. 0: no such files.
        batch_size: images per batch.
        precision: bf16 computes by autocast, fp32 in float32. auto is bf16 where the hardware multiplies it natively.
        num_workers: number of decoding threads. Default: one per CPU core, divided among the ranks of the node.
        cache_dir: local folder for copies of archives that cannot be read in parts. Default: ~/.cache/job.
        max_bad_samples: unreadable images to tolerate: a number, or a share of the images ("0.5%"). Each is named, and
            is a row with an error; above the limit the command fails once all images are done.
        max_image_pixels: height times width of the largest image; a larger one is unreadable. Default: 178956970, as
            in Pillow.
        from_stdin: in place of an input, read a URI or path per line from standard input, and write the vectors to
            standard output as JSON lines, in this order and as they come.
        allow: hosts and URI prefixes that a table or a line may name although they are local or internal; a host or
            prefix, or a list of them.
        columns: names of the columns of a table, as uri=NAME,label=NAME. Default: the usual names.
    """
    limits = (("batch_size", batch_size), ("max_image_pixels", max_image_pixels), ("k", k), ("image_size", image_size))
    for name, value in limits:
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}.")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"--num_workers must be at least 0, not {num_workers}.")
    limit = BadSampleLimit.parse(max_bad_samples, "--max_bad_samples")
    source = ckpt or run_dir
    _check_model(source, model, image_size, resize)
    if from_stdin:
        check_stdin({"input": input, "output": output, "columns": columns, "query": query, "projector": projector})
    else:
        _check_output(input, output, query, projector)
    access = from_options(allow, [] if input is None else [input], "--allow")
    table_columns = columns_from_option(columns, "--columns")
    # torch takes seconds to import: not for --help or a misspelt option.
    from job.embed.embedder import of_backbone, of_checkpoint
    from job.embed.projector import write_projector
    from job.embed.run import Totals, embed_to_file, embed_to_folder, write_summary
    from job.embed.terminal import print_similar, show
    from job.model.image_size import own_image_size
    from job.predict.precision import describe_device
    from job.predict.run import Reading
    from job.predict.stream import answer_lines
    from job.predict.work import prepare

    cache = usable_cache_dir(Path(cache_dir or default_cache_dir()).expanduser())
    if source is not None:
        embedder = of_checkpoint(source, max_image_pixels, precision)
    else:
        assert model.backbone is not None, "checked above"
        embedder = of_backbone(
            model.backbone,
            model.weights,
            pooling=model.pooling,
            image_size=own_image_size(model.backbone, model.weights) if image_size == "auto" else image_size or 224,
            resize=resize or "squash",
            mean=model.mean,
            std=model.std,
            max_image_pixels=max_image_pixels,
            precision=precision,
        )
    why = " (chosen for this hardware; change it by --precision)" if precision == "auto" else ""
    log.info("%s, precision %s%s", describe_device(embedder.device), embedder.precision, why)
    threads = max(available_cpus() // ranks.local_world_size(), 1) if num_workers is None else num_workers
    if from_stdin:
        # A reader of its own, which is never closed: a thread that waits for a line holds its lock.
        stdin = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
        answer_lines(embedder, stdin, sys.stdout, access, batch_size, threads, limit=limit, results="vectors")
        return
    assert output is not None, "checked above"
    reading = Reading(batch_size, threads, str(cache))
    if input is not None:
        known = embedder.net.classes if source is not None else ()

        def list_images(folder: Path) -> None:
            build(
                {INDEX_PART: [input]},
                folder,
                str(cache),
                "classes" if labels == "folders" else "images",
                access=access,
                columns=table_columns,
                known_classes=known if labels == "auto" else None,
            )

        if output.lower().endswith(PARQUET):
            with tempfile.TemporaryDirectory(prefix="job-index-") as scratch:
                list_images(Path(scratch))
                index = Index(scratch, INDEX_PART, access)
                totals = show(embed_to_file(embedder, index, reading, output, vector_type), len(index))
        else:
            request = {
                "input": redact.identity(input),
                "model": embedder.fingerprint,
                "format": "parquet",
                "vector_type": vector_type,
                "labels": labels,
                "precision": embedder.precision,
                "max_image_pixels": max_image_pixels,
                "columns": columns,
            }
            adopted = ("precision",) if precision == "auto" else ()
            work, folder = prepare(output, request, list_images, batch_size, cache, adopted=adopted, kind="embeddings")
            if work.precision != embedder.precision:
                log.warning("precision %s, as of the other parts in %s", work.precision, output)
                embedder.precision = work.precision
            sources = [each.uri for each in load_index_info(folder).sources]
            access.require_sources(sources, output, local=is_local_uri(input))
            index = Index(folder, INDEX_PART, access)
            own = sum(len(work.samples_of(part)) for part in range(ranks.rank(), work.parts, ranks.world_size()))
            show(embed_to_folder(embedder, index, reading, output, work, vector_type), own)
            if ranks.rank():
                return
            totals = Totals.of_folder(output, work, embedder.width)
            write_summary(output, embedder, totals, work.parts, vector_type)
            if projector:
                count = write_projector(embedder, index, reading, output, projector)
                logs.report(
                    f"{count:,} images for TensorBoard's projector: tensorboard --logdir {output}", logging.INFO
                )
        logs.report(
            f"{totals.images - len(totals.unreadable):,} vectors of {embedder.width:,} numbers in {output}",
            logging.INFO,
        )
    if query is not None:
        print_similar(embedder, query, output, k)
    if input is not None:
        BadSamples(limit, "--max_bad_samples").add(totals.unreadable, {INDEX_PART: totals.images})


def _check_model(
    source: str | None, model: BackboneOptions, image_size: int | Literal["auto"] | None, resize: str | None
) -> None:
    if source is None and model.backbone is None:
        raise ConfigError("embed needs a backbone. Give --run_dir or --ckpt, or --model.backbone.")
    if source is None:
        if model.std is not None and not all(0 < value < math.inf for value in model.std):
            raise ConfigError(f"--model.std must be numbers above 0, not {list(model.std)}.")
        if model.mean is not None and not all(map(math.isfinite, model.mean)):
            raise ConfigError(f"--model.mean must be finite numbers, not {list(model.mean)}.")
        return
    given: dict[str, object] = {"model.backbone": model.backbone, "image_size": image_size, "resize": resize}
    given |= {"model.mean": model.mean, "model.std": model.std}
    given["model.weights"] = None if model.weights == "DEFAULT" else model.weights
    given["model.pooling"] = None if model.pooling == "auto" else model.pooling
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"the checkpoint of {source} describes its backbone. Leave --{name} out, or the run.")


def _check_output(input: str | None, output: str | None, query: str | None, projector: int) -> None:
    if input is None and query is None:
        raise ConfigError("embed needs images. Give --input, or --from_stdin, or --query to search in --output.")
    if output is None:
        raise ConfigError("embed needs a place for its vectors. Give --output FOLDER, or a .parquet file.")
    suffix = Path(storage.basename(output)).suffix.lower()
    if suffix in OTHER_FORMATS:
        raise ConfigError(f"--output {output}: vectors are written as .parquet, or into a folder.")
    if suffix == PARQUET and ranks.world_size() > 1:
        raise ConfigError(f"several processes cannot write one file, --output {output}. Give a folder.")
    if not 0 <= projector <= MOST_SHOWN:
        raise ConfigError(f"--projector must be from 0 to {MOST_SHOWN:,}, not {projector}.")
    if projector and (suffix == PARQUET or input is None):
        raise ConfigError("--projector needs an --input, and a folder as --output.")
