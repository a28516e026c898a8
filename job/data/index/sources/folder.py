"""Folders and prefixes: each sample is an object of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa

from job import storage
from job.data.index.sources.base import ROWS, ListingContext, Source, SourceFormat, is_image, listing_rows


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
        entries = (entry for page in storage.list_pages(source.uri) for entry in page)
        while chunk := list(itertools.islice(entries, ROWS)):
            keys, sizes, versions = zip(*chunk, strict=True)
            yield listing_rows(keys, number, [-1] * len(keys), sizes, versions)
