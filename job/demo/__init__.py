"""Demo: the whole job on one machine, with a bucket, real images and two training processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from job import storage
from job.demo.digits import digit_images
from job.demo.gcs_server import create_bucket, gcs_server
from job.demo.weights import efficientnet_lite0
from job.errors import EXIT_RETRY, JobError
from job.process.descendants import kill_descendants
from job.process.signals import Stopped
from job.process.terminal import say

CONFIGS = Path(__file__).parents[1] / "recipes"
BUCKET = "gs://demo"
STOP_SECONDS = 40.0
"""Seconds that a command may take to end after a signal; torchrun gives its ranks 30 s to save."""
DIGITS, WEIGHTS = f"{BUCKET}/digits", f"{BUCKET}/weights/tf_efficientnet_lite0.safetensors"


def main(folder: str = ".demo", data: str | None = None, processes: int = 2, fresh: bool = True) -> None:
    """Run the whole job on this machine, with a local bucket.

    Starts a GCS server on loopback, uploads real images and pretrained weights, trains by torchrun from gs:// to gs://,
    and predicts.

    Args:
        folder: folder of the server's buckets and log files.
        data: URI of your own images. Default: handwritten digits.
        processes: number of training processes.
        fresh: delete an earlier run; otherwise an interrupted run is resumed.
    """
    with gcs_server(Path(folder).absolute() / "buckets") as url:
        _say(f"GCS server at {url}, bucket {BUCKET}")
        fill_bucket(with_digits=data is None)
        run_dir = f"{BUCKET}/runs/{'digits' if data is None else 'own-data'}"
        if fresh:
            storage.remove_tree(run_dir)
        _say(f"Training on {processes} processes, from {data or DIGITS} to {run_dir}")
        config = CONFIGS / ("demo.yaml" if data is None else "demo_photos.yaml")
        arguments = ["--config", str(config), "--data.root", data or DIGITS, "--run_dir", run_dir]
        _run(["launch", "fit", *arguments, "--model.weights", WEIGHTS], LAUNCH_PROCESSES=str(processes))
        if data is None:
            _say("Predicting some of the images")
            examples = [storage.join(DIGITS, key) for key in sorted(digit_images())[::200]]
            for uri in examples[:2]:
                _run(["predict", "--ckpt", run_dir, "--input", uri])
        _say(
            f"The bucket remains in {folder}/buckets; its objects are plain files:\n"
            f"  tensorboard --logdir {folder}/buckets/{run_dir.removeprefix('gs://')}/tensorboard"
        )


def fill_bucket(with_digits: bool) -> None:
    """Upload the pretrained weights, and optionally the digits, unless they are in the bucket."""
    create_bucket(BUCKET)
    if with_digits and not storage.exists(DIGITS):
        files = digit_images()
        _say(f"Uploading {len(files):,} images of handwritten digits to {DIGITS}")
        storage.write_many(DIGITS, files)
    if not storage.exists(WEIGHTS):
        storage.write_bytes(WEIGHTS, efficientnet_lite0())


class CommandFailed(JobError):
    """A command of the demo has failed; the demo exits with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _run(arguments: list[str], **variables: str) -> None:
    """Run ``python -m job ARGUMENTS``, and forward a signal that stops the demo."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **variables}
    # In its own session, so that it receives Ctrl-C from this process only, as SIGTERM.
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
            f"the command failed with exit code {code}: job {' '.join(arguments)}", code if code > 0 else EXIT_RETRY
        )


def _say(text: str) -> None:
    say("")
    say(f"▶ {text}")
