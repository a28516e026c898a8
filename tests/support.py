"""Test helpers: images, processes, TensorBoard's own reader."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fork_server
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job import checkpoint, cli, storage
from job.data.fetch import Fetched, Fetcher
from job.data.index.build import build
from job.data.index.index import Index
from job.data.index.parts import Layout
from job.errors import DataError
from job.process.descendants import stat_fields

REPOSITORY = Path(__file__).parents[1]

TINY: dict[str, object] = {
    "model.backbone": "timm/test_resnet",
    "model.weights": "none",
    "model.hidden": "[8]",
    "model.milestones": "[1,2]",
    "model.backbone_lr_factor": 1.0,
    "data.image_size": 32,
    "data.global_batch_size": 8,
    "data.num_workers": 1,
    "trainer.max_epochs": 3,
    "trainer.log_every_n_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
}
"""A run of seconds: a network of 0.4 M parameters that goes through all stages of unfreezing."""
FROZEN: dict[str, object] = {
    name: TINY[name]
    for name in (
        "model.backbone",
        "model.weights",
        "data.image_size",
        "data.num_workers",
        "trainer.accelerator",
        "trainer.precision",
    )
}
"""Of the same network, for commands that compute features and train no backbone."""
INDEXES = Path(os.environ.get("TEST_INDEXES") or f"{tempfile.gettempdir()}/job-tests-{os.getpid()}")
"""Folder for indexes, and for what they are built from."""
GCS_SERVERS: dict[str, str] = {}
"""URL of the server behind gs:// for the tests of a fixture, by its name."""
COLOURS = {"blue": (30, 60, 200), "green": (20, 160, 60), "red": (200, 40, 30)}


def picture(
    colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 32), file_format: str = "JPEG"
) -> bytes:
    """Return a noisy image of one colour; each seed gives another image."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    pixels = (np.asarray(colour) + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


class Explosive:
    """An object whose unpickling runs code: it creates the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def free_port() -> int:
    """A free TCP port below those from which the kernel chooses: no other socket gets it before its server starts."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):  # it is taken
            probe.bind(("", port))
            return port
    raise AssertionError("100 ports are taken")


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    """Wait until ``condition()`` is true; the limit only keeps a test from hanging."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def wait_for_text(
    text: str, log: Path, process: fork_server.Process | subprocess.Popen[bytes], seconds: float = 300
) -> None:
    """Wait until a process that runs has written ``text`` to its log."""
    deadline = time.monotonic() + seconds
    while True:
        has_ended = process.poll() is not None  # before its output is read: it may write, and end, in between
        if text in (output := log.read_text()):
            return
        assert not has_ended, output
        assert time.monotonic() < deadline, output
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that has may still be waited for by its parent."""
    return (fields := stat_fields(pid)) is not None and fields[0] != "Z"


def picture_files(classes: list[str], count: int, seed: int = 0) -> dict[str, bytes]:
    """Return ``CLASS/NNN.jpg`` for ``count`` pictures per class."""
    return {
        f"{name}/{n:03d}.jpg": picture(COLOURS[name], seed + 1000 * c + n)
        for c, name in enumerate(classes)
        for n in range(count)
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for key, content in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, content in files.items():
            archive.writestr(key, content)
    return buffer.getvalue()


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for key, content in files.items():
            member = tarfile.TarInfo(key)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def index_parts(*uris: object, layout: Layout = "parts") -> dict[str, Index]:
    """Index a data set in a folder that is removed after the tests; return its parts."""
    INDEXES.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=INDEXES))
    name = "root" if layout == "parts" else "all"
    info = build({name: [str(uri) for uri in uris]}, folder, f"{INDEXES}/cache", layout)
    return {part: Index(folder, part) for part in info.parts}


def index_of(uri: object, layout: Layout = "parts") -> Index:
    """Index a data set of one part."""
    (index,) = index_parts(uri, layout=layout).values()
    return index


def read(index: Index, samples: list[int], cache_dir: object = "") -> list[bytes | DataError]:
    """Read samples: the content of each, or its error."""
    fetcher = Fetcher(index, str(cache_dir))
    return contents(fetcher, fetcher.start(np.asarray(samples)).result())


def contents(fetcher: Fetcher, fetched: list[Fetched]) -> list[bytes | DataError]:
    results: list[bytes | DataError] = []
    for each in fetched:
        try:
            results.append(fetcher.content(each))
        except DataError as error:
            results.append(error)
    return results


def cells_of(matrix: object) -> npt.NDArray[np.int64]:
    """The cells of a confusion matrix that are not zero: rows of (true class, predicted class, count)."""
    counts = np.asarray(matrix, np.int64)
    places = np.argwhere(counts)
    return np.column_stack([places, counts[tuple(places.T)]])


def options(settings: dict[str, object], **changes: object) -> list[str]:
    """Return settings as command-line options; ``a__b`` stands for ``a.b``."""
    merged = {**settings, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"--{name}={value}" for name, value in merged.items()]


def environment(**variables: str) -> dict[str, str]:
    """Return environment variables with one thread per process, so that sums are bit-equal."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def command(*args: object, processes: int = 0, restarts: int = 0) -> list[str]:
    """Return the command ``python -m job …``, with the launcher when ``processes`` is given."""
    job = [sys.executable, "-m", "job"]
    if processes:
        job = ["env", f"LAUNCH_PROCESSES={processes}", f"LAUNCH_RESTARTS={restarts}", *job, "launch"]
    return [*job, *map(str, args)]


