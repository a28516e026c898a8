"""Progress, as it is seen on a terminal and read in a log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from support import TINY, fit_here, options, own_messages, picture_files, run_here, write_files

from job import cli
from job.monitoring import progress as monitoring
from job.process import logs, progress
from job.process.progress import Progress, compact_number, duration

TRAINED = r"train/loss [\d.]+  train/accuracy [\d.]+  [\d.,]+ images/s  \d+:\d\d left"
BAR = "━"
LONG_URI = "gs://bucket/" + "a-long-name/" * 20 + "epoch=001-step=00000005.ckpt"
EPOCH_LINE = re.compile(
    r"^\d\d:\d\d:\d\d epoch (\d)/3  step (\d+)  train/loss [\d.]+.*  val/loss [\d.]+  val/accuracy [\d.]+"
    r"  [\d.,]+ images/s  took \d+:\d\d(  \d+:\d\d left)?$"
)


def screen(raw: str) -> list[str]:
    """The lines that a terminal with a long scrollback shows; it knows no sequences but those expected of a bar."""
    lines, row, column = [""], 0, 0
    for sequence in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", raw):
        if sequence == "\r":
            column = 0
        elif sequence == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif sequence == "\x1b[2K":
            lines[row] = ""
        elif sequence.endswith("A"):
            row -= int(sequence[2:-1] or 1)
        elif len(sequence) == 1:
            lines[row] = lines[row][:column].ljust(column) + sequence + lines[row][column + 1 :]
            column += 1
        else:
            assert sequence.endswith("m"), repr(sequence)  # colours: nothing hides the cursor or clears the screen
    return [line.rstrip() for line in lines]


class Terminal:
    """A pseudo-terminal as stdout and stderr.

    Attributes:
        raw: what was written to it.
    """

    def __init__(self) -> None:
        self.raw = ""

    @contextlib.contextmanager
    def attached(self, *, stdout: bool = True) -> Iterator[None]:
        """Attach stderr to it, and stdout unless that is a file."""
        master, slave = pty.openpty()
        chunks: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(OSError):  # the other end is closed
                while chunk := os.read(master, 65536):
                    chunks.append(chunk)

        reader = threading.Thread(target=read)
        reader.start()
        before = sys.stdout, sys.stderr
        with os.fdopen(slave, "w", buffering=1, encoding="utf-8") as file:
            sys.stderr = file
            if stdout:
                sys.stdout = file
            try:
                yield
            finally:
                sys.stdout, sys.stderr = before
        reader.join()
        os.close(master)
        self.raw = b"".join(chunks).decode().replace("\r\n", "\n")

    @property
    def lines(self) -> list[str]:
        """What is left on it."""
        return screen(self.raw)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("JOB_LOG", raising=False)
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.0)
    return Terminal()


def run_on(terminal: Terminal, *args: object, stdout: bool = True) -> int:
    """The exit code of ``python -m job ARGS`` on a terminal."""
    argv, code = sys.argv, 0
    with terminal.attached(stdout=stdout), warnings.catch_warnings():
        logging.captureWarnings(False)  # an earlier run left it on, and pytest replaced its hook
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.argv = argv
    logging.root.handlers.clear()  # whose stream is closed
    return code


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_here(tmp_path_factory.mktemp("progress"))


class Chatty(pl.Callback):
    """A user's callback that prints and logs while a bar is drawn."""

    def on_train_batch_end(self, *args: Any) -> None:
        print(f"print {LONG_URI}")
        logging.getLogger("chatty").warning("log %s", LONG_URI)
        warnings.warn(f"warn {LONG_URI}", stacklevel=1)


