"""Start TensorBoard on runs, wherever they are stored."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

from job.errors import ConfigError
from job.monitoring.tensorboard.event_folders import short_names

RELOAD_SECONDS = 5
BUCKET_RELOAD_SECONDS = 10
"""Seconds between two reloads of runs in a bucket, which has new events every 10 s at most."""


@contextlib.contextmanager
def serve(run_dirs: Sequence[str], *, host: str, port: int | None) -> Iterator[tuple[str, list[str]]]:
    """Run TensorBoard in threads of this process while the context lasts.

    Args:
        run_dirs: run_dirs, folders of run_dirs, or folders of event files.
        host: address to listen on.
        port: port to listen on; 0: any free one; None: 6006, or the next that is free.

    Yields:
        its address, and the names of the runs that have events now.

    Raises:
        ConfigError: TensorBoard is not installed, or cannot listen there.
    """
    # With TensorFlow installed, its filesystems would be used.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    try:
        from tensorboard import default, program  # type: ignore[import-untyped]
        from tensorboard.compat.tensorflow_stub.io.gfile import register_filesystem  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"TensorBoard is not installed ({error}): pip install tensorboard") from error
    from job.monitoring.tensorboard.files import SCHEME, RunFiles
    from job.monitoring.tensorboard.projector_paths import read_through_gfile

    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    files = RunFiles(uris_by_name(run_dirs))
    files.refresh()
    register_filesystem(SCHEME, files)
    read_through_gfile()
    server = program.TensorBoard(plugins=default.get_plugins())
    server.configure(argv=("tensorboard", *arguments(run_dirs, host=host, port=port)))
    try:
        try:
            address: str = server.launch()
        except (program.TensorBoardServerException, OSError) as error:
            raise ConfigError(
                f"TensorBoard cannot listen on {host}, port {port}: {getattr(error, 'msg', error)}"
            ) from error
        yield address, files.runs
    finally:
        files.close()


def arguments(run_dirs: Sequence[str], *, host: str, port: int | None) -> list[str]:
    """TensorBoard's own options."""
    local = not any("://" in run_dir for run_dir in run_dirs)
    return [
        "--logdir=runs://",
        # It reads local disks and Google's own buckets alone, and keeps open what has been replaced.
        "--load_fast=false",
        f"--reload_interval={RELOAD_SECONDS if local else BUCKET_RELOAD_SECONDS}",
        f"--host={host}",
        *([] if port is None else [f"--port={port}"]),
    ]


def uris_by_name(run_dirs: Sequence[str]) -> dict[str, str]:
    """URI by short name; of one alone the runs in it have their own names."""
    unique = list(dict.fromkeys(_absolute(run_dir) for run_dir in run_dirs))
    return {"": unique[0]} if len(unique) == 1 else dict(zip(short_names(unique), unique, strict=True))


def _absolute(uri: str) -> str:
    return uri.rstrip("/") if "://" in uri else os.path.normpath(Path(uri).expanduser().absolute())
