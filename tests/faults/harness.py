"""Jobs for fault injection."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import ClassVar

from support import TINY, environment, options, start, wait_for_text

SETTINGS: dict[str, object] = {
    **TINY,
    "data.global_batch_size": 4,  # 8 steps an epoch
    "checkpoint.every_n_steps": 5,
    "grace": 120,  # a busy machine may need longer than the default to save
}
STEPS = list(range(3 * 8))


def fit_options(run_dir: str, **changes: object) -> list[str]:
    return ["fit", *options(SETTINGS, **{"data__root": "gs://faults/colours", "run_dir": run_dir, **changes})]


def sabotage(marker: Path, **settings: object) -> str:
    """Return a value for ``--trainer.callbacks`` that adds a Saboteur."""
    arguments = ", ".join(f"{name}: {value}" for name, value in {"marker": marker, **settings}.items())
    return f"[{{class_path: saboteur.Saboteur, init_args: {{{arguments}}}}}]"


class Job:
    """A job that runs beside the test, in a process group of its own, its output in a file."""

    started: ClassVar[list[Job]] = []

    def __init__(
        self,
        log: Path,
        *arguments: object,
        processes: int = 0,
        restarts: int = 0,
        fresh: bool = False,
        module: str = "job",
        **variables: str,
    ) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = start(
                *arguments,
                stdout=file,
                stderr=file,
                processes=processes,
                restarts=restarts,
                fresh=fresh,
                module=module,
                variables=fault_environment(**variables),
                session=True,
            )
        self.started.append(self)

    @classmethod
    def kill_all(cls) -> None:
        """Kill the jobs of a test that has failed: they would slow down, and disturb, the next one."""
        while cls.started:
            if (job := cls.started.pop()).process.poll() is None:
                job.kill()

    @classmethod
    def node(cls, log: Path, *arguments: object, port: int) -> Job:
        """Start one of up to two elastic nodes whose rendezvous is at ``port``."""
        torchrun = [
            *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=5"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic-test"),
            *(
                "--rdzv-conf=last_call_timeout=5,keep_alive_interval=2",
                "--local-addr=127.0.0.1",
                "-m",
                "job",
                *map(str, arguments),
            ),
        ]
        return cls(log, *torchrun, module="torch.distributed.run", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    @classmethod
    def with_lease(cls, log: Path, seconds: float, *arguments: object) -> Job:
        """Start one process whose lease is valid for ``seconds``."""
        return cls(log, seconds, *arguments, module="short_lease")

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = 400) -> int:
        """Wait for the process to exit; return its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it did not end in {timeout} s:\n{self.output}") from None

    def wait_for(self, text: str, timeout: float = 300) -> None:
        """Wait until the output contains ``text``."""
        wait_for_text(text, self.log, self.process, timeout)

    def kill(self) -> None:
        """Send SIGKILL to all processes of the job, as if the machine were lost."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait()


def fault_environment(**variables: str) -> dict[str, str]:
    return environment(PYTHONPATH=str(Path(__file__).parent), **variables)


def wait_until_served(port: int) -> None:
    """Wait until a server listens on this port of localhost."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on {port}")


def descendants(pid: int) -> list[int]:
    """Return ``pid`` and the PIDs of its descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    pids = [pid]
    for one in pids:
        pids += [child for child, parent in parents.items() if parent == one]
    return pids
