"""Advice in the error of a run that diverged: the last good checkpoint and options to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from job import checkpoint, storage
from job.checkpoint.io import BackgroundCheckpointIO
from job.cluster import ranks
from job.errors import DivergedError


@contextlib.contextmanager
def last_checkpoint_named(run_dir: str, io: BackgroundCheckpointIO) -> Iterator[None]:
    """Add the last good checkpoint and the ways to continue to a :class:`~job.errors.DivergedError`.

    Raises:
        DivergedError: with all of it, the same on every rank.
    """
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"{error} {ranks.from_rank_zero(lambda: _advice(run_dir, io))}") from error


def _advice(run_dir: str, io: BackgroundCheckpointIO) -> str:
    try:
        io.wait()
        committed = checkpoint.manifests(run_dir)
    except Exception as error:  # whatever it is, the run ends by its divergence, on all ranks alike
        return f"Its checkpoints cannot be listed: {error}"
    change = "--trainer.gradient_clip_val=1, --trainer.precision=32-true or --model.nonfinite=skip"
    if not committed:
        return (
            f"There is no checkpoint yet. Start again with a lower learning rate (--model.lr), {change}; "
            "python -m job tune finds a learning rate."
        )
    uri = storage.join(run_dir, checkpoint.FOLDER, committed[-1].file)
    return (
        f"The last good checkpoint is {uri} (step {committed[-1].global_step}). The same command with {change} goes on "
        "from there. A lower learning rate (--model.lr) needs another --run_dir; "
        f"--init_from={uri} starts it from these weights."
    )
