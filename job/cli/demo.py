"""``python -m job demo``: the whole job on one machine, from a bucket to a model that predicts."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

from job import storage
from job.cli.parser import call_with_options
from job.config.recipes import recipe_file
from job.demo import BUCKET, DIGITS, WEIGHTS, announce, fill_bucket
from job.demo.digits import digit_images
from job.demo.gcs_server import gcs_server
from job.errors import EXIT_RETRY, JobError
from job.process.descendants import kill_descendants
from job.process.signals import Stopped

STOP_SECONDS = 40.0
"""Seconds that a command has to end after a signal: torch elastic gives its ranks 30 s to save."""


def demo(args: list[str]) -> None:
    """Run ``python -m job demo ARGS``."""
    call_with_options("demo", main, args)


def main(folder: str = ".demo", data: str | None = None, processes: int = 2, fresh: bool = True) -> None:
    """Run everything on this machine, with a local bucket.

    Starts a GCS server on loopback, fills a bucket with real images and pretrained weights, trains from gs:// to
    gs:// in several processes, and predicts.

    Args:
        folder: local folder for the server's buckets and log files.
        data: URI of your own images, in place of the handwritten digits.
        processes: number of training processes.
        fresh: delete an earlier run first; false resumes an interrupted run.
    """
    with gcs_server(Path(folder).absolute() / "buckets") as url:
        announce(f"A GCS server answers at {url}; bucket {BUCKET}")
        fill_bucket(with_digits=data is None)
        run_dir = f"{BUCKET}/runs/{'digits' if data is None else 'own-data'}"
        if fresh:
            storage.remove_tree(run_dir)
        announce(f"Training on {processes} processes, from {data or DIGITS} to {run_dir}")
        config = recipe_file("demo" if data is None else "demo_photos")
        arguments = ["--config", str(config), "--data.root", data or DIGITS, "--run_dir", run_dir]
        _run(["launch", "fit", *arguments, "--model.weights", WEIGHTS], LAUNCH_PROCESSES=str(processes))
        if data is None:
            announce("Predicting some of the images")
            examples = [storage.join(DIGITS, key) for key in sorted(digit_images())[::200]]
            for uri in examples[:2]:
                _run(["predict", "--run_dir", run_dir, "--input", uri])
        announce(
            f"The bucket stays in {folder}/buckets, where its objects are plain files:\n"
            f"  python -m job tensorboard {shlex.quote(f'{folder}/buckets/' + run_dir.removeprefix('gs://'))}"
        )


class CommandFailed(JobError):
    """A command of the demo failed; the demo ends with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _run(arguments: list[str], **variables: str) -> None:
    """Run ``python -m job ARGUMENTS``; a signal that stops the demo is forwarded to it."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **variables}
    # In its own session: it gets Ctrl-C only from here, as it does SIGTERM.
    process = subprocess.Popen([sys.executable, "-m", "job", *arguments], env=environment, start_new_session=True)
    try:
        code = process.wait()
    except Stopped as stopped:
        process.send_signal(stopped.exit_code - 128)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        raise
    finally:
        if process.poll() is None:
            kill_descendants()
            process.wait()
    if code:
        raise CommandFailed(
            f"this ended with exit code {code}: job {' '.join(arguments)}", code if code > 0 else EXIT_RETRY
        )
