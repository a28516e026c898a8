"""The checkpoint whose weights a run started from (``--init_from``), as checkpoints and the report name it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from job import checkpoint, redact, typed
from job.checkpoint.manifest import Sha256
from job.errors import CheckpointError, ConfigError

INITIAL_WEIGHTS_KEY = "initial_weights"
"""Key of a checkpoint of the new run: :class:`InitialWeights`."""


class InitialWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint of another run that this run started from.

    Attributes:
        uri: its file, without credentials.
        sha256: SHA-256 of the file, in hexadecimal.
    """

    uri: Annotated[str, Meta(min_length=1, max_length=65_536)]
    sha256: Sha256


def require_other_run(init_from: str, run_dir: str) -> None:
    """Check that ``--init_from`` does not refer to the run itself.

    Raises:
        ConfigError: it does.
    """
    if _folder(init_from) == _folder(run_dir):
        raise ConfigError(
            f"--init_from {init_from} is in the --run_dir of this run, which continues from its own checkpoints. Leave "
            "out --init_from, or choose another --run_dir."
        )


def initial_checkpoint(init_from: str) -> str:
    """The file that ``--init_from`` refers to.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    try:
        return checkpoint.resolve(init_from)
    except CheckpointError as error:
        raise CheckpointError(
            f"--init_from: {error} It takes the run_dir of a run, RUN_DIR/checkpoints/last or a checkpoint file; other "
            "weights are given by --model.weights."
        ) from error


def saved_initial_weights(saved: dict[str, Any]) -> InitialWeights | None:
    """The entry in a checkpoint of the new run; None in a run that did not start from another one.

    Raises:
        CheckpointError: it is damaged.
    """
    entry = saved.get(INITIAL_WEIGHTS_KEY)
    if entry is None:
        return None
    try:
        return typed.from_builtins(entry, InitialWeights)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"the checkpoint's entry {INITIAL_WEIGHTS_KEY!r} is damaged: {error}") from error


def require_same_start(saved: InitialWeights | None, init_from: str) -> None:
    """Check that a run which resumes with ``--init_from`` started from there; the files need not exist any more.

    Raises:
        CheckpointError: it started from elsewhere.
    """
    name = _absolute if init_from.endswith(checkpoint.SUFFIX) else _folder
    if saved is not None and name(saved.uri) == name(init_from):
        return
    started = "did not start from another run's weights" if saved is None else f"started from {saved.uri}"
    raise CheckpointError(
        f"--init_from {init_from} would have no effect: the run in this run_dir {started}, and continues from its own "
        "checkpoints. Choose another --run_dir for a new run, or leave out --init_from to continue this one."
    )


def _folder(uri: str) -> str:
    """The run_dir that a URI of a run_dir, of its best or last checkpoint, or of a file among its checkpoints is in."""
    uri = re.sub(rf"/{checkpoint.FOLDER}/(best|last|[^/]+\{checkpoint.SUFFIX})/*\Z", "", uri)
    return _absolute(uri)


def _absolute(uri: str) -> str:
    # Without credentials: a checkpoint has *** in their place, and a restart may have others.
    return redact.identity(uri).rstrip("/") if "://" in uri else str(Path(uri).resolve())
