"""The report: its numbers, its files however a run ends, and what other people's names may do in it."""

from __future__ import annotations

import hashlib
import html.parser
import json
import os
import re
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import torch
from cli.report_schema import SCHEMA, schema_text
from pytorch_lightning.callbacks import Callback
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score
from support import TINY, Outcome, cells_of, options, own_messages, picture_files, run_here, scalars, write_files

from job import storage
from job.checkpoint import confusion
from job.checkpoint.settings import CheckpointSettings
from job.errors import CheckpointError, NewerFormatError, StorageError, StorageOutage
from job.model import evaluation as measured
from job.monitoring.accounting import Attempt
from job.monitoring.drawing.thumbnails import ValidationThumbnails
from job.monitoring.history import MOST_RECORDS, ValidationRecord, thinned, until_step
from job.monitoring.report import writer
from job.monitoring.report.build import summarise_attempts
from job.monitoring.report.comparison import compare, runs_in
from job.monitoring.report.content import (
    AttemptSummary,
    CheckpointEntry,
    Checkpoints,
    ConfusionMatrix,
    EvaluationResult,
    Report,
    ReportContent,
    decode_report,
    json_schema,
)
from job.monitoring.report.files import EarlierReport, read_report
from job.monitoring.report.measures import most_confused, per_class, result_of
from job.monitoring.report.page import render
from job.monitoring.report.results import ValidationResults
from job.monitoring.report.summary import print_summary
from job.process.signals import STOP_SIGNALS

MEGABYTE = 1_000_000
NO_CELLS = np.zeros((0, 3), np.int64)


