"""``python -m job tensorboard``: look at runs in TensorBoard, wherever they are stored."""

from __future__ import annotations

import threading

from job.cli.parser import call_with_options
from job.errors import EXIT_INTERRUPTED
from job.monitoring.tensorboard.command import serve
from job.process.signals import Stopped
from job.process.terminal import say

RUNS_SHOWN = 20


def tensorboard(args: list[str]) -> None:
    """Run ``python -m job tensorboard ARGS``."""
    call_with_options("tensorboard", main, args, positional=("run_dirs+",))


def wait_for_signal() -> None:
    """Wait until a signal raises an exception."""
    threading.Event().wait()


def main(run_dirs: list[str], port: int | None = None, host: str = "localhost") -> None:
    """Look at runs in TensorBoard, wherever they are stored.

    Args:
        run_dirs: folder of a run, or several; or a folder of such folders, of which new ones appear while it runs.
        port: port to listen on; 0 takes any free one. Default: 6006, or the next that is free.
        host: address to listen on. 0.0.0.0 or :: lets other machines connect: TensorBoard has no passwords.
    """
    with serve(run_dirs, host=host, port=port) as (address, runs):
        if runs:
            more = f" and {len(runs) - RUNS_SHOWN} more" if len(runs) > RUNS_SHOWN else ""
            say(f"{len(runs)} run(s): {', '.join(runs[:RUNS_SHOWN])}{more}")
        else:
            say(f"No TensorBoard events yet in {', '.join(run_dirs)}; they appear once training has begun.")
        say(f"TensorBoard: {address} (Ctrl-C ends it)")
        try:
            wait_for_signal()
        except Stopped as stopped:
            if stopped.exit_code != EXIT_INTERRUPTED:
                raise
