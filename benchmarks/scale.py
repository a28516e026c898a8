"""A rehearsal at the size of ImageNet: 1,281,167 + 50,000 images of 1,000 classes in 1,040 tar shards of 150 MB.

Run it by ``make benchmark-scale``. The shards are computed while they are read (see ``generated_shards.py``), each
request takes 20 ms, and the real ``launch fit`` trains a tiny network with two ranks. Epochs and validations are cut
short (``limit_train_batches``, ``limit_val_batches``), since what is measured does not depend on their length: time
and memory until the first batch, step and validation, checkpoints, index, TensorBoard events and report, and what is
requested from the bucket. The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from generated_shards import HEAD_BYTES, Counts, install, register, shard_of
from rich.console import Console
from rich.table import Table
from scale_timeline import memory

from job.cli.versions import library_versions
from job.data.index.file import load_index_info
from job.data.index.index import Index
from job.process.descendants import descendants

CLASSES = 1_000
TRAIN_IMAGES, TRAIN_SHARDS = 1_281_167, 1_000
VAL_IMAGES, VAL_SHARDS = 50_000, 40
LATENCY = 0.02
BATCHES = 12
"""Batches per epoch, and per validation."""
BATCH = 32
EPOCHS = 2
CHECKPOINT_EVERY = 4
"""Steps."""
MODEL = ("--model.backbone=timm/test_vit", "--model.weights=none", "--model.milestones=[0,0]")
LIMIT_SECONDS = 500


@dataclass(frozen=True)
class Goal:
    """A goal, and what was measured.

    Attributes:
        name: of the measurement.
        value: what was measured.
        limit: the most that it may be.
        unit: of both.
    """

    name: str
    value: float
    limit: float
    unit: str

    @property
    def is_met(self) -> bool:
        """Whether the measurement is within the limit."""
        return self.value <= self.limit


@dataclass
class Fit:
    """One run of ``launch fit``.

    Attributes:
        seconds: from the start of the launcher to its end.
        stages: by rank: what the timeline recorded, with ``seconds`` since the start of the launcher.
        peak_pss: most bytes that all its processes together had at one time.
        cpu_seconds: of all its processes.
    """

    seconds: float = 0.0
    stages: list[list[dict[str, Any]]] = field(default_factory=list)
    peak_pss: int = 0
    cpu_seconds: float = 0.0

    def at(self, stage: str) -> dict[str, Any]:
        """The first time that the last rank reached a stage."""
        return max((next(line for line in lines if line["stage"] == stage) for lines in self.stages), key=_seconds)

    def stalls(self) -> list[float]:
        """Seconds of each checkpoint, on the rank that it stalled longest."""
        each = [[line["stall"] for line in lines if line["stage"] == "checkpoint"] for lines in self.stages]
        return [max(stalls) for stalls in zip(*each, strict=False)]

    def seconds_per_validation(self) -> list[float]:
        """Seconds of each validation of the first rank."""
        begins, ends = (
            [line["seconds"] for line in self.stages[0] if line["stage"] == stage]
            for stage in ("validation begins", "validation")
        )
        return [end - begin for begin, end in zip(begins, ends, strict=True)]


class Rehearsal:
    """A run_dir, and the commands that work on it.

    Args:
        folder: local folder for everything.
        options: of the command line.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.options = options
        self.run_dir = folder / "run"
        self.counts = folder / "counts"
        self.train = data_set("train", options.classes, options.images, options.shards)
        self.val = data_set("val", options.classes, options.val_images, options.val_shards)
        settings = {"latency": options.latency, "counts": str(self.counts)}
        self.environment = {
            **os.environ,
            "PYTHONPATH": install(folder / "entry-points"),
            "FSSPEC_SHARDS": json.dumps(settings),
            "LAUNCH_PROCESSES": str(options.ranks),
            "OMP_NUM_THREADS": "1",
        }

    def fit(self, name: str, epochs: int, *, run: str = "run", index: Path | None = None) -> Fit:
        """Train up to a number of epochs.

        Args:
            name: of the log, and of the folder of the timeline.
            epochs: after which it ends.
            run: name of the run_dir.
            index: folder of a saved index; None: the shards are given.

        Raises:
            RuntimeError: the command fails.
        """
        timeline, fit = self.folder / name, Fit()
        limits = {"limit_train_batches": BATCHES, "limit_val_batches": BATCHES, "max_epochs": epochs}
        callback = {
            "class_path": "scale_timeline.Timeline",
            "init_args": {"folder": str(timeline), "counts": str(self.counts)},
        }
        arguments = [
            *(f"--run_dir={self.folder / run}", f"--data.cache_dir={self.folder / 'cache'}"),
            *([f"--data.root={index / 'index.json'}"] if index else self._shards()),
            *(f"--data.global_batch_size={BATCH}", "--data.image_size=160", "--features.use=never", *MODEL),
            *(f"--trainer.{key}={value}" for key, value in limits.items()),
            *("--trainer.accelerator=cpu", "--trainer.log_every_n_steps=4"),
            f"--trainer.callbacks={json.dumps(callback)}",
            f"--checkpoint.every_n_steps={CHECKPOINT_EVERY}",
        ]
        began = time.time()
        fit.peak_pss, fit.cpu_seconds = self._run(name, "launch", "fit", *arguments)
        fit.seconds = time.time() - began
        for file in sorted(timeline.glob("*.jsonl")):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            fit.stages.append([{**line, "seconds": line["time"] - began} for line in lines])
        return fit

    def check(self) -> float:
        """Seconds of ``job check``."""
        began = time.time()
        options = (f"--run_dir={self.folder / 'checked'}", f"--data.cache_dir={self.folder / 'cache'}")
        self._run("check", "check", *options, *self._shards(), *MODEL, "--trainer.accelerator=cpu")
        return time.time() - began

    def _shards(self) -> tuple[str, str]:
        """Options that name the shards."""
        return f"--data.train={pattern(self.train)}", f"--data.val={pattern(self.val)}"

    def _run(self, name: str, *command: str) -> tuple[int, float]:
        """Run a command; returns the peak of its processes' memory and their CPU seconds."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "job", *command],
                stdout=file,
                stderr=file,
                cwd=Path(__file__).parent.parent,
                env=self.environment,
            )
            peak, done = [0], threading.Event()

            def watch() -> None:
                while not done.wait(1.0):
                    peak[0] = max(peak[0], sum(_pss([process.pid, *descendants(process.pid)])))

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                before = sum(os.times()[2:4])
                code = process.wait(LIMIT_SECONDS)
            except BaseException:
                process.terminate()
                process.wait()
                raise
            finally:
                done.set()
                watcher.join()
        if code:
            raise RuntimeError(f"{' '.join(command[:2])} ended with exit code {code}:\n{log.read_text()[-5000:]}")
        return peak[0], sum(os.times()[2:4]) - before


def data_set(name: str, classes: int, images: int, shards: int) -> str:
    """URI of a generated data set."""
    return f"shards://{name}/{classes}-classes/{images}-images/{shards}-shards"


def pattern(data: str) -> str:
    """Pattern of the shards of a data set."""
    count = int(data.rpartition("/")[2].partition("-")[0])
    return f"{data}/{{0000..{count - 1:04d}}}.tar"


def data_bytes(data: str) -> int:
    """Bytes of all shards of a data set."""
    path, count = data.removeprefix("shards://"), int(data.rpartition("/")[2].partition("-")[0])
    shards = (shard_of(f"{path}/{number:04d}.tar") for number in range(count))
    return sum(shard.bytes for shard in shards if shard)


def sizes(folder: Path, glob: str) -> list[int]:
    """Sizes of files."""
    return [path.stat().st_size for path in sorted(folder.rglob(glob)) if path.is_file()]


def rehearse(rehearsal: Rehearsal, console: Console) -> tuple[dict[str, Any], list[Goal]]:
    """Run everything; returns the figures and the goals."""
    total = data_bytes(rehearsal.train) + data_bytes(rehearsal.val)
    checked = rehearsal.check()
    Counts.clear(rehearsal.counts)
    fit = rehearsal.fit("fit", EPOCHS)
    run_dir = rehearsal.run_dir
    index, first_batch, first_step, validation = map(fit.at, ("index", "first batch", "first step", "validation"))

    stages = Table("until", "s", "peak RSS of a rank, MB", "of it not shared, MB", "requests", "read, MB")
    for name, line in {
        "index": index,
        "first batch": first_batch,
        "first step": first_step,
        f"validation of {BATCHES} batches": validation,
        "end of training": fit.at("train end"),
    }.items():
        requests = line["lookups"] + line["listings"] + line["reads"]
        cells = (f"{line['seconds']:.1f}", _mb(line["peak_rss"]), _mb(line["anonymous"]))
        stages.add_row(name, *cells, f"{requests:,}", _mb(line["bytes"]))
    stages.add_row("end of the command", f"{fit.seconds:.1f}", "", f"{_mb(fit.peak_pss)} in all processes", "", "")
    console.print(stages)

    folder = next((run_dir / "index").iterdir())
    index_bytes = sum(sizes(folder, "*"))
    load_seconds, load_bytes = opened(folder)
    stalls = fit.stalls()
    state, manifest, confusion = (
        max(sizes(run_dir / "checkpoints", glob), default=0) for glob in ("*.ckpt", "*.ckpt.json", "*.confusion.*")
    )
    events = sum(sizes(run_dir / "tensorboard", "*"))
    report = {name: sum(sizes(run_dir, name)) for name in ("report.json", "report.html")}
    before = Counts.total(rehearsal.counts)
    again = rehearsal.fit("again", EPOCHS + 1)
    after = again.at("index")
    resumed = {kind: after[kind] - before[kind] for kind in Counts.KINDS}
    saved = rehearsal.fit("saved", 1, run="other", index=folder)
    figures: dict[str, Any] = {
        "options": {name: str(value) for name, value in vars(rehearsal.options).items() if value is not None},
        "versions": library_versions(),
        "data_bytes": total,
        "fit": asdict(fit),
        "resumed": asdict(again),
        "from_saved_index": asdict(saved),
        "index": {"bytes": index_bytes, "load_seconds": load_seconds, "load_memory": load_bytes},
        "checkpoint": {"stalls": stalls, "state": state, "manifest": manifest, "confusion": confusion},
        "check_seconds": checked,
        "validations": fit.seconds_per_validation(),
        "event_bytes": events,
        **report,
    }
    others = Table("", "", show_header=False)
    for name, cell in {
        "data": f"{total / 1e9:,.1f} GB",
        "indexing: bytes asked for": f"{_mb(index['bytes'])} MB, {index['bytes'] / total:.3%} of the data",
        "indexing: requests": ", ".join(f"{index[kind]:,} {kind}" for kind in Counts.KINDS[:3]),
        "index": f"{_mb(index_bytes)} MB; opened in {load_seconds:.2f} s with {_mb(load_bytes)} MB of memory",
        "checkpoints: stall": ", ".join(f"{1000 * stall:.0f}" for stall in stalls) + " ms",
        "checkpoint: bytes": f"state {state:,}, manifest {manifest:,}, confusion matrix {confusion:,}",
        f"validation of {BATCHES} batches": ", ".join(f"{each:.1f}" for each in figures["validations"]) + " s",
        "TensorBoard events": f"{_mb(events)} MB",
        "report": ", ".join(f"{name} {size:,} bytes" for name, size in report.items()),
        "second attempt: index, first step": f"{after['seconds']:.1f} s, {again.at('first step')['seconds']:.1f} s",
        "second attempt: requests until the index": ", ".join(f"{resumed[kind]:,} {kind}" for kind in Counts.KINDS),
        "check": f"{checked:.1f} s",
        "other run with a saved index: first step": f"{saved.at('first step')['seconds']:.1f} s",
    }.items():
        others.add_row(name, cell)
    console.print(others)
    share = 100 * index["bytes"] / total
    least = 100 * HEAD_BYTES * (rehearsal.options.images + rehearsal.options.val_images) / total
    goals = [
        Goal(f"bytes to index, of the data (labels and headers: {least:.3g} %)", share, 1.0, "%"),
        Goal("start to first step", first_step["seconds"], 60.0, "s"),
        Goal("second attempt, start to first step", again.at("first step")["seconds"], 60.0, "s"),
        Goal("other run with a saved index, start to first step", saved.at("first step")["seconds"], 60.0, "s"),
        Goal("stall of a checkpoint, median", 1000 * sorted(stalls)[len(stalls) // 2], 20.0 + state / 1e6, "ms"),
        Goal("manifest", manifest, 2048, "bytes"),
        Goal("opening the index", load_seconds, 1.0, "s"),
        Goal("memory for the open index", load_bytes / 1e6, 50.0, "MB"),
    ]
    return figures, goals


def opened(folder: Path) -> tuple[float, int]:
    """Seconds and bytes of own memory that opening an index takes, as each rank does."""
    before, began = memory(os.getpid())["anonymous"], time.perf_counter()
    indexes = [Index(folder, part) for part in load_index_info(folder).parts]
    seconds = time.perf_counter() - began
    used = memory(os.getpid())["anonymous"] - before
    del indexes
    return seconds, max(used, 0)


def _seconds(line: dict[str, Any]) -> float:
    return float(line["seconds"])


def _pss(pids: list[int]) -> Iterator[int]:
    for pid in pids:
        try:
            yield memory(pid)["pss"]
        except (OSError, KeyError):  # it has just ended
            continue


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e7 else f"{size / 1e6:,.0f}"


def main() -> int:
    """Print the tables, and write the figures as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--images", type=int, default=TRAIN_IMAGES, help="of the training part")
    parser.add_argument("--shards", type=int, default=TRAIN_SHARDS, help="of the training part")
    parser.add_argument("--val-images", type=int, default=VAL_IMAGES)
    parser.add_argument("--val-shards", type=int, default=VAL_SHARDS)
    parser.add_argument("--latency", type=float, default=LATENCY, help="seconds per request")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="new local folder for run_dir, logs and cache, which is kept")
    parser.add_argument("--out", type=Path, help="file for all figures, as JSON")
    options = parser.parse_args()
    register()
    console = Console(width=140)
    console.print(f"{library_versions()}; {options.ranks} ranks, {1000 * options.latency:.0f} ms per request")
    with tempfile.TemporaryDirectory() as scratch:
        figures, goals = rehearse(Rehearsal(options.folder or Path(scratch), options), console)
    table = Table("goal", "measured", "at most", "")
    for goal in goals:
        cells = (f"{value:,.4g} {goal.unit}" for value in (goal.value, goal.limit))
        table.add_row(goal.name, *cells, "met" if goal.is_met else "missed")
    console.print(table)
    if options.out:
        options.out.write_text(json.dumps({**figures, "goals": [asdict(goal) for goal in goals]}, indent=1))
    return int(not all(goal.is_met for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