def test_each_epoch_leaves_a_line_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    colours = write_files(tmp_path / "colours", picture_files(["blue", "red"], 10))
    callbacks = f"[{{class_path: {__name__}.Chatty}}]"
    arguments = options(TINY, data__root=colours, run_dir=tmp_path / "run", trainer__callbacks=callbacks)
    assert run_on(terminal, "fit", *arguments) == 0, terminal.raw
    lines = terminal.lines
    epochs = [found.groups() for line in lines if (found := EPOCH_LINE.match(line))]
    assert [(number, step) for number, step, _ in epochs] == [("1", "2"), ("2", "4"), ("3", "6")], lines
    assert [bool(left) for *_, left in epochs] == [True, True, False]
    # The bar was drawn, and is gone.
    drawn = re.sub(r"\x1b\[[\d;]*m", "", terminal.raw)
    assert re.search(
        rf"epoch 2/3 {BAR}+\S* +1/2 batches  train/loss [\d.]+( .*)?  [\d.,]+ images/s  \d+:\d\d left", drawn
    )
    assert re.search(rf"epoch 3/3  validation {BAR}+ +1/1 batches", drawn)
    assert not [line for line in lines if BAR in line]
    # What others write stands above it, unbroken.
    for word in ("print", "log", "warn"):
        assert sum(line.endswith(f"{word} {LONG_URI}") for line in lines) == (6 if word != "warn" else 1)
    uri = rf"{re.escape(str(tmp_path))}/run/checkpoints/epoch=\d+-step=\d+\.ckpt"
    assert any(re.fullmatch(uri, line.strip()) for line in lines), lines


def test_progress_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn; the same facts are lines, and fields of JSON records."""
    monkeypatch.setenv("JOB_LOG_SECONDS", "0.001")
    colours = write_files(tmp_path / "colours", picture_files(["blue", "red"], 10))
    arguments = options(TINY, data__root=colours, trainer__max_epochs=3)
    text = run_here("fit", *arguments, f"--run_dir={tmp_path / 'text'}").output
    assert not set(text) & {"\r", "\x1b", BAR}
    assert sum(bool(EPOCH_LINE.match(line)) for line in text.splitlines()) == 3
    assert re.search(r"epoch 2/3  1/2 batches  train/loss [\d.]+( .*)?  [\d.,]+ images/s  \d+:\d\d left\n", text)
    monkeypatch.setenv("JOB_LOG", "json")
    output = run_here("fit", *arguments, f"--run_dir={tmp_path / 'json'}").output
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert all({"severity", "message", "time", "rank", "world_size"} <= record.keys() for record in records)
    ends = [record for record in records if "val/accuracy" in record]
    assert [(record["epoch"], record["epochs"], record["global_step"]) for record in ends] == [
        *((1, 3, 2), (2, 3, 4), (3, 3, 6))
    ]
    within = [record for record in records if record.get("task") == "epoch 2/3"]
    assert [(record["done"], record["total"]) for record in within] == [(1, 2), (2, 2)]
    assert all(record["images_per_second"] > 0 and record["seconds_left"] >= 0 for record in within)
    assert all(record["epoch"] == 2 for record in within)
    stages = {record["message"]: record for record in records if "training all" in record["message"]}
    assert {message: record["global_step"] for message, record in stages.items()} == {"epoch 3: training all": 4}


@pytest.mark.parametrize(
    ("args", "drawn"),
    [
        (["validate"], r"validation ━+ +\d/1 batches"),
        (["predict", "--input"], r"predict ━* *\d+/20 images"),
        (["index"], r"listing \d+ files"),
        (["tune"], r"learning rates ━+\S* +\d+/20 steps  train/loss [\d.]+( .*)?  [\d.,]+ images/s  \d+:\d\d left"),
    ],
    ids=["validate", "predict", "index", "tune"],
)
def test_other_commands_draw_a_bar_too(
    args: list[str], drawn: str, terminal: Terminal, run_dir: Path, tmp_path: Path
) -> None:
    colours = run_dir.parent / "colours"
    more: dict[str, list[object]] = {
        "validate": [f"--data.root={colours}", f"--run_dir={run_dir}"],
        "predict": [colours, f"--run_dir={run_dir}", f"--output={tmp_path / 'rows'}"],
        "index": [colours, f"--output={tmp_path / 'index'}"],
        "tune": options(
            {**TINY, "trainer.max_epochs": 1},
            data__root=colours,
            run_dir=tmp_path,
            lr_finder__steps=20,
            seed_everything=0,
        ),
    }
    assert run_on(terminal, *args, *more[args[0]]) == 0, terminal.raw
    assert re.search(drawn, re.sub(r"\x1b\[[\d;]*m", "", terminal.raw)), terminal.raw
    left = [line for line in terminal.lines if "batches" in line or re.search(r"\d/\d+ (images|steps)", line)]
    assert not left


def test_results_in_a_file_are_not_redirected(
    terminal: Terminal, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``job predict … > file`` on a terminal."""
    colours = run_dir.parent / "colours"
    assert run_on(terminal, "predict", f"--run_dir={run_dir}", "--input", colours, stdout=False) == 0
    assert str(colours / "blue" / "000.jpg") in capsys.readouterr().out
    assert "blue" not in terminal.raw
    assert "images" in terminal.raw


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that the test advances."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)
    return lambda: own_messages(caplog)


