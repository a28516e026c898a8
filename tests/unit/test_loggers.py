"""``--trainer.logger``: loggers beside that of TensorBoard."""

from __future__ import annotations

import csv
import json
import re
import uuid
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from support import TINY, fit_here, options, picture_files, run_here, scalars, write_files

from job.errors import ConfigError
from job.train import loggers
from job.train.loggers import TolerantLogger, additional_loggers, require_installed


class Failing(Logger):
    """A logger whose server is away."""

    name, version = "failing", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("the server\nis away")

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_csv_files_lie_in_run_dir_one_per_attempt(tmp_path: Path) -> None:
    fit_here(tmp_path, trainer__max_epochs=1, trainer__logger="csv")
    run_dir = fit_here(tmp_path, trainer__max_epochs=2, trainer__logger="csv")
    events = scalars(str(run_dir))
    losses = [
        (int(row["step"]), float(row["train/loss"]))
        for attempt in (0, 1)
        for row in rows_of(run_dir / "csv" / f"version_{attempt}" / "metrics.csv")
        if row["train/loss"]
    ]
    assert dict(losses) == pytest.approx(dict(events["train/loss"]))
    assert any(row.get("best/accuracy") for row in rows_of(run_dir / "csv" / "version_0" / "metrics.csv"))
    hyperparameters = yaml.safe_load((run_dir / "csv" / "version_0" / "hparams.yaml").read_text())
    assert hyperparameters["batch_size"] == 8
    # A saved configuration with loggers evaluates without them.
    assert run_here("validate", run_dir).returncode == 0
    assert not (run_dir / "csv" / "version_2").exists()


def test_a_class_with_arguments_and_a_list(tmp_path: Path) -> None:
    chosen = [{"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "mine"), "name": "x"}}, "csv"]
    run_dir = fit_here(tmp_path, trainer__max_epochs=1, trainer__logger=json.dumps(chosen))
    assert rows_of(tmp_path / "mine" / "x" / "version_0" / "metrics.csv")
    assert rows_of(run_dir / "csv" / "version_0" / "metrics.csv")
    evaluated = run_here("validate", run_dir)
    assert (evaluated.returncode, "not used" in evaluated.output) == (0, False), evaluated.output


def test_a_logger_that_fails_is_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = TolerantLogger(Failing())
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert [record.getMessage() for record in caplog.records if "Failing" in record.message] == [
        "Failing failed and is switched off; training goes on: the server"
    ]
    run_dir = fit_here(tmp_path, trainer__max_epochs=1, trainer__logger="test_loggers.Failing")
    assert "train/loss" in scalars(str(run_dir))


def test_a_package_that_is_missing_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    root = write_files(tmp_path / "colours", picture_files(["blue", "red"], 10))
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow"), ("CometLogger", "comet-ml")):
        outcome = run_here("fit", *options(TINY, data__root=root, run_dir=tmp_path / "run", trainer__logger=name))
        assert (outcome.returncode, f"pip install {package}" in outcome.output) == (2, True), outcome.output
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_no_logger_is_one_message(tmp_path: Path) -> None:
    outcome = run_here("fit", tmp_path, "--data.root", tmp_path, "--trainer.logger", "weights_and_biases")
    assert outcome.returncode == 2
    assert "--trainer.logger" in outcome.output
    assert "Traceback" not in outcome.output


def test_secrets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: True)
    chosen = Namespace(class_path="pytorch_lightning.loggers.CometLogger", init_args=Namespace(api_key="s3cr3t"))
    with pytest.raises(ConfigError, match=r"--trainer\.logger\.api_key would be saved") as caught:
        require_installed([chosen])
    assert "s3cr3t" not in str(caught.value)


def test_tensorboard_is_there_already(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TensorBoardLogger is not supported"):
        additional_loggers(TensorBoardLogger(tmp_path), str(tmp_path))


def test_the_help_lists_loggers_that_are_accepted() -> None:
    text = "".join(run_here("fit", "--help-all").output.split())
    listed = re.search(r"--trainer\.loggerLOGGER.*?supportedclasses:([^)]*)\)", text)
    assert listed is not None
    assert listed[1].split(",") == [
        *(f"pytorch_lightning.loggers.{name}Logger" for name in ("CSV", "Wandb", "MLFlow", "Comet")),
        "yourown",
    ]


def test_of_a_run_in_a_bucket_they_lie_in_a_local_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (logger,) = additional_loggers("csv", f"memory://{uuid.uuid4().hex}/run7")
    assert isinstance(logger, TolerantLogger)
    assert isinstance(logger.inner, CSVLogger)
    assert logger.save_dir == str(tmp_path / "lightning_logs" / "run7")
    (tmp_path / "file").touch()
    monkeypatch.setattr(loggers, "FOLDER", "file")
    with pytest.raises(ConfigError, match="cannot be created"):
        additional_loggers("csv", "memory://bucket/run7")


class Wandb(WandbLogger):
    """The logger of W&B with a run that is a stand-in: its package is not installed."""

    def __init__(self) -> None:
        self.codes: list[int] = []

    @property
    def experiment(self) -> Any:
        return self

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)

    def finalize(self, status: str) -> None:
        pass


def test_a_run_of_wandb_is_ended_where_the_process_ends_without_atexit() -> None:
    inner = Wandb()
    logger = TolerantLogger(inner)
    logger.finalize("success")
    assert inner.codes == []
    logger.finalize("failed")
    assert inner.codes == [1]
