"""What can be checked of a fit in seconds, before it waits for the other nodes."""

from __future__ import annotations

import contextlib
import itertools
import re
import uuid

from job import storage
from job.data.datamodule import ImageDataModule
from job.data.index.sources import expand_braces
from job.errors import StorageError
from job.model.backbone import build_skeleton
from job.model.config import ModelConfig
from job.redact import HTTP


def check(config: ModelConfig, data: ImageDataModule, run_dir: str, *, writes: bool) -> None:
    """Raise the error of a fit that cannot start: unknown backbone, missing data, no access.

    Of several archives the first one is looked up, unless a pattern has to be listed for it. The images are not listed.

    Args:
        config: hyperparameters of the model.
        data: the images.
        run_dir: folder of all results.
        writes: also check that this process may write to run_dir.

    Raises:
        JobError: a subclass says what is wrong.
    """
    build_skeleton(config.backbone, data.image_size)
    for uri in itertools.chain.from_iterable(data.uris.values()):
        first = expand_braces(uri)[0]
        if uri.startswith(HTTP) or not re.search("[*?]", first):
            storage.info(first)
    if writes:
        file = storage.join(run_dir, f"write-check-{uuid.uuid4().hex}")
        storage.write_bytes(file, b"")
        with contextlib.suppress(StorageError):  # a bucket with a retention policy lets nobody delete
            storage.remove(file)
