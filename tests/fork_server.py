"""A fork server: ``python -m job`` in processes forked from one with all imports done.

A start costs 0.1 s of CPU instead of 6. For tests of what a run does; the start of the interpreter itself, imports, and
variables that are read while a library is imported need a process of their own (``fresh=True`` in :mod:`support`).

``python tests/fork_server.py FD`` is the server. It imports, touches no device and opens no file system, starts no
thread, and forks at each request. The child sets environment variables, folder, ``sys.path`` and standard streams, and
runs the module as ``python -m`` does. :class:`Process` is the client, with the methods of :class:`subprocess.Popen`.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NoReturn

REPOSITORY = Path(__file__).parents[1]

MODULES = (
    "job.cli.fit",
    "job.cli.tune",
    "job.cli.evaluate",
    "job.cli.predict",
    "job.cli.serve",
    "job.serve.server",
    "job.cli.index",
    "job.cli.checkpoints",
    "job.cli.launch",
    "job.cluster.launch",
    "job.cluster.agent",
    "torch.utils.tensorboard",
    "timm",
    "gcsfs",
)
"""What the commands import while they run."""

FIXED = ("OMP_NUM_THREADS", "LD_PRELOAD", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")
"""Variables that are read while libraries are imported: they must be those of the server."""

_REQUEST_BYTES = 1 << 20
_lock = threading.Lock()
_server: Server | None = None


class Server:
    """A fork server that ends with this process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.socket, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _REQUEST_BYTES)
        self.variables = {name: environment.get(name) for name in FIXED}
        removed = ("PYTHONPATH", "STORAGE_EMULATOR_HOST")
        with server_end:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(server_end.fileno())],
                env={name: value for name, value in environment.items() if name not in removed},
                pass_fds=[server_end.fileno()],
                stdout=subprocess.DEVNULL,
            )

    def stop(self) -> None:
        """End the server."""
        self.socket.close()
        self.process.wait()


def can_fork(environment: dict[str, str]) -> bool:
    """Whether a process with these environment variables can be forked: torch-xla starts threads when imported."""
    if find_spec("torch_xla") is not None:
        return False
    return all(environment.get(name) == value for name, value in _running(environment).variables.items())


def _running(environment: dict[str, str]) -> Server:
    global _server
    with _lock:
        if _server is None:
            _server = Server(environment)
            atexit.register(_server.stop)
        return _server


class Process:
    """A forked process: ``python -m MODULE ARGUMENTS``.

    Args:
        line: the module and its arguments.
        environment: all its environment variables.
        cwd: its working directory.
        stdout: file for its standard output.
        stderr: file for its standard error.
        start_new_session: as in :class:`subprocess.Popen`.

    Attributes:
        pid: process ID.
        returncode: exit code, or minus the signal that has killed it; None while it runs.
    """

    def __init__(
        self,
        line: list[str],
        environment: dict[str, str],
        cwd: Path,
        stdout: IO[Any],
        stderr: IO[Any],
        *,
        start_new_session: bool = False,
    ) -> None:
        self.line = line
        self.returncode: int | None = None
        self._ended = threading.Event()
        server = _running(environment)
        reader, writer = os.pipe()
        request = {"line": line, "environment": environment, "cwd": str(cwd), "session": start_new_session}
        try:
            _send(server.socket, request, [writer, stdout.fileno(), stderr.fileno()])
        finally:
            os.close(writer)
        self._answers = os.fdopen(reader)
        self.pid = int(self._answers.readline())
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with self._answers:
            self.returncode = int(self._answers.readline() or -signal.SIGKILL)
        self._ended.set()

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process to exit; return its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended in ``timeout`` seconds.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.line, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has exited."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its exit code is on its way
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _send(channel: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    fds = array.array("i", descriptors)
    channel.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """A request and its descriptors, or None when the other side has closed."""
    content, ancillary, _, _ = channel.recvmsg(_REQUEST_BYTES, socket.CMSG_SPACE(16 * 4))
    if not content:
        return None
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return json.loads(content), list(descriptors)


def serve(channel: socket.socket) -> dict[str, Any]:
    """Fork at each request; return the request in the child only."""
    running: dict[int, tuple[int, int]] = {}  # process ID and pipe for the answers, by pidfd
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != channel.fileno():
                poll.unregister(descriptor)
                pid, answers = running.pop(descriptor)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _answer(answers, code)
                os.close(answers)
                os.close(descriptor)
                continue
            received = _receive(channel)
            if received is None:
                sys.exit()
            request, (answers, stdout, stderr) = received
            pid = os.fork()
            if pid == 0:
                channel.close()
                for pidfd, (_, other) in running.items():
                    os.close(pidfd)
                    os.close(other)
                os.close(answers)
                _move({stdout: 1, stderr: 2})
                return request
            os.close(stdout)
            os.close(stderr)
            _answer(answers, pid)
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, answers
            poll.register(pidfd, select.POLLIN)


def _answer(pipe: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the test has ended
        os.write(pipe, f"{number}\n".encode())


def _move(descriptors: dict[int, int]) -> None:
    """Renumber file descriptors: keys to values."""
    above = max(256, *descriptors.values()) + 1
    copies = {os.dup2(old, above + n): new for n, (old, new) in enumerate(descriptors.items())}
    for old in descriptors:
        os.close(old)
    for copy, new in copies.items():
        os.dup2(copy, new)
        os.close(copy)


def become(request: dict[str, Any], site_path: list[str]) -> None:
    """Reset this forked process to the state of a new interpreter."""
    os.chdir(request["cwd"])
    set_environment(request["environment"])
    python_path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [request["cwd"], *python_path, *site_path]
    sys.argv = list(request["line"])
    if request["session"]:
        os.setsid()
    if "launch" in request["line"]:
        prepare_rank_server()


def set_environment(variables: dict[str, str]) -> None:
    """Replace all environment variables, and the state that modules derive from them."""
    import tempfile

    from job import storage

    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None
    if url := variables.get("STORAGE_EMULATOR_HOST"):
        storage.use_gcs_emulator(url)
    if variables.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]


def prepare_rank_server() -> None:
    """Fork the process that becomes the launcher's own fork server, while this process still has one thread.

    multiprocessing starts a new interpreter for it, with the code to run on its command line. Instead, this child
    executes that code.
    """
    from multiprocessing import util

    client_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _REQUEST_BYTES)
    pid = os.fork()
    if pid == 0:
        client_end.close()
        _run_rank_server(server_end)
    server_end.close()
    spawn = util.spawnv_passfds

    def fork(path: bytes, args: list[str], descriptors: list[int]) -> int:
        if "multiprocessing.forkserver" not in args[-1] or client_end.fileno() < 0:
            return int(spawn(path, args, descriptors))
        with client_end:
            _send(client_end, {"code": args[-1], "numbers": descriptors, "environment": dict(os.environ)}, descriptors)
        return pid

    util.spawnv_passfds = fork  # type: ignore[assignment]


def _run_rank_server(channel: socket.socket) -> NoReturn:
    received = _receive(channel)
    if received is not None:
        request, descriptors = received
        channel.close()
        _move(dict(zip(descriptors, request["numbers"], strict=True)))
        set_environment(request["environment"])
        exec(request["code"])
    os._exit(0)


def main() -> None:
    """Serve, and in each child run the module."""
    site_path = sys.path[1:]  # the first is the folder of this file
    sys.path[0] = str(REPOSITORY)
    for module in MODULES:
        importlib.import_module(module)
    import gc
    import runpy

    gc.freeze()
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a Ctrl-C: the tests end the processes
    request = serve(channel)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    become(request, site_path)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
