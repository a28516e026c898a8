"""Hyperparameters, best metrics and texts of runs, as TensorBoard's own server shows them."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import yaml
from pytorch_lightning import LightningModule
from support import fit_here, scalars
from test_tensorboard_command import eventually

from job import checkpoint
from job.checkpoint.settings import CheckpointSettings
from job.errors import StorageOutage
from job.monitoring.report.content import ReportContent
from job.monitoring.tensorboard.command import serve
from job.monitoring.tensorboard.hparams_summary import MOST_CHARACTERS, plain_values
from job.monitoring.tensorboard.hyperparameters import HyperparameterWriter, hyperparameters
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.monitoring.tensorboard.run_text import configuration_text, report_text


def rows(address: str) -> dict[str, Any]:
    """The rows of the HPARAMS tab by run."""
    body = {"allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"], "sliceSize": 9}
    url = f"{address.rstrip('/')}/data/plugin/hparams/session_groups"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    groups = json.load(urllib.request.urlopen(request))["sessionGroups"]
    return {session["name"]: {**group, **session} for group in groups for session in group["sessions"]}


def eventually_holds(check: Callable[[], None], seconds: float = 60) -> None:
    """Repeat assertions until they hold: TensorBoard answers while it still reads the events of a run."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check()
        except (AssertionError, LookupError, ValueError, urllib.error.HTTPError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def metrics(row: dict[str, Any]) -> dict[str, float]:
    return {value["name"]["tag"]: value["value"] for value in row["metricValues"]}


def test_an_outage_at_the_end_costs_the_best_metrics_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(run_dir: str) -> NoReturn:
        raise StorageOutage(f"{run_dir} does not answer")

    monkeypatch.setattr(checkpoint, "manifests", fails)
    logger = BucketTensorBoardLogger(str(tmp_path / "tensorboard"))
    writer = HyperparameterWriter("model: {lr: 0.1}", CheckpointSettings(monitor="val/accuracy"), logger)
    trainer: Any = SimpleNamespace(
        is_global_zero=True, precision="32-true", world_size=1, default_root_dir="x", loggers=[logger], global_step=3
    )
    writer.on_train_start(trainer, LightningModule())
    writer.on_fit_end(trainer, LightningModule())
    assert caplog.text.count("lacks the metrics of the best checkpoint: x does not answer") == 2


def text_of(address: str, run: str, tag: str) -> str:
    query = urllib.parse.urlencode({"run": run, "tag": tag})
    url = f"{address.rstrip('/')}/data/plugin/text/text?{query}"
    return str(json.load(urllib.request.urlopen(url))[-1]["text"])


def test_runs_compare_and_a_resumed_one_is_one_row(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.mkdir()
    two.mkdir()
    fit_here(one, trainer__max_epochs=1, model__lr=0.01, model__optimizer="AdamW")
    fit_here(one, trainer__max_epochs=2, model__lr=0.01, model__optimizer="AdamW")
    fit_here(two, trainer__max_epochs=1, seed_everything=3)
    with serve([str(one / "run"), str(two / "run")], host="localhost", port=0) as (address, names):
        eventually_holds(lambda: assert_rows_of_both(address, names, tmp_path))


def assert_rows_of_both(address: str, names: list[str], folder: Path) -> None:
    assert names == ["1", "2"]
    eventually(address, "scalars/tags", lambda tags: len(tags) == 2)
    found = rows(address)
    assert set(found) == {"1", "2"}
    first, second = found["1"], found["2"]
    assert (
        first["hparams"].items() >= {"lr": 0.01, "batch_size": 8, "seed": 0, "world_size": 1, "train_bn": False}.items()
    )
    assert first["hparams"]["optimizer"] == "AdamW"  # its arguments have their defaults
    assert first["hparams"]["precision"] == "32-true"
    assert "lr" not in second["hparams"]
    assert second["hparams"]["seed"] == 3
    assert {first["status"], second["status"]} == {"STATUS_SUCCESS"}
    for run, row in (("1", first), ("2", second)):
        report = json.loads((folder / run / "run" / "report.json").read_text())
        best = {f"best/{name.removeprefix('val/')}": value for name, value in report["metrics"].items()}
        shown = {name: value for name, value in metrics(row).items() if name.startswith("best/")}
        assert shown == pytest.approx({name: value for name, value in best.items() if name.count("/") == 1})
    # The tab shows the first metrics in the order of their names.
    assert next(iter(metrics(first))).startswith("best/")
    assert sorted(text.partition("/")[2] for text in eventually(address, "text/tags", bool)["1"]) == [
        "configuration",
        "data",
        "report",
    ]
    assert "max_epochs: 2" in text_of(address, "1", "run/configuration")
    assert "<code>blue</code>" in text_of(address, "1", "run/data")
    assert "best checkpoint" in text_of(address, "1", "run/report")
    tags = sorted({name.partition("/")[0] for name in scalars(str(folder / "1" / "run"))})
    assert tags[-3:] == ["train", "val", "wall_time"]
    assert {"wall_time/goodput", "wall_time/step", "wall_time/recomputed"} <= scalars(str(folder / "1" / "run")).keys()


def test_a_run_that_was_killed_has_its_row(tmp_path: Path) -> None:
    logger = BucketTensorBoardLogger(str(tmp_path / "tensorboard"))
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"best/accuracy": 0.5}, 1)
    logger.publish()
    with serve([str(tmp_path)], host="localhost", port=0) as (address, _):
        eventually_holds(lambda: assert_row_without_an_end(address))


