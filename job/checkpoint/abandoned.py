"""Checkpoints that a run abandoned when it went back to its best one (``--resume best``).

``<run_dir>/checkpoints/abandoned-NNN.json`` names those that were newer than the best one. From this single write on
the run does not resume from them, rank them or report them; they are deleted after its next checkpoint. The file also
holds a hash of the configuration: a restart of the same command has the same one, and does not go back again. The file
is never changed, so that a bucket which forbids overwriting takes it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from job import storage, typed
from job.checkpoint.manifest import MAX_BYTES, Name, Sha256
from job.errors import CheckpointError, NewerFormatError
from job.storage.format_version import MALFORMED, Unversioned, format_version
from job.storage.json_files import read_limited

FORMAT = 1
FILE_PATTERN = r"^abandoned-([0-9]{3,9})\.json\Z"


class StepBack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One return of a run to its best checkpoint.

    Attributes:
        configuration: SHA-256 of the configuration that the run continued with, in hexadecimal.
        resumed: file of the checkpoint that it continued from.
        abandoned: files of the checkpoints that were newer.
        format: version of this file.
    """

    configuration: Sha256
    resumed: Name
    abandoned: Annotated[list[Name], Meta(max_length=100_000)]
    format: Annotated[int, Meta(ge=1)] = FORMAT


def read_steps_back(folder: str, names: Collection[str]) -> list[StepBack]:
    """All steps back of a run, oldest first.

    Args:
        folder: of the checkpoints.
        names: of the files in it.

    Raises:
        CheckpointError: a file is damaged.
        NewerFormatError: a newer version of job wrote it.
        StorageError: it cannot be read.
    """
    numbers = sorted((int(match[1]), name) for name in names if (match := re.match(FILE_PATTERN, name)))
    return [_read(storage.join(folder, name)) for _, name in numbers]


def next_file_name(names: Iterable[str]) -> str:
    """The name after all of these: a user may have deleted an earlier file.

    Args:
        names: of the files in the folder of the checkpoints.
    """
    last = max((int(match[1]) for name in names if (match := re.match(FILE_PATTERN, name))), default=0)
    return f"abandoned-{last + 1:03d}.json"


def encode(step_back: StepBack) -> bytes:
    """The content of a file."""
    return msgspec.json.format(msgspec.json.encode(step_back), indent=2)


def _read(uri: str) -> StepBack:
    content = read_limited(uri, MAX_BYTES)
    try:
        if (version := format_version(content, Unversioned)) > FORMAT:
            raise NewerFormatError(
                f"{uri} was written by a newer version of job: it has format {version}, this version reads formats up "
                f"to {FORMAT}. Upgrade job."
            )
        return typed.from_json(content, StepBack)
    except MALFORMED as error:
        raise CheckpointError(
            f"{uri} is damaged: {error}. It names checkpoints that this run has abandoned. Restore it, or delete it; "
            "then they count again."
        ) from error
