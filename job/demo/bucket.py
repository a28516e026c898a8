"""Server of the demo's bucket, for pods and containers: ``python -m job.demo.bucket``."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from jsonargparse import auto_cli

from job.demo import fill_bucket
from job.demo.gcs_server import gcs_server


def serve(folder: str, public_host: str, host: str = "0.0.0.0", port: int = 4443) -> None:
    """Serve the demo's images and weights by a GCS server, until SIGTERM.

    Args:
        folder: folder of the server's buckets.
        public_host: HOST:PORT at which clients reach the server.
        host: address to listen on.
        port: port to listen on.
    """
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with gcs_server(Path(folder) / "buckets", host=host, port=port, public_host=public_host):
        fill_bucket(with_digits=True)
        print(f"The demo's bucket is served at {public_host}.", flush=True)
        stopped.wait()


if __name__ == "__main__":
    auto_cli(serve, as_positional=False)