def assert_row_without_an_end(address: str) -> None:
    (row,) = rows(address).values()
    assert (row["status"], row["hparams"], metrics(row)) == ("STATUS_UNKNOWN", {"lr": 0.1}, {"best/accuracy": 0.5})


def test_hyperparameters_are_short_and_have_no_secrets() -> None:
    config = {
        "seed_everything": 7,
        "run_dir": "gs://b/1",
        "model": {
            "lr": None,
            "milestones": [1, 2],
            "seed": 7,
            "ema": 0.0,
            "weights": "https://host/w.pth?token=ya29.secret",
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 0.001, "weight_decay": 0.05, "betas": [0.9, 0.999], "foreach": None},
            },
            "hidden": "x" * 1000,
        },
        "data": {"train": ["gs://b/a", "gs://b/c"], "num_workers": 3, "global_batch_size": 32},
        "trainer": {"max_epochs": 3, "gradient_clip_val": float("inf")},
    }
    found = hyperparameters(yaml.safe_dump(config))
    assert found.pop("hidden") == "x" * MOST_CHARACTERS
    weights = found.pop("weights")
    assert isinstance(weights, str)
    assert "secret" not in weights
    assert found == {
        "milestones": "[1, 2]",
        "ema": 0.0,
        "optimizer": "AdamW(weight_decay=0.05)",
        "data": "[gs://b/a, gs://b/c]",
        "batch_size": 32,
        "epochs": 3,
        "seed": 7,
    }
    assert len(plain_values({str(number): number for number in range(1000)})) == 100


def test_names_of_others_are_no_markup() -> None:
    text = configuration_text("a: '```\n<script>'\n# b")
    assert all(line.startswith("    ") for line in text.split("\n"))
    report = ReportContent(
        run_dir="run",
        started="",
        epochs=1,
        global_step=1,
        world_size=1,
        accelerator="cpu",
        classes=["a", "b"],
        images={},
        bad_samples=["a`|b\n# title"] * 30,
        skipped_steps=0,
        train_images_per_second=None,
        metrics={},
        confusion_matrix=None,
        checkpoints=None,
        attempt_count=1,
        seconds={"goodput": 0.5, "wall": 2.0, "recomputed": 1.0},
        versions={},
    )
    assert report_text(report).count("    - `aˋ¦b\\x0a# title`") == 20
    assert "    - recomputed steps 1 s" in report_text(report)
