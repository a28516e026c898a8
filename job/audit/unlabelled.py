"""Images of any layout as one part without labels."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from job import storage
from job.cluster import ranks
from job.data.datamodule import ImageDataModule
from job.data.index.build import build
from job.data.index.file import UNLABELLED_PART
from job.data.index.index import Index
from job.data.index.store import local_index, publish_index
from job.storage.local_cache import report_disk_full, usable_cache_dir


def open_without_labels(data: ImageDataModule, run_dir: str) -> None:
    """Give the data module one part of all images, whose labels are ignored; called on all ranks.

    Args:
        data: whose URIs are listed.
        run_dir: keeps the index, from which all nodes copy it.

    Raises:
        DataError: there are no images.
        StorageError: something cannot be listed or written.
    """
    data.cache_dir = usable_cache_dir(data.cache_dir)
    uris = [uri for some in data.uris.values() for uri in some]
    request = {"uris": uris, "labels": "none", "columns": str(data.columns)}
    name = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]

    def list_images() -> str:
        target = storage.join(run_dir, "index", name)
        with report_disk_full(data.cache_dir, "make the index"):
            scratch = tempfile.TemporaryDirectory(prefix=".index-", dir=data.cache_dir)
        with scratch as folder:
            build(
                {UNLABELLED_PART: uris},
                Path(folder),
                str(data.cache_dir),
                "images",
                access=data.access,
                columns=data.columns,
            )
            publish_index(Path(folder), target)
        return target

    folder = local_index(ranks.from_rank_zero(list_images), data.cache_dir)
    data.parts = {UNLABELLED_PART: Index(folder, UNLABELLED_PART, data.access)}
