"""The demo's bucket as a server of its own, for pods and containers: ``python -m job.demo.bucket``."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from jsonargparse import auto_cli

from job.demo import fill_bucket
from job.demo.gcs_server import gcs_server


def serve(folder: str, public_host: str, host: str = "0.0.0.0", port: int = 4443) -> None:
    """Serve a GCS server that holds the demo's images and weights, until SIGTERM.

    Args:
        folder: where the server keeps its buckets.
        public_host: HOST:PORT that clients reach it at.
        host: address to listen at.
        port: port to listen at.
    """
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with gcs_server(Path(folder) / "buckets", host=host, port=port, public_host=public_host):
        fill_bucket(with_digits=True)
        print(f"The demo's bucket is served at {public_host}.", flush=True)
        stopped.wait()


if __name__ == "__main__":
    auto_cli(serve, as_positional=False)