def start(
    *args: object,
    stdout: IO[Any],
    stderr: IO[Any],
    processes: int = 0,
    restarts: int = 0,
    fresh: bool = False,
    module: str = "job",
    variables: dict[str, str],
    session: bool = False,
) -> fork_server.Process | subprocess.Popen[bytes]:
    """Start ``python -m job …``, by its launcher when ``processes`` is given.

    Args:
        args: command and options.
        stdout: file for the standard output.
        stderr: file for the standard error.
        processes: LAUNCH_PROCESSES; 0: no launcher.
        restarts: LAUNCH_RESTARTS.
        fresh: in a new interpreter, also where a fork of one that has imported everything would do.
        module: the module to run.
        variables: all environment variables.
        session: start a session, and so a process group.
    """
    line = [module, *(["launch"] if processes else []), *map(str, args)]
    if processes:
        variables = {**variables, "LAUNCH_PROCESSES": str(processes), "LAUNCH_RESTARTS": str(restarts)}
    if fresh or not fork_server.can_fork(variables):
        return subprocess.Popen(
            [sys.executable, "-m", *line],
            stdout=stdout,
            stderr=stderr,
            env=variables,
            cwd=REPOSITORY,
            start_new_session=session,
        )
    return fork_server.Process(line, variables, REPOSITORY, stdout, stderr, start_new_session=session)


def run(
    *args: object, processes: int = 0, timeout: float = 1500, fresh: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m job ARGS`` until it exits."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(
            *args, stdout=stdout, stderr=stderr, processes=processes, fresh=fresh, variables=environment(**variables)
        )
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        for file in (stdout, stderr):
            file.seek(0)
        return subprocess.CompletedProcess(list(map(str, args)), code, stdout.read(), stderr.read())


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Attributes:
        returncode: its exit code.
        output: stdout and stderr, as they came.
    """

    returncode: int
    output: str


def run_here(*args: object, threads: int = 1) -> Outcome:
    """Run ``python -m job ARGS`` in this process, which saves 10 CPU seconds of imports.

    For what ends in a message, and for short runs in one process. Tests of signals, ranks and environment variables
    need :func:`run`. An exception that would be a traceback is raised.
    """
    output, argv, before = io.StringIO(), sys.argv, torch.get_num_threads()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        torch.set_num_threads(threads)
        try:
            cli.main([str(arg) for arg in args])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = argv
            torch.set_num_threads(before)
    logging.basicConfig(force=True)  # not to the buffer, which is gone
    return Outcome(code, output.getvalue())


def fit_here(folder: Path, **changes: object) -> Path:
    """Run a fit in this process on two classes of 10 pictures; return its run_dir."""
    colours = write_files(folder / "colours", picture_files(["blue", "red"], 10))
    result = run_here("fit", *options(TINY, data__root=colours, run_dir=folder / "run", **changes))
    assert result.returncode == 0, result.output
    return folder / "run"


def run_well(
    *args: object, processes: int = 0, fresh: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m job ARGS`` and require exit code 0."""
    result = run(*args, processes=processes, fresh=fresh, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def own_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log lines of this package: threads of libraries that earlier tests started may log at any time."""
    return [record.getMessage() for record in caplog.records if record.name.split(".")[0] == "job"]


def scalars(run_dir: str) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every scalar below ``run_dir``, read by TensorBoard's own reader."""
    with tempfile.TemporaryDirectory() as folder:
        for key in (entry.key for entry in storage.list_files(f"{run_dir}/tensorboard") if "tfevents" in entry.key):
            storage.download(f"{run_dir}/tensorboard/{key}", Path(folder) / key)
        reader = EventAccumulator(folder, size_guidance={"scalars": 0})
        reader.Reload()
        return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def final_weights(run_dir: str) -> dict[str, torch.Tensor]:
    """Return the network's state dict in the newest checkpoint."""
    state: dict[str, torch.Tensor] = checkpoint.load(checkpoint.resolve(f"{run_dir}/checkpoints/last"))["state_dict"]
    return state


def assert_same_weights(one: str, other: str) -> None:
    """Assert that the newest checkpoints of two runs are bit-equal."""
    first, second = final_weights(one), final_weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, first {different[:3]}"