def fit(folder: Path, colours: Path, *more: str, **changes: object) -> Outcome:
    fixed = {"run_dir": folder / "run", "data__cache_dir": folder / "cache", "data__num_workers": 0}
    settings = options(TINY, data__root=colours, features__use="never", model__milestones="[9]", **fixed, **changes)
    return run_here("fit", *settings, *more)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run_dir of a fit of three epochs."""
    folder = tmp_path_factory.mktemp("report")
    colours = write_files(folder / "colours", {**picture_files(["blue", "red"], 20), "README.md": b"colours"})
    done = fit(folder, colours, trainer__max_epochs=3)
    assert done.returncode == 0, done.output
    return folder / "run"


def entry(value: float | None, monitor: str = "val/accuracy", mode: Any = "max") -> CheckpointEntry:
    return CheckpointEntry("gs://b/c.ckpt", 1, 10, {monitor: value}, monitor, mode, value)


def content(**changes: Any) -> ReportContent:
    fields: dict[str, Any] = {
        "run_dir": "gs://bucket/run",
        "started": "2026-01-01T00:00:00+00:00",
        "epochs": 1,
        "global_step": 10,
        "world_size": 1,
        "accelerator": "cpu",
        "classes": ["blue", "red"],
        "images": {"train": 32, "val": 8},
        "bad_samples": [],
        "skipped_steps": 0,
        "train_images_per_second": 10.0,
        "metrics": {"val/accuracy": 0.5},
        "confusion_matrix": None,
        "checkpoints": Checkpoints(entry(0.5), entry(0.5)),
        "attempt_count": 1,
        "seconds": {"goodput": 0.5, "wall": 10.0, "step": 5.0},
        "versions": {"job": "1"},
    }
    return ReportContent(**{**fields, **changes})


def record(step: int, **metrics: float) -> ValidationRecord:
    return ValidationRecord(step, step, {f"val/{name}": value for name, value in metrics.items()})


# Numbers


def test_figures_of_classes_and_curves_are_those_of_scikit_learn() -> None:
    dice = np.random.default_rng(0)
    classes, count, bins = [f"c{n}" for n in range(5)], 3000, 200
    labels = dice.integers(0, 4, count)  # the last class never occurs
    scores = dice.integers(0, bins, (count, 5)) + 40 * np.eye(5)[labels]
    scores = scores.clip(0, bins - 1) / bins
    guesses = scores[:, :4].argmax(axis=1)
    matrix = np.zeros((5, 5), np.int64)
    np.add.at(matrix, (labels, guesses), 1)

    listed = per_class(cells_of(matrix), classes)
    expected = precision_recall_fscore_support(labels, guesses, labels=range(5), zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        found = [getattr(each, name) for each in listed]
        assert [np.nan if value is None else value for value in found] == pytest.approx(list(values), nan_ok=True)
    assert [each.predicted for each in listed] == np.bincount(guesses, minlength=5).tolist()

    top = most_confused(cells_of(matrix), classes)[0]
    wrong = matrix - np.diag(matrix.diagonal())
    assert top.count == wrong.max()
    assert matrix[classes.index(top.label), classes.index(top.predicted)] == top.count
    assert top.share == pytest.approx(top.count / (labels == classes.index(top.label)).sum())

    numbers = np.rint(scores * bins).astype(int)
    histograms = [
        np.stack([np.bincount(numbers[(labels == c) == is_it, c], minlength=bins) for c in range(5)])
        for is_it in (True, False)
    ]
    evaluation = measured.Evaluation(
        {}, cells_of(matrix), scores=measured.ScoreHistograms(*histograms, lowest=np.arange(bins) / bins)
    )
    curves = result_of(evaluation, 1, classes, str, 0).curves
    assert [each.name for each in curves] == classes[:4]
    for number, each in enumerate(curves):
        truth = labels == number
        assert each.average_precision == pytest.approx(average_precision_score(truth, scores[:, number]))
        assert each.auroc == pytest.approx(roc_auc_score(truth, scores[:, number]))
        assert (each.recall[0], each.recall[-1], each.false_positive_rate[-1]) == (0, 1, 1)
        assert len(each.recall) <= 60


def test_figures_of_several_labels_are_those_of_scikit_learn() -> None:
    dice = np.random.default_rng(0)
    truth, guesses = dice.random((500, 3)) < 0.4, dice.random((500, 3)) < 0.5
    matrices = np.stack(
        [
            [[(~t & ~g).sum(), (~t & g).sum()], [(t & ~g).sum(), (t & g).sum()]]
            for t, g in zip(truth.T, guesses.T, strict=True)
        ]
    )
    listed = per_class(matrices, ["a", "b", "c"])
    for name, values in zip(
        ("precision", "recall", "f1", "support"), precision_recall_fscore_support(truth, guesses), strict=True
    ):
        assert [getattr(each, name) for each in listed] == pytest.approx(list(values))
    assert most_confused(matrices, ["a", "b", "c"]) == []


def test_calibration_is_the_mean_of_each_bin() -> None:
    counts, correct = np.array([0, 4, 10]), np.array([0, 1, 9])
    calibration = measured.Calibration(counts, np.array([0.0, 2.0, 9.5]), correct)
    found = result_of(measured.Evaluation({}, NO_CELLS, calibration), 7, ["a", "b"], str, 0).calibration
    assert found is not None
    assert found.error == pytest.approx((1 + 0.5) / 14)
    assert [(each.count, each.confidence, each.accuracy) for each in found.bins] == [
        (0, None, None),
        (4, 0.5, 0.25),
        (10, pytest.approx(0.95), 0.9),
    ]
    assert (found.bins[0].lowest, found.bins[2].highest) == (0, 1)


# Files of a run


def test_the_schema_is_the_one_in_the_documentation() -> None:
    assert SCHEMA.read_text() == schema_text(), "make golden writes it anew"


def test_a_report_has_the_facts_of_its_run(run_dir: Path) -> None:
    plain = json.loads((run_dir / "report.json").read_text(), parse_constant=pytest.fail)
    jsonschema.validate(plain, json_schema(), cls=jsonschema.Draft202012Validator)
    report = read_report(str(run_dir))
    assert (report.status, report.format, report.planned_epochs) == ("finished", 2, 3)
    logged = scalars(str(run_dir))
    assert [each.epoch for each in report.history] == [1, 2, 3]
    for name in ("val/loss", "val/accuracy"):
        assert [each.metrics[name] for each in report.history] == pytest.approx([value for _, value in logged[name]])
    assert report.history[-1].global_step == report.global_step
    assert all(each.images_per_second and 0 <= (each.data_wait or 0) <= 1 and each.lr for each in report.history)
    assert [each.support for each in report.per_class] == [4, 4]
    assert report.data.parts["train"].images_per_class == [16, 16]
    assert [(each.reason, each.count) for each in report.data.left_out] == [("notes and metadata", 1)]
    assert report.configuration["model"]["backbone"] == "timm/test_resnet"
    assert {"job", "torch", "torchvision", "timm", "python"} <= report.versions.keys()
    assert report.hardware.cpus > 0
    assert report.checkpoints is not None
    best = report.checkpoints.best
    assert best.sha256 == json.loads((run_dir / "checkpoints" / f"{Path(best.uri).name}.json").read_text())["sha256"]
    assert (report.evaluation is not None) and report.evaluation.global_step == best.global_step
    assert [(each.end, each.last_step) for each in report.attempts] == [("finished", report.global_step)]


def test_the_page_opens_alone(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text()
    report = read_report(str(run_dir))
    assert report.metrics["val/accuracy"] is not None
    assert f"{report.metrics['val/accuracy']:.4f}" in page
    for word in ("Training", "Classes", "Data", "Time and faults", "Configuration", "timm/test_resnet"):
        assert word in page
    assert_self_contained(page)


def assert_self_contained(page: str) -> None:
    class Reader(html.parser.HTMLParser):
        tags: list[str] = []  # noqa: RUF012  (of this test alone)

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            for name, value in attributes:
                assert not name.startswith("on"), (tag, name)
                if name in ("src", "href", "action", "srcset", "data", "xlink:href"):
                    assert (value or "").startswith("data:image/jpeg;base64,"), (tag, name, value)

    reader = Reader()
    reader.feed(page)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "use"} & set(reader.tags)
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert "@import" not in page


class Interrupt(Callback):
    """Ends a fit at a step."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            if self.how == "error":
                raise RuntimeError("the printer is on fire: https://user:secret@host/x")
            os.kill(os.getpid(), STOP_SIGNALS[0])


