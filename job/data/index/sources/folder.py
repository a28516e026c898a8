"""Folders and prefixes: each sample is an object of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa

from job import storage
from job.data.index.left_out import NOT_UTF8, UNREADABLE
from job.data.index.names import is_hidden_name, is_utf8, printable
from job.data.index.sources.base import ROWS, ListingContext, Source, SourceFormat, is_image, listing_rows
from job.errors import DataError, StorageError
from job.storage import Entry


class Folder(SourceFormat):
    """A folder or prefix, or a single image."""

    name = "folder"
    suffixes = ("",)
    samples = "objects"

    def source(self, uri: str) -> Source:
        """The source at ``uri``, without a request."""
        return Source(uri, self.name)

    def rows(self, source: Source, number: int, context: ListingContext) -> Iterator[pa.Table]:
        """Everything below the folder; of a single image, the image in its folder."""
        if is_image(storage.basename(source.uri)):
            details = storage.info(source.uri)
            if details["type"] == "file":
                folder, key = storage.split(source.uri)
                context.sources[number] = Source(folder, self.name)
                yield listing_rows([key], number, [-1], [-1], [storage.version(details)])
                return
        entries = _entries(source.uri)
        while chunk := list(itertools.islice(entries, ROWS)):
            if usable := _usable(chunk, context):
                keys, sizes, versions, _ = zip(*usable, strict=True)
                yield listing_rows(keys, number, [-1] * len(keys), sizes, versions)


def _entries(uri: str) -> Iterator[Entry]:
    try:
        for page in storage.list_pages(uri, is_hidden_name, pass_over_unreadable=True):
            yield from page
    except StorageError as error:
        if not isinstance(error.__cause__, NotADirectoryError):
            raise
        raise DataError(
            f"{uri} is a file, and its suffix is that of no archive (.tar, .tar.gz, .zip, .tfrecord, …), table (.csv, "
            ".tsv, .jsonl, .parquet) or image. Rename, unpack or convert it."
        ) from error


def _usable(entries: list[Entry], context: ListingContext) -> list[Entry]:
    """The entries that can be read and indexed; others are counted."""
    usable = []
    for entry in entries:
        if entry.problem:
            context.left_out.add(entry.problem, entry.key)
            if entry.problem == UNREADABLE:
                context.unreadable.append(entry.key)
        elif is_utf8(entry.key):
            usable.append(entry)
        elif not entry.is_dir:
            context.left_out.add(NOT_UTF8, printable(entry.key))
            folder, _, name = entry.key.rpartition("/")
            if is_image(name) and not is_utf8(folder) and printable(folder) not in context.unreadable:
                context.unreadable.append(printable(folder))
    return usable