def test_lines_of_a_task(clock: Callable[[float], None], lines: Callable[[], list[str]]) -> None:
    with Progress("features", "images", 2000) as task:
        for _ in range(20):
            clock(2.0)
            task.advance(100)
    assert lines() == [
        "features  500/2,000 images  50 images/s  0:30 left",
        "features  1,000/2,000 images  50 images/s  0:20 left",
        "features  1,500/2,000 images  50 images/s  0:10 left",
        "features  2,000/2,000 images  50 images/s  0:00 left",
        "features  2,000 images in 0:40  50 images/s",
    ]


def test_a_share_tells_the_time_left_of_an_unknown_total(
    clock: Callable[[float], None], lines: Callable[[], list[str]]
) -> None:
    with Progress("listing", "files") as task:
        clock(5.0)
        task.share_done = 0.25
        task.advance(3000)
        clock(5.0)
        task.advance(0)
        task.share_done = None
        clock(10.0)
        task.advance(1000)
        clock(-15.0)
    assert lines() == ["listing  3,000 files  300 files/s  0:30 left", "listing  4,000 files  200 files/s"]


def test_short_tasks_and_other_ranks_say_nothing(
    clock: Callable[[float], None], lines: Callable[[], list[str]]
) -> None:
    with Progress("features", "images", 20) as task:
        clock(9.0)
        task.advance(20)
    with Progress("features", "images", 20, is_shown=False) as task:
        clock(90.0)
        task.advance(20)
    assert not lines()


def test_the_time_left_of_a_run(clock: Callable[[float], None], lines: Callable[[], list[str]]) -> None:
    """Two epochs of 10 batches of 8 images, 3 s each, and a validation of 20 s."""
    trainer = SimpleNamespace(
        is_global_zero=True,
        current_epoch=0,
        max_epochs=2,
        max_steps=-1,
        global_step=0,
        num_training_batches=10,
        num_val_batches=[4],
        accumulate_grad_batches=1,
        callback_metrics={},
        state=SimpleNamespace(fn="fit"),
        is_last_batch=True,
        should_stop=False,
    )
    shown: Any = monitoring.TrainerProgress()
    shown.setup(trainer, None, "fit")
    trainer.fit_loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=10)))
    )
    for epoch in range(2):
        trainer.current_epoch = epoch
        shown.on_train_epoch_start(trainer, None)
        for number in range(10):
            shown.on_train_batch_start(trainer, None, None, number)
            clock(3.0)
            trainer.global_step += 1
            trainer.is_last_batch = number == 9
            shown.on_train_batch_end(trainer, None, None, {"global_size": 8}, number)
        shown.on_validation_start(trainer, None)
        for number in range(4):
            clock(5.0)
            shown.on_validation_batch_end(trainer, None, None, {"global_size": 8}, number)
        shown.on_validation_end(trainer, None)
        shown.on_train_epoch_end(trainer, None)
    shown.on_train_end(trainer, None)
    assert lines() == [
        "epoch 1/2  4/10 batches  2.67 images/s  0:48 left",  # 16 batches; of validations it knows nothing yet
        "epoch 1/2  8/10 batches  2.67 images/s  0:36 left",
        "epoch 1/2  validation  1/4 batches  1.6 images/s  1:05 left",  # 3 batches, an epoch, and a validation
        "epoch 1/2  validation  3/4 batches  1.6 images/s  0:55 left",
        "epoch 1/2  step 10  2.67 images/s  took 0:50  0:50 left",
        "epoch 2/2  2/10 batches  2.67 images/s  0:44 left",
        "epoch 2/2  6/10 batches  2.67 images/s  0:32 left",
        "epoch 2/2  10/10 batches  2.67 images/s  0:20 left",
        "epoch 2/2  validation  2/4 batches  1.6 images/s  0:10 left",
        "epoch 2/2  validation  4/4 batches  1.6 images/s  0:00 left",
        "epoch 2/2  step 20  2.67 images/s  took 0:50",
    ]