def interrupting(step: int, how: str) -> str:
    return json.dumps([{"class_path": "test_report.Interrupt", "init_args": {"step": step, "how": how}}])


def test_every_end_of_an_attempt_is_reported_and_the_history_has_no_gap(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loaded machine may need longer; after the grace this process, of the tests, would end.
    monkeypatch.setattr(writer, "STOPPING_SECONDS", 240.0)
    run, more = tmp_path / "run", {"trainer__max_epochs": 3, "grace": 240}
    assert fit(tmp_path, colours, trainer__callbacks=interrupting(6, "error"), **more).returncode == 70
    failed = read_report(str(run))
    assert (failed.status, failed.failure) == ("failed", "RuntimeError: the printer is on fire: https://***@host/x")
    assert [each.epoch for each in failed.history] == [1]
    assert "printer is on fire" in (run / "report.html").read_text()

    stopped = fit(tmp_path, colours, trainer__callbacks=interrupting(9, "signal"), **more)
    assert stopped.returncode == 143, stopped.output
    report = read_report(str(run))
    assert (report.status, report.failure) == ("stopped", None)
    assert [each.epoch for each in report.history] == [1, 2]
    ends = [(each.end, each.first_step, each.recomputed_steps) for each in report.attempts]
    assert ends == [("failed", 0, 2), ("stopped", 4, 0)]

    # As after a kill: the report still says that the attempt is running.
    killed = msgspec.structs.replace(report.attempts[-1], end="running")
    (run / "report.json").write_bytes(
        msgspec.structs.replace(report, status="running", attempts=[report.attempts[0], killed]).to_json()
    )
    assert fit(tmp_path, colours, **more).returncode == 0
    report = read_report(str(run))
    assert [each.end for each in report.attempts] == ["failed", "killed", "finished"]
    assert [each.epoch for each in report.history] == [1, 2, 3]
    assert (report.status, report.attempt_count) == ("finished", 3)


def test_a_run_that_goes_on_forgets_validations_after_its_checkpoint(tmp_path: Path, colours: Path) -> None:
    assert fit(tmp_path, colours, trainer__max_epochs=2).returncode == 0
    report = read_report(str(tmp_path / "run"))
    later = msgspec.structs.replace(report.history[-1], epoch=3, global_step=12)
    changed = msgspec.structs.replace(report, history=[*report.history, later])
    (tmp_path / "run/report.json").write_bytes(changed.to_json())
    assert fit(tmp_path, colours, trainer__max_epochs=3).returncode == 0
    history = read_report(str(tmp_path / "run")).history
    assert [each.global_step for each in history] == [4, 8, 12]
    assert history[-1] != later


@pytest.mark.parametrize("damage", [b"{", b'{"format": 2}', b'{"format": 9}'])
def test_a_report_that_cannot_be_read_costs_a_warning(damage: bytes, tmp_path: Path, colours: Path) -> None:
    assert fit(tmp_path, colours, trainer__max_epochs=1).returncode == 0
    (tmp_path / "run/report.json").write_bytes(damage)
    done = fit(tmp_path, colours, trainer__max_epochs=2)
    assert done.returncode == 0, done.output
    assert ("It is left unchanged." if b"9" in damage else "It is replaced.") in done.output
    if b"9" in damage:  # a newer version's
        assert (tmp_path / "run/report.json").read_bytes() == damage
        written = decode_report("", (tmp_path / "run/report.2.json").read_bytes())
        assert (tmp_path / "run/report.2.html").exists()
    else:
        written = read_report(str(tmp_path / "run"))
    assert [each.epoch for each in written.history] == [1, 2]  # from the checkpoint


@pytest.mark.parametrize("lost", ["validations", "report", "history"])
def test_validations_between_the_last_report_and_a_kill_are_not_lost(lost: str, tmp_path: Path, colours: Path) -> None:
    run = tmp_path / "run"
    assert fit(tmp_path, colours, trainer__max_epochs=3).returncode == 0
    before = read_report(str(run))
    if lost == "report":
        (run / "report.json").unlink()
    elif lost == "validations":
        (run / "report.json").write_bytes(msgspec.structs.replace(before, history=before.history[:1]).to_json())
    else:  # the checkpoint's copy is damaged
        rewrite_newest(run, history="[{}]")
    done = fit(tmp_path, colours, trainer__max_epochs=4)
    assert done.returncode == 0, done.output
    history = read_report(str(run)).history
    assert history[:3] == before.history
    assert [each.epoch for each in history] == [1, 2, 3, 4]
    assert ("history is damaged" in done.output) == (lost == "history")


def rewrite_newest(run: Path, **changes: object) -> None:
    """Change entries of the newest checkpoint, with a manifest that fits."""
    newest = max((run / "checkpoints").glob("*.ckpt"))
    torch.save({**torch.load(newest, weights_only=True), **changes}, newest)
    manifest = newest.with_name(f"{newest.name}.json")
    content = newest.read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_bytes(msgspec.json.encode({**msgspec.json.decode(manifest.read_bytes()), **facts}))


def test_how_attempts_ended_comes_from_the_earlier_report() -> None:
    attempts = [Attempt(100.0 * n, 100.0 * n + 50, 1, 10 * n, 10 * n + 15) for n in range(3)]
    summaries = summarise_attempts(attempts, [], "running")
    assert [(each.end, each.recomputed_steps) for each in summaries] == [("unknown", 5), ("unknown", 5), ("running", 0)]
    again = summarise_attempts([*attempts, Attempt(400, 410, 1, 30, 40)], summaries, "finished")
    assert [each.end for each in again] == ["unknown", "unknown", "killed", "finished"]


# The background thread


@pytest.fixture
def writing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A ReportWriter whose content is that of a run, and the names of what it writes."""
    report, written = read_report(str(run_dir)), []
    monkeypatch.setattr(writer, "POLL_SECONDS", 0.02)
    made: Any = writer.ReportWriter(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        EarlierReport(str(tmp_path)),
        settings=None,  # type: ignore[arg-type]
        ranking=None,  # type: ignore[arg-type]
        config="",
        thumbnails=ValidationThumbnails(),
    )
    made._facts = SimpleNamespace(run_dir=str(tmp_path))
    monkeypatch.setattr(made, "_build", lambda state: msgspec.structs.replace(report, attempt_count=state))
    monkeypatch.setattr(made, "_thumbnails_of", lambda content, fetch: {})

    def write(uri: str, content: bytes, before: Any) -> None:
        written.append((Path(uri).name, content))

    monkeypatch.setattr(storage, "write_bytes", write)
    return made, written


def test_reports_are_written_in_the_background_and_only_the_newest(
    writing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, written = writing
    gate, write = threading.Event(), storage.write_bytes

    def slow(*args: Any) -> None:
        gate.wait(240)
        write(*args)

    monkeypatch.setattr(storage, "write_bytes", slow)
    made._interval = 0.0
    monkeypatch.setattr(writer, "WRITE_SECONDS", 0.0)
    thread = writer.Periodic("report-writer", 0.02, made._write_when_due)
    for number in range(1, 50):
        made._pending = number
        time.sleep(0.002)
    assert not written  # nobody waits for the bucket
    gate.set()
    deadline = time.monotonic() + 120
    while ("report.json", 49) not in numbers_of(written) and time.monotonic() < deadline:
        time.sleep(0.02)
    thread.stop()
    numbers = [number for name, number in numbers_of(written) if name == "report.json"]
    assert numbers[-1] == 49
    assert len(numbers) <= 3


def test_reports_are_at_least_half_a_minute_apart(writing: Any) -> None:
    made, written = writing
    for number in (1, 2, 3):
        made._pending = number
        made._write_when_due()
    assert [name for name, _ in written] == ["report.json", "report.html"]
    assert made._pending == 3  # waits


def test_a_bucket_out_of_reach_delays_and_one_that_refuses_ends_updates(
    writing: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, written = writing
    made._interval = 0.0
    monkeypatch.setattr(writer, "WRITE_SECONDS", 0.0)
    write = storage.write_bytes

    def refuse(error: Exception) -> Any:
        def write_nothing(uri: str, *args: Any) -> None:
            if Path(uri).name.count(".") == 1:
                raise error
            write(uri, *args)

        return write_nothing

    monkeypatch.setattr(storage, "write_bytes", refuse(StorageOutage("503")))
    made._pending = 1
    made._write_when_due()
    assert not written
    assert not own_messages(caplog)
    monkeypatch.setattr(storage, "write_bytes", refuse(StorageError("retentionPolicyNotMet")))
    for number in (2, 3):
        made._pending = number
        made._write_when_due()
    assert caplog.text.count("can no longer be updated") == 1
    made._publish(made._build(4))
    assert [name for name, _ in written] == ["report.2.json", "report.2.html"]


@pytest.fixture
def finishing(writing: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As ``writing``, of a fit that began; its first write waits for a gate, and its last report is number 99."""
    made, written = writing
    gate, has_begun, write = threading.Event(), threading.Event(), storage.write_bytes

    def hang(uri: str, content: bytes, before: Any) -> None:
        before()
        if not has_begun.is_set():
            has_begun.set()
            gate.wait(240)
        write(uri, content, before)

    monkeypatch.setattr(storage, "write_bytes", hang)
    monkeypatch.setattr(made, "_state", lambda trainer, status: 99)
    made._has_started = True
    made._have_written(1)
    made._thread = writer.Periodic("report-writer", 0.02, made._write_when_due)
    assert has_begun.wait(120)
    yield made, written, gate
    gate.set()


def numbers_of(written: list[tuple[str, bytes]]) -> list[tuple[str, int | None]]:
    return [
        (name, json.loads(each)["attempt_count"] if name.endswith(".json") else None) for name, each in list(written)
    ]


FIT: Any = SimpleNamespace(is_global_zero=True)


def test_the_last_report_waits_for_a_write_in_progress(finishing: Any) -> None:
    made, written, gate = finishing
    made._have_written(2)  # is never written
    ending = threading.Thread(target=made.on_fit_end, args=(FIT, None))
    ending.start()
    ending.join(0.1)
    assert ending.is_alive()
    assert not written
    gate.set()
    ending.join(120)
    # The thread begins no further write, not even of the page of its report.
    assert numbers_of(written) == [("report.json", 1), ("report.json", 99), ("report.html", None)]
    assert made.content.attempt_count == 99


def test_a_write_that_hangs_replaces_no_last_report(
    finishing: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, written, gate = finishing
    monkeypatch.setattr(writer, "FINISHING_SECONDS", 0.05)
    thread = made._thread
    made.on_fit_end(FIT, None)
    assert numbers_of(written) == [("report.2.json", 99), ("report.2.html", None)]
    gate.set()
    assert thread.stop(120)
    assert numbers_of(written)[2:] == [("report.json", 1)]
    assert made.content.attempt_count == 99

    for name, each in written:
        (tmp_path / name).write_bytes(each)
    earlier = EarlierReport(str(tmp_path))
    assert earlier.content is not None
    assert (earlier.content.attempt_count, earlier.number) == (99, 2)  # the next attempt replaces the newest


def test_a_state_that_comes_during_a_failed_write_is_not_replaced_by_the_older_one(
    writing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = writing

    def fail(*args: Any) -> None:
        made._have_written(2)
        raise StorageOutage("503")

    monkeypatch.setattr(storage, "write_bytes", fail)
    made._have_written(1)
    made._write_when_due()
    assert made._pending == 2


def test_a_thousand_validations_keep_a_few_results_and_no_matrix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the bucket lets nothing be replaced, so that no report is built meanwhile."""
    ranking = CheckpointSettings(monitor="val/accuracy")
    made: Any = writer.ReportWriter(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        EarlierReport(str(tmp_path)),
        settings=SimpleNamespace(images=8),  # type: ignore[arg-type]
        ranking=ranking,
        config="",
        thumbnails=ValidationThumbnails(),
    )
    earlier = result_of(measured.Evaluation({}, NO_CELLS), 7, ["a", "b"], str, 0)
    made._results = ValidationResults(ranking.ranking_mode, earlier)
    made._facts = SimpleNamespace(classes=("a", "b"))
    made._data = SimpleNamespace(parts={"val": SimpleNamespace(uri=str)})
    made._has_started = True
    monkeypatch.setattr(made, "_state", lambda trainer, status: made._results.by_step())
    matrices = []
    for step in range(10, 1010):
        module = SimpleNamespace(evaluation=measured.Evaluation({}, NO_CELLS.copy()))
        matrices.append(weakref.ref(module.evaluation.confusion))
        accuracy = float("nan") if step == 50 else 0.9 if step in (300, 400) else 0.95 if step == 500 else 0.5
        trainer = SimpleNamespace(
            is_global_zero=True,
            global_step=step,
            state=SimpleNamespace(fn="fit"),
            callback_metrics={"val/accuracy": torch.tensor(accuracy)},
        )
        made.on_validation_end(trainer, module)
        assert len(made._pending) <= 5
        if step != 500:  # the best of all has no checkpoint
            made.on_save_checkpoint(trainer)
    del module
    assert sorted(made._results.by_step()) == [7, 300, 400, 1008, 1009]
    assert not [each for each in matrices if each() is not None]


def test_the_lowest_loss_is_kept_and_a_repeated_validation_replaces_its_result() -> None:
    results = ValidationResults("min")
    for step, loss in ((1, 0.5), (2, 0.1), (2, 0.95), (3, 0.4), (4, 0.45), (5, 0.9), (6, 0.9)):
        results.add(EvaluationResult(step), loss)
        results.keep_saved(step)
    assert sorted(results.by_step()) == [3, 4, 5, 6]


# Other people's data


HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)>\u202e{{ 7*7 }}'&"


def hostile_content() -> ReportContent:
    text = HOSTILE
    entry_ = CheckpointEntry(text, 1, 10, {text: 0.5}, text, "max", 0.5)
    pair = {"label": text, "predicted": text, "count": 1, "share": 0.5}
    curve = {"name": text, "recall": [0, 1], "precision": [1, 1], "false_positive_rate": [0, 1]}
    error = {"sample": 1, "uri": text, "labels": [text], "predicted": [text], "confidence": 0.5, "loss": 1.0}
    part = {"images": 1, "root": text, "images_per_class": [1, 1], "fingerprint": text}
    changes = {
        "run_dir": f"gs://bucket/{text}",
        "status": "failed",
        "failure": text,
        "started": text,
        "updated": text,
        "accelerator": text,
        "precision": text,
        "classes": [text, "red"],
        "images": {text: 1},
        "bad_samples": [text],
        "confusion_matrix": {"counts": [[1, 1], [0, 1]]},
        "checkpoints": msgspec.to_builtins(Checkpoints(entry_, entry_)),
        "per_class": [{"name": text, "precision": 1, "recall": 1, "f1": 1, "support": 1, "predicted": 1}],
        "most_confused": [pair],
        "evaluation": {
            "global_step": 1,
            "curves": [{**curve, "average_precision": 1, "auroc": 1}] * 3,
            "worst_errors": [error],
        },
        "history": [{"epoch": n, "global_step": n, "metrics": {"val/loss": 1.0}, "lr": {text: 0.1}} for n in (1, 2)],
        "advice": [{"kind": text, "message": text, "suggestion": text}],
        "data": {
            "parts": {text: part},
            "left_out": [{"reason": text, "count": 1, "example": text}],
            "absent": {text: text},
            "resize": text,
        },
        "configuration": {text: {text: text}},
        "versions": {text: text},
        "hardware": {"platform": text, "cpu": text, "cpus": 1, "accelerators": [text]},
    }
    return msgspec.convert({**msgspec.to_builtins(content()), **changes}, ReportContent)


def test_names_of_others_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = render(hostile_content(), {1: b"jpeg"})
    assert_self_contained(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "49" not in re.sub(r"\d{3,}", "", page.partition("<body>")[2].partition("<svg")[0])
    (tmp_path / "report.json").write_bytes(hostile_content().to_json())
    shown = run_here("report", tmp_path)
    assert shown.returncode == 0, shown.output
    assert "\u202e" not in shown.output + page


def test_names_with_credentials_are_redacted_on_the_page() -> None:
    uri = "https://user:secret@host/" + "folder/" * 20 + "x.jpg?X-Amz-Signature=5ee5ee5ee"
    error = {"sample": 1, "uri": uri, "labels": [uri], "predicted": [uri], "confidence": 0.5, "loss": 1.0}
    report = content(classes=[uri, "red"], failure=uri, evaluation={"global_step": 1, "worst_errors": [error]})
    page = render(msgspec.convert(msgspec.to_builtins(report), ReportContent), {})
    assert "https://***@host/" in page
    assert "secret" not in page
    assert "5ee5ee" not in page


def test_a_report_of_many_classes_and_epochs_is_bounded() -> None:
    """1,000 classes of long names, 10,000 epochs, 64 thumbnails, 1,000 bad samples, 1,000 attempts."""
    dice, count = np.random.default_rng(0), 1000
    classes = [f"{number:04d} " + "a long name of a class " * 3 for number in range(count)]
    cells = np.unique(dice.integers(0, count, (20_000, 2)), axis=0)
    cells = np.column_stack([cells, dice.integers(1, 50, len(cells))])
    history = [record(n, loss=1 / n, accuracy=0.123456789, f1=0.1, auroc=0.2, ece=0.3) for n in range(1, 10_001)]
    worst = tuple(measured.SamplePrediction(n, (n,), (n + 1,), 0.5, 3.0) for n in range(64))
    evaluation = measured.Evaluation({}, NO_CELLS, worst=worst)
    times = "2026-01-01T00:00:00+00:00"
    report = content(
        classes=classes,
        confusion_matrix=msgspec.convert(confusion.as_json(cells, count), ConfusionMatrix),
        per_class=per_class(cells, classes),
        most_confused=most_confused(cells, classes),
        history=thinned(history),
        evaluation=result_of(evaluation, 10, classes, lambda n: f"gs://bucket/{'folder/' * 20}{n}.jpg", 64),
        bad_samples=["gs://bucket/" + "x" * 200] * 1000,
        attempts=[AttemptSummary(times, times, 8, 1, 2, 0, "killed")] * 1000,
    )
    assert len(report.history) <= MOST_RECORDS
    assert (report.history[0].epoch, report.history[-1].epoch) == (1, 10_000)
    assert len(report.to_json()) < 2 * MEGABYTE
    assert len(render(report, dict.fromkeys(range(64), b"x" * 8192))) < 2 * MEGABYTE
    assert decode_report("", report.to_json()).history == report.history


def test_many_more_classes_are_listed_in_part() -> None:
    count = 5000
    cells = np.column_stack([np.arange(count), np.arange(count), np.ones(count, np.int64)])
    cells[7, 1] = 8
    listed = per_class(cells, [f"c{n}" for n in range(count)])
    assert len(listed) == 1000
    assert listed[0].name == "c7"  # the lowest F1 first


def test_a_history_is_cut_and_has_each_step_once() -> None:
    records = [record(step) for step in (1, 3, 2, 3, 9)]
    assert [each.global_step for each in until_step(records, 5)] == [1, 2, 3]


# Reading


def test_a_report_of_the_first_format_is_read() -> None:
    old = {
        **{name: value for name, value in msgspec.to_builtins(content(attempt_count=3)).items() if name != "format"},
        "finished": "2026-01-01T00:00:00+00:00",
        "checkpoints": {"best": {"uri": "gs://x", "epoch": 1, "global_step": 4, "val/accuracy": 0.5, "metrics": {}}},
    }
    old["starts"], old["seconds"] = old.pop("attempt_count"), {"goodput": 0.5, "wall": 10.0, "lost": 5.0}
    for name in ("status", "failure", "updated", "planned_epochs", "history", "attempts", "data", "hardware"):
        del old[name]
    old["checkpoints"]["last"] = old["checkpoints"]["best"]
    report = decode_report("", msgspec.json.encode(old))
    assert report.updated == "2026-01-01T00:00:00+00:00"
    assert report.checkpoints is not None
    assert report.checkpoints.best.uri == "gs://x"
    assert report.attempt_count == 3
    assert report.seconds == {"goodput": 0.5, "wall": 10.0, "recomputed": 5.0}


def test_damage_and_newer_formats_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no .*report\.json"):
        read_report(str(tmp_path))
    for damage in (b"[" * 10**5, b"\xff", b'{"format": 2, "classes": 3}', b"null"):
        with pytest.raises(CheckpointError, match="is damaged"):
            decode_report("x", damage)
    with pytest.raises(NewerFormatError, match="format 3"):
        decode_report("x", b'{"format": 3}')


# Comparison


def saved(folder: Path, name: str, value: float | None, **changes: Any) -> None:
    monitor, mode = changes.pop("monitor", "val/accuracy"), changes.pop("mode", "max")
    best = entry(value, monitor, mode)
    (folder / name).mkdir(parents=True)
    report = content(checkpoints=Checkpoints(best, best), **changes)
    (folder / name / "report.json").write_bytes(report.to_json())


def test_runs_are_compared_best_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, "low", 0.5)
    saved(tmp_path, "high", 0.9, configuration={"model": {"backbone": "timm/resnet18", "lr": 0.01}})
    saved(tmp_path, "other", 0.1, monitor="val/loss", mode="min")
    saved(tmp_path, "none", None)
    saved(tmp_path, "odd", 0.7, configuration={"model": [1], "trainer": None})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/report.json").write_text("{")
    (tmp_path / "empty").mkdir()
    rows = compare(runs_in([str(tmp_path)]))
    assert [Path(row.run_dir).name for row in rows][:3] == ["high", "odd", "low"]
    assert {Path(row.run_dir).name for row in rows[3:]} == {"none", "other"}
    assert (rows[0].backbone, rows[0].lr, rows[0].goodput) == ("timm/resnet18", 0.01, 0.5)
    assert "a run is left out" in caplog.text

    shown = run_here("report", tmp_path / "low", tmp_path / "high")
    assert shown.returncode == 0
    assert shown.output.index("0.9000") < shown.output.index("0.5000")
    as_json = run_here("report", tmp_path / "low", tmp_path / "high", "--json")
    assert [row["value"] for row in json.loads(as_json.output)] == [0.9, 0.5]
    assert run_here("report", tmp_path / "empty").returncode == 2


def test_a_lower_loss_is_better(tmp_path: Path) -> None:
    for name, value in (("a", 0.9), ("b", 0.1)):
        saved(tmp_path, name, value, monitor="val/loss", mode="min")
    assert [row.value for row in compare(runs_in([str(tmp_path)]))] == [0.1, 0.9]


def test_a_summary_ends_with_commands_that_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"goodput": 0.5, "wall": 10.0, "step": 5.0, "recomputed": 4.0}
    print_summary(Report.of(content(run_dir="/tmp/my runs/1", seconds=seconds)))
    shown = capsys.readouterr().out
    assert "goodput 50% of 10 s in 1 attempt(s): training steps 5 s" in shown
    assert "recomputed steps 4 s" in shown
    for command in ("predict '/tmp/my runs/1' IMAGE_OR_FOLDER", "report '/tmp/my runs/1'"):
        assert f"  python -m job {command}\n" in shown


def test_one_run_is_its_summary(run_dir: Path) -> None:
    shown = run_here("report", run_dir)
    assert shown.returncode == 0, shown.output
    for word in ("Finished", "best checkpoint", "goodput", "report"):
        assert word in shown.output
    as_json = run_here("report", run_dir, "--json")
    assert json.loads(as_json.output) == json.loads((run_dir / "report.json").read_text())
