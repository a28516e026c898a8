"""A table of the images that remain, for ``--data.root`` of a fit."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from job import redact, storage
from job.audit.pool import ROWS, ImagePool
from job.audit.search import Samples
from job.data.index.access import is_local_uri
from job.data.index.index import Index
from job.data.index.sources import format_of
from job.errors import ConfigError
from job.process import temporary

OPTION = "--audit.write_manifest"
Row = tuple[str, list[str], str]
"""URI, class names and part of an image."""


def require_nameable(uri: str, indexes: Collection[Index]) -> None:
    """Check that a table at ``uri`` can name the images, before anything is computed.

    Args:
        uri: of the table.
        indexes: of the images.

    Raises:
        ConfigError: it cannot.
    """
    for index in indexes:
        for source in index.sources:
            if format_of(source).samples == "elsewhere":
                continue  # a table, whose images lie in sources of their own
            if format_of(source).samples != "objects":
                raise ConfigError(
                    f"{OPTION}: a table cannot name images in {source.uri}: it holds several. Unpack it into a folder, "
                    "or leave this option out."
                )
            if redact.is_redacted(source.uri):
                raise ConfigError(f"{OPTION}: images of {source.uri} cannot be named without their credentials.")
            if is_local_uri(source.uri) and not is_local_uri(uri):
                raise ConfigError(f"{OPTION} {uri}: a table in a bucket cannot name local files. Write it to a folder.")
        if index.has_several_labels and PurePosixPath(uri).suffix.lower() == ".csv":
            raise ConfigError(f"{OPTION} {uri}: images have several labels. Use .jsonl or .parquet.")


def write_manifest(uri: str, pool: ImagePool, left_out: Collection[int], before_write: Callable[[], None]) -> int:
    """Write the table; returns the number of its rows.

    Args:
        uri: of the table.
        pool: the images.
        left_out: samples that the table does not name.
        before_write: called immediately before the write; raises if this job may not write.

    Raises:
        StorageError: it cannot be written.
    """
    keep = np.ones(len(pool), np.bool_)
    keep[list(left_out)] = False
    samples = np.flatnonzero(keep)
    scratch = temporary.folder("audit")
    try:
        path = scratch / PurePosixPath(uri).name
        suffix = path.suffix.lower()
        write = {".csv": _write_csv, ".jsonl": _write_json_lines, ".parquet": _write_parquet}[suffix]
        write(path, _rows(pool, samples), pool.has_several_labels)
        storage.upload(path, uri, before_write)
    finally:
        temporary.remove(scratch)
    return len(samples)


def _rows(pool: ImagePool, samples: Samples) -> Iterator[list[Row]]:
    for start in range(0, len(samples), ROWS):
        block = samples[start : start + ROWS]
        uris = [os.path.abspath(uri) if _is_path(uri) else uri for uri in pool.uris(block)]  # noqa: PTH100
        parts = [pool.part_of(sample)[0] for sample in block.tolist()]
        yield list(zip(uris, pool.label_names(block), parts, strict=True))


def _is_path(uri: str) -> bool:
    return is_local_uri(uri) and "://" not in uri


def _write_csv(path: Path, blocks: Iterator[list[Row]], several_labels: bool) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "label", "split"])
        for block in blocks:
            writer.writerows((uri, *labels[:1], part) for uri, labels, part in block)


def _write_json_lines(path: Path, blocks: Iterator[list[Row]], several_labels: bool) -> None:
    with path.open("wb") as file:
        for block in blocks:
            for uri, labels, part in block:
                label = labels if several_labels else labels[0]
                file.write(msgspec.json.encode({"uri": uri, "label": label, "split": part}) + b"\n")


def _write_parquet(path: Path, blocks: Iterator[list[Row]], several_labels: bool) -> None:
    label = pa.list_(pa.string()) if several_labels else pa.string()
    schema = pa.schema([("uri", pa.string()), ("label", label), ("split", pa.string())])
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for block in blocks:
            uris, labels, parts = zip(*block, strict=True)
            values = list(labels) if several_labels else [each[0] for each in labels]
            writer.write_table(pa.table([list(uris), values, list(parts)], schema=schema))