def test_the_line_of_an_epoch_has_the_loss_of_the_epoch_and_the_bar_that_of_the_step(
    clock: Callable[[float], None], lines: Callable[[], list[str]]
) -> None:
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        current_epoch=0,
        max_epochs=1,
        max_steps=-1,
        global_step=0,
        num_training_batches=1,
        accumulate_grad_batches=1,
        callback_metrics={"train/loss": 0.5, "train/loss_epoch": 0.25, "train/accuracy": 0.75},
        is_last_batch=True,
        should_stop=False,
    )
    shown: Any = monitoring.TrainerProgress()
    shown.setup(trainer, None, "fit")
    shown.on_train_epoch_start(trainer, None)
    shown.on_train_batch_start(trainer, None, None, 0)
    clock(20.0)
    shown.on_train_batch_end(trainer, None, None, {"global_size": 8}, 0)
    clock(40.0)  # of a checkpoint
    shown.on_train_epoch_end(trainer, None)
    shown.on_train_end(trainer, None)
    bar, line = lines()
    assert "0.4 images/s  took 1:00" in line
    assert "  train/loss 0.5  train/accuracy 0.75  " in bar
    assert "  train/loss 0.25  train/accuracy 0.75  " in line


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (9999, "9999"), (9999.6, "10k"), (12_500, "12.5k"), (999_900, "1M"), (3.4e6, "3.4M"), (-2e9, "-2G")],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "1 d 1:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nothing_is_drawn_on_a_terminal_that_cannot_move_its_cursor(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.attached(), Progress("features", "images", 20) as task:
        task.advance(10)
    assert not terminal.raw


def test_a_record_of_another_rank_erases_the_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks share the terminal, on which rank 0 has drawn a bar."""
    with terminal.attached(), warnings.catch_warnings():
        sys.stderr.write(f"epoch 1/3 {BAR * 20} 1/2 batches")
        logs.set_up(1, is_rank=True)
        logging.getLogger("somebody").warning("something")
        sys.stderr.write(f"epoch 1/3 {BAR * 20} 2/2 batches")
        logs.report("job: error (rank 1): something else")
    logging.root.handlers.clear()
    first, second = filter(None, terminal.lines)
    assert first.endswith(" [rank 1] something")
    assert second == "job: error (rank 1): something else"


def test_a_narrow_terminal_shows_one_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    with terminal.attached(), Progress("a task with a rather long name", "images", 20) as task:
        task.advance(10)
        time.sleep(0.6)
        task.advance(5)
    drawn = [part for part in re.split(r"[\r\n]|\x1b\[2K", re.sub(r"\x1b\[[\d;]*m", "", terminal.raw)) if part]
    assert drawn
    assert max(map(len, drawn)) <= 30
    assert not any(terminal.lines)
    assert logs.seconds() == 10.0
