"""Resolve a URI of data to its format, and to the sources behind it."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from job import redact, storage
from job.data.index.sources.base import ListingContext, Source, SourceFormat
from job.data.index.sources.folder import Folder
from job.data.index.sources.table import ParquetImages, Table
from job.data.index.sources.tar_archive import Tar
from job.data.index.sources.tfrecord import TFRecord
from job.data.index.sources.zip_archive import Zip
from job.errors import ConfigError, StorageError

__all__ = ["FORMATS", "ListingContext", "Location", "Source", "SourceFormat", "expand_braces", "format_of", "resolve"]

INDEX_FILE = "index.json"
LOOKUPS_IN_FLIGHT = 64
SAVED_INDEX = ".index"
"""Folder in which ``job index`` keeps the index of a folder."""
FORMATS: tuple[SourceFormat, ...] = (Tar(), Zip(), TFRecord(), Table(), ParquetImages(), Folder())
"""A new format is one line here; the first whose suffix fits counts."""
_BY_NAME = {format.name: format for format in FORMATS}


@dataclass(frozen=True)
class Location:
    """The meaning of one URI of data, from its spelling alone.

    Attributes:
        uri: the URI.
        format: of the data.
        is_saved_index: the URI names the index.json that ``job index`` wrote.
        index_uri: folder in which ``job index`` keeps the index: within a folder, or beside a file.
    """

    uri: str
    format: SourceFormat
    is_saved_index: bool
    index_uri: str

    def sources(self) -> list[Source]:
        """The sources behind the URI; a pattern (``{000..146}``, ``{a,b}``, ``*``) stands for several archives or
        tables.

        Raises:
            ConfigError: a pattern of folders or images.
            StorageError: an archive is not there.
        """
        uris = [match for expanded in expand_braces(self.uri) for match in _glob(expanded)]
        if not uris:
            raise StorageError(f"nothing matches {self.uri}. Check the spelling.")
        formats = [_format_by_suffix(uri) for uri in uris]
        if len(uris) > 1 and any(format.samples == "objects" for format in formats):
            raise ConfigError(
                f"{self.uri}: a pattern stands for archives, tables or .tfrecord files. Give several folders as a list."
            )
        if len(uris) == 1:
            return [formats[0].source(uris[0])]
        with ThreadPoolExecutor(LOOKUPS_IN_FLIGHT) as pool:
            lookups = [pool.submit(format.source, uri) for format, uri in zip(formats, uris, strict=True)]
            try:
                return [lookup.result() for lookup in lookups]
            finally:
                pool.shutdown(cancel_futures=True)


def resolve(uri: str) -> Location:
    """The meaning of a URI; makes no request."""
    format = _format_by_suffix(uri)
    if storage.basename(uri) == INDEX_FILE:
        return Location(uri, format, True, uri.removesuffix(f"/{INDEX_FILE}"))
    if format.samples == "objects":
        return Location(uri, format, False, storage.join(uri, SAVED_INDEX))
    path, query = redact.split_query(uri)
    return Location(uri, format, False, f"{re.sub(r'[{}*?]', '_', path)}.index{query}")


def format_of(source: Source) -> SourceFormat:
    """The format of a source.

    Raises:
        ValueError: no format has this name.
    """
    if source.kind not in _BY_NAME:
        raise ValueError(f"{source.kind[:100]!r} is no kind of source; known are {', '.join(_BY_NAME)}")
    return _BY_NAME[source.kind]


def expand_braces(pattern: str) -> list[str]:
    """``shard-{000..002}.tar`` → three names, ``{train,val}.tar`` → two, as in WebDataset and bash.

    Braces around anything else (``{v1}``) are part of the name.
    """
    braces = re.search(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if numbers:
        first, last = numbers[1], numbers[2]
        names = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        names = braces[1].split(",")
    rest = expand_braces(pattern[braces.end() :])
    return [pattern[: braces.start()] + name + tail for name in names for tail in rest]


def _format_by_suffix(uri: str) -> SourceFormat:
    name = storage.basename(uri).lower()
    return next(
        format
        for format in FORMATS
        if name.endswith(format.suffixes) or (format.numbered and re.search(format.numbered, name))
    )


def _glob(uri: str) -> list[str]:
    is_url = uri.startswith(redact.HTTP)  # whose ? begins a query
    return storage.glob(uri) if re.search(r"[*?]", uri) and not is_url else [uri]
