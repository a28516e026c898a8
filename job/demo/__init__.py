"""The whole job on one machine: a bucket, real images, two processes, a model that predicts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from job import storage
from job.demo.digits import digit_images
from job.demo.gcs_server import create_bucket, gcs_server
from job.demo.weights import efficientnet_lite0
from job.errors import JobError

CONFIGS = Path(__file__).parents[1] / "configs"
BUCKET = "gs://demo"
DIGITS, WEIGHTS = f"{BUCKET}/digits", f"{BUCKET}/weights/tf_efficientnet_lite0.safetensors"


def main(folder: str = ".demo", data: str | None = None, processes: int = 2, fresh: bool = True) -> None:
    """Run the whole job on this machine, with a bucket of its own.

    Starts a GCS server on loopback, fills a bucket with real images and pretrained weights, trains from gs:// to
    gs:// by torchrun, and predicts.

    Args:
        folder: where the server keeps its buckets, and the log files.
        data: URI of your own images, instead of the handwritten digits.
        processes: training processes.
        fresh: start anew; otherwise a run that was interrupted continues.
    """
    with gcs_server(Path(folder).absolute() / "buckets") as url:
        _say(f"A GCS server answers at {url}; bucket {BUCKET}")
        fill_bucket(with_digits=data is None)
        run_dir = f"{BUCKET}/runs/{'digits' if data is None else 'own-data'}"
        if fresh:
            storage.remove_tree(run_dir)
        _say(f"Training on {processes} processes, from {data or DIGITS} to {run_dir}")
        config = CONFIGS / ("demo.yaml" if data is None else "demo_photos.yaml")
        arguments = ["--config", str(config), "--data.root", data or DIGITS, "--run_dir", run_dir]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        _run([*torchrun, "-m", "job", "fit", *arguments, "--model.weights", WEIGHTS])
        if data is None:
            _say("Predicting some of the images")
            examples = [storage.join(DIGITS, key) for key in sorted(digit_images())[::200]]
            for uri in examples[:2]:
                _run([sys.executable, "-m", "job", "predict", "--ckpt", run_dir, "--input", uri])
        _say(
            f"The bucket stays in {folder}/buckets, where its objects are plain files:\n"
            f"  tensorboard --logdir {folder}/buckets/{run_dir.removeprefix('gs://')}/tensorboard"
        )


def fill_bucket(with_digits: bool) -> None:
    """Put the digits, if wanted, and then the pretrained weights into the bucket, where they are missing."""
    create_bucket(BUCKET)
    if with_digits and not storage.exists(DIGITS):
        files = digit_images()
        _say(f"Uploading {len(files):,} images of handwritten digits to {DIGITS}")
        storage.write_many(DIGITS, files)
    if not storage.exists(WEIGHTS):
        storage.write_bytes(WEIGHTS, efficientnet_lite0())


def _run(command: list[str]) -> None:
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
    if result.returncode:
        raise JobError(f"this ended with exit code {result.returncode}: {' '.join(command[1:])}")


def _say(text: str) -> None:
    print(f"\n▶ {text}", flush=True)
