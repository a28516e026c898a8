"""``python -m job index``: list a data set ahead of training."""

from __future__ import annotations

import tempfile
from pathlib import Path

from job import storage
from job.cli.parser import call_with_options
from job.data.index.access import from_options
from job.data.index.build import build
from job.data.index.sources import INDEX_FILE, resolve
from job.data.index.sources.columns import from_option as columns_from_option
from job.data.index.store import publish_index
from job.process.terminal import say
from job.storage.local_cache import default_cache_dir, usable_cache_dir


def index(args: list[str]) -> None:
    """Run ``python -m job index ARGS``."""
    call_with_options("index", main, args, positional=("uri",))


def main(
    uri: str,
    output: str | None = None,
    cache_dir: str | None = None,
    allow: str | list[str] | None = None,
    columns: str | None = None,
) -> None:
    """List a data set ahead of training, and save the index.

    Args:
        uri: folder or prefix, archive, shards (NAME-{000..146}.tar), TFRecord files or table.
        output: folder for the index, for read-only data; pass its index.json as --data.root. Default: beside the
            data, where a fit of the same URI finds it.
        cache_dir: local folder for copies of archives that cannot be read in parts. Default: ~/.cache/job.
        allow: hosts and URI prefixes that a table may name although they are local or internal; a host or prefix, or
            a list of them.
        columns: names of a table's columns, as uri=NAME,label=NAME,split=NAME (any of them). Default: the usual names.
    """
    access = from_options(allow, [uri], "--allow")
    table_columns = columns_from_option(columns, "--columns")
    target = output or resolve(uri).index_uri
    cache = str(usable_cache_dir(Path(cache_dir or default_cache_dir()).expanduser()))
    with tempfile.TemporaryDirectory() as scratch:
        info = build(
            {"root": [uri]},
            Path(scratch),
            cache,
            "parts",
            request={"columns": str(table_columns)} if str(table_columns) else None,
            force_listing=True,
            access=access,
            columns=table_columns,
        )
        publish_index(Path(scratch), target)
    parts = ", ".join(f"{name} {part.rows:,}" for name, part in info.parts.items())
    say(f"{len(info.classes)} classes; images: {parts}; {storage.join(target, INDEX_FILE)}")
