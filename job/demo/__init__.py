"""The demo's bucket on this machine: a GCS server, real images and pretrained weights."""

from __future__ import annotations

from job import storage
from job.demo.digits import digit_images
from job.demo.gcs_server import create_bucket
from job.process.terminal import say

BUCKET = "gs://demo"
DIGITS, WEIGHTS = f"{BUCKET}/digits", f"{BUCKET}/weights/tf_efficientnet_lite0.safetensors"


def fill_bucket(with_digits: bool) -> None:
    """Upload the pretrained weights, and optionally the digits, unless they are in the bucket."""
    create_bucket(BUCKET)
    if with_digits and not storage.exists(DIGITS):
        files = digit_images()
        announce(f"Uploading {len(files):,} images of handwritten digits to {DIGITS}")
        storage.write_many(DIGITS, files)
    if not storage.exists(WEIGHTS):
        from job.demo.weights import efficientnet_lite0  # imports torch

        storage.write_bytes(WEIGHTS, efficientnet_lite0())


def announce(text: str) -> None:
    """Print the heading of a step."""
    say("")
    say(f"▶ {text}")
