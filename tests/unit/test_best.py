"""The best checkpoint: finite and comparable metrics; stopped runs stay stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from support import TINY, Outcome, assert_same_weights, options, picture_files, run_here, scalars, write_files

from job import checkpoint
from job.checkpoint.callback import Checkpointer
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.manifest import Manifest
from job.checkpoint.ranking import implied_mode, ranked
from job.checkpoint.retention import Retention
from job.checkpoint.settings import CheckpointSettings
from job.errors import ConfigError
from job.monitoring.report.writer import ReportWriter
from job.resilience.preemption import Preemption


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val/loss", "min"),
        ("val/accuracy", "max"),
        ("val/f1", "max"),
        ("val/auroc", "max"),
        ("val/accuracy_of/loss", "max"),
        ("val/mean_absolute_error", "min"),
        ("val_loss", "min"),
        ("val/colour", None),
        ("val/accuracy_error", None),
    ],
)
def test_the_mode_follows_from_the_metrics_name(metric: str, mode: str | None) -> None:
    assert implied_mode(metric) == mode
    if mode is None:
        with pytest.raises(ConfigError, match=r"Give --checkpoint\.mode"):
            CheckpointSettings(monitor=metric)
        assert CheckpointSettings(monitor=metric, mode="min").ranking_mode == "min"
    else:
        assert CheckpointSettings(monitor=metric).ranking_mode == mode


def manifest(step: int, loss: float, validation: str = "a", monitor: str = "val/loss") -> Manifest:
    metrics = {"val/loss": loss, "val/accuracy": 1 - loss}
    mode = "min" if monitor == "val/loss" else "max"
    name = f"epoch=001-step={step:08d}.ckpt"
    return Manifest(name, 1, "", 1, 0, step, monitor, mode, metrics, None, validation)  # type: ignore[arg-type]


def test_the_newest_checkpoints_metric_ranks_all_checkpoints() -> None:
    manifests = [manifest(1, 0.1, monitor="val/accuracy"), manifest(2, 0.3), manifest(3, 0.2)]
    assert [m.global_step for m in ranked(manifests)] == [1, 3, 2]


def test_other_validation_samples_start_the_ranking_anew_and_keep_the_best_of_before() -> None:
    manifests = [
        manifest(1, 0.1),
        manifest(2, 0.2),
        manifest(3, 0.4, "b"),
        manifest(4, 0.3, "b"),
        manifest(5, 0.5, "b"),
    ]
    assert [m.global_step for m in ranked(manifests)] == [4, 3, 5]
    gone = Retention(CheckpointSettings(monitor="val/loss", keep_last=1, keep_best=1), "").superseded(manifests)
    assert [m.global_step for m in gone] == [2, 3]


def fit(tmp_path: Path, colours: Path, *arguments: str, **changes: object) -> Outcome:
    fixed = {"run_dir": tmp_path / "run", "data__cache_dir": tmp_path / "cache", "data__num_workers": 0}
    settings = options(TINY, data__root=colours, features__use="never", model__milestones="[9]", **fixed, **changes)
    return run_here("fit", *settings, *arguments)


def steps(tmp_path: Path) -> list[tuple[int, int, int]]:
    return [(m.epoch, m.batch, m.global_step) for m in checkpoint.manifests(str(tmp_path / "run"))]


def stopping(**settings: object) -> str:
    chosen = {"monitor": "val/loss", "patience": 1, "min_delta": 100.0, **settings}
    return json.dumps([{"class_path": "pytorch_lightning.callbacks.EarlyStopping", "init_args": chosen}])


def test_an_early_stopped_run_stays_ended_until_its_callback_changes(tmp_path: Path, colours: Path) -> None:
    first = fit(tmp_path, colours, trainer__callbacks=stopping(), trainer__max_epochs=9)
    assert first.returncode == 0, first.output
    steps_before, report = steps(tmp_path), json.loads((tmp_path / "run/report.json").read_text())
    assert steps_before[-1] == (2, 0, 8)
    repeated = fit(tmp_path, colours, trainer__callbacks=stopping(), trainer__max_epochs=9)
    assert steps(tmp_path) == steps_before
    assert "stopped this run after epoch" in repeated.output
    assert "larger patience" in repeated.output
    assert json.loads((tmp_path / "run/report.json").read_text()) == report  # with its images/s
    continued = fit(tmp_path, colours, trainer__callbacks=stopping(patience=3), trainer__max_epochs=9)
    assert continued.returncode == 0, continued.output
    assert "EarlyStopping's patience was 1, is 3" in continued.output
    assert steps(tmp_path)[-1] == (4, 0, 16)  # patience 3 held, not the 1 of the checkpoint


@pytest.mark.parametrize("interval", [0.5, 0.25])
def test_a_resume_after_a_validation_within_an_epoch_is_exact(interval: float, tmp_path: Path, colours: Path) -> None:
    more = {"trainer__val_check_interval": interval, "checkpoint__keep_last": 99, "trainer__max_epochs": 2}
    assert fit(tmp_path / "whole", colours, **more).returncode == 0
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    assert fit(tmp_path / "cut", colours, **more).returncode == 0
    assert len(steps(tmp_path / "whole")) == 2 / interval
    for later in checkpoint.manifests(str(cut))[1:]:
        checkpoint.remove(f"{cut}/checkpoints/{later.file}")
    assert fit(tmp_path / "cut", colours, **more).returncode == 0
    assert_same_weights(str(whole), str(cut))
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    one, other = scalars(str(whole)), scalars(str(cut))
    for tag in ("train/loss", "val/loss", "lr/head"):
        assert one[tag] == other[tag]


def test_an_accumulation_schedule_holds_where_a_run_goes_on_within_an_epoch(tmp_path: Path, colours: Path) -> None:
    schedule = {"class_path": "pytorch_lightning.callbacks.GradientAccumulationScheduler"}
    callbacks = json.dumps([{**schedule, "init_args": {"scheduling": {"0": 1, "1": 2}}}])
    more = {"trainer__callbacks": callbacks, "checkpoint__keep_last": 99, "trainer__max_epochs": 2}
    for name in ("whole", "cut"):
        assert fit(tmp_path / name, colours, "--checkpoint.every_n_steps=1", **more).returncode == 0
    cut = tmp_path / "cut" / "run"
    for later in checkpoint.manifests(str(cut))[-1:]:
        checkpoint.remove(f"{cut}/checkpoints/{later.file}")
    assert steps(tmp_path / "cut")[-1] == (1, 2, 5)
    assert fit(tmp_path / "cut", colours, "--checkpoint.every_n_steps=1", **more).returncode == 0
    assert steps(tmp_path / "cut")[-1] == (2, 0, 6)
    assert_same_weights(str(tmp_path / "whole" / "run"), str(cut))
    other = callbacks.replace('"1": 2', '"1": 4')
    refused = fit(tmp_path / "cut", colours, trainer__callbacks=other, trainer__max_epochs=3)
    assert refused.returncode == 2
    assert "trainer.accumulate_grad_batches was {0: 1, 1: 2}, is {0: 1, 1: 4}" in refused.output


def test_a_changed_metric_or_validation_set_is_reported(tmp_path: Path, colours: Path) -> None:
    assert fit(tmp_path, colours, trainer__max_epochs=1).returncode == 0
    other = fit(tmp_path, colours, trainer__max_epochs=2, checkpoint__monitor="val/loss")
    assert "ranked by the lowest val/loss" in other.output, other.output
    refused = fit(tmp_path, colours, "--checkpoint.mode=max", trainer__max_epochs=9, checkpoint__monitor="val/colour")
    assert refused.returncode == 2
    assert "hold no 'val/colour'" in refused.output


def test_other_validation_samples_are_reported(tmp_path: Path, colours: Path) -> None:
    other = write_files(tmp_path / "other", picture_files(["blue", "red"], 6, seed=9))
    for epochs, validation in ((1, colours), (2, other)):
        settings = options(
            TINY,
            data__train=colours,
            data__val=validation,
            run_dir=tmp_path / "run",
            data__cache_dir=tmp_path / "cache",
            trainer__max_epochs=epochs,
            features__use="never",
        )
        outcome = run_here("fit", *settings)
        assert outcome.returncode == 0, outcome.output
    assert "the validation samples changed from 40 images" in outcome.output
    assert len(ranked(checkpoint.manifests(str(tmp_path / "run")))) == 1


def test_the_report_leads_with_the_checkpoint_that_predicts(tmp_path: Path, colours: Path) -> None:
    """At a high learning rate the loss rises, so that the best is not the last."""
    optimizer = "{class_path: torch.optim.SGD, init_args: {lr: 3.0}}"
    outcome = fit(
        tmp_path, colours, model__optimizer=optimizer, checkpoint__monitor="val/loss", checkpoint__keep_last=9
    )
    assert outcome.returncode == 0, outcome.output
    report = json.loads((tmp_path / "run/report.json").read_text(), parse_constant=pytest.fail)
    manifests = checkpoint.manifests(str(tmp_path / "run"))
    best = min(manifests, key=lambda m: m.metrics["val/loss"] or 0)
    assert checkpoint.resolve(str(tmp_path / "run")).endswith(best.file)
    assert report["metrics"] == report["checkpoints"]["best"]["metrics"] == best.metrics
    assert report["checkpoints"]["last"]["metrics"] == manifests[-1].metrics
    assert sum(map(sum, report["confusion_matrix"]["counts"])) == 8
    assert re.search(r"best checkpoint.*last checkpoint", outcome.output, re.DOTALL)


def test_images_per_second_counts_images_that_were_trained_on(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of one batch per epoch, and after a resume within an epoch."""
    counted: list[int] = []
    write = ReportWriter.on_fit_end

    def count(self: ReportWriter, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        counted.append(self.recorder.train_images)
        write(self, trainer, module)

    monkeypatch.setattr(ReportWriter, "on_fit_end", count)
    assert fit(tmp_path / "limit", colours, trainer__limit_train_batches=1, trainer__max_epochs=2).returncode == 0
    assert counted == [16]
    for _ in range(2):
        more = fit(tmp_path, colours, "--checkpoint.every_n_steps=2", "--trainer.max_epochs=1")
        assert more.returncode == 0, more.output
        run_dir = str(tmp_path / "run")
        checkpoint.remove(f"{run_dir}/checkpoints/{checkpoint.manifests(run_dir)[-1].file}")
    assert counted == [16, 32, 16]


class NumpyScore(Callback):
    """Save a NumPy scalar, as many callbacks do, and optionally an instance of a custom class."""

    def __init__(self, hostile: bool = False) -> None:
        self.hostile = hostile

    def state_dict(self) -> dict[str, object]:
        return {"score": np.float64(0.5), "count": np.int64(3), **({"object": Score()} if self.hostile else {})}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        assert type(state_dict["score"]) is float


class Score:
    """A class that ``weights_only`` loading refuses."""


def test_a_callbacks_state_can_be_loaded(tmp_path: Path, colours: Path) -> None:
    callbacks = json.dumps([{"class_path": "test_best.NumpyScore"}])
    for epochs in (1, 2):
        outcome = fit(tmp_path, colours, trainer__callbacks=callbacks, trainer__max_epochs=epochs)
        assert outcome.returncode == 0, outcome.output
    hostile = callbacks.replace("}", ', "init_args": {"hostile": true}}')
    refused = fit(tmp_path / "other", colours, trainer__callbacks=hostile)
    assert refused.returncode == 2, refused.output
    assert "callbacks → NumpyScore → object is a test_best.Score" in refused.output
    assert not steps(tmp_path / "other")


def test_a_checkpoint_has_only_the_metrics_of_its_step(tmp_path: Path, colours: Path) -> None:
    """A run stopped within a validation validates again; the checkpoint of that step has the metrics."""
    keeper = Checkpointer(CheckpointSettings(), str(tmp_path), BackgroundCheckpointIO(), Preemption(1.0))
    keeper._saved, keeper._saved_metrics, keeper._validated_at = (5, 0), False, 5
    names: list[str] = []

    class FakeTrainer:
        global_step = 5

        def save_checkpoint(self, path: str) -> None:
            names.append(path)

    keeper._save(FakeTrainer(), epoch=0, batch=5)  # type: ignore[arg-type]
    keeper._save(FakeTrainer(), epoch=0, batch=5)  # type: ignore[arg-type]
    assert [name.rpartition("/")[2] for name in names] == ["epoch=000-step=00000005-validated.ckpt"]


def test_a_metric_that_is_undefined_for_the_validation_images_is_explained(tmp_path: Path) -> None:
    """Multi-label validation without any label has a loss and no mAP."""
    keeper = Checkpointer(CheckpointSettings(monitor="val/mAP"), str(tmp_path), BackgroundCheckpointIO(), Preemption(1))
    keeper._validated_at = 5

    class FakeTrainer:
        def __init__(self) -> None:
            self.global_step, self.validating = 5, False
            self.callback_metrics = {"val/loss": 0.5, "train/loss": 0.5}

    with pytest.raises(ConfigError, match=r"There are: val/loss\. A metric that is undefined"):
        keeper.on_save_checkpoint(FakeTrainer(), None, {})  # type: ignore[arg-type]


def test_early_stopping_counts_validations_of_the_checkpoints_metric(tmp_path: Path, colours: Path) -> None:
    """A run that learns nothing ends after its first validation and N more, however often it is interrupted."""
    still = {"model__lr": 1e-30, "checkpoint__monitor": "val/loss", "trainer__max_epochs": 9}
    whole = fit(tmp_path / "whole", colours, "--early_stopping=3", **still)
    assert whole.returncode == 0, whole.output
    assert "early stopping after epoch 4: val/loss has not improved" in whole.output
    assert "the run ends before epoch 10, in which more layers would be unfrozen" in whole.output
    ended = steps(tmp_path / "whole")
    assert ended[-1] == (4, 0, 16)

    assert fit(tmp_path, colours, "--patience=3", **{**still, "trainer__max_epochs": 2}).returncode == 0
    resumed = fit(tmp_path, colours, "--patience", "3", **still)
    assert "early stopping after epoch 4" in resumed.output
    assert steps(tmp_path)[-1] == ended[-1]
    repeated = fit(tmp_path, colours, "--early_stopping=3", **still)
    assert "a larger patience by --early_stopping" in repeated.output
    longer = fit(tmp_path, colours, "--early_stopping=5", **still)
    assert "EarlyStopping's patience was 3, is 5" in longer.output
    assert steps(tmp_path)[-1] == (6, 0, 24)
    config = (tmp_path / "run/config.yaml").read_text()
    assert "early_stopping: 5" in config
    validated = run_here("validate", tmp_path / "run")
    assert validated.returncode == 0, validated.output


def test_early_stopping_counts_validations_within_an_epoch(tmp_path: Path, colours: Path) -> None:
    settings = {"model__lr": 1e-30, "trainer__val_check_interval": 0.5, "trainer__max_epochs": 9}
    outcome = fit(tmp_path, colours, early_stopping=3, **settings)
    assert "early stopping after epoch 2" in outcome.output, outcome.output


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainer__callbacks": stopping()}, "both given"),
        ({"trainer__limit_val_batches": 0}, "needs validations"),
        ({"early_stopping": -1}, "early_stopping"),
    ],
)
def test_early_stopping_that_cannot_work_is_refused(
    changes: dict[str, object], expected: str, tmp_path: Path, colours: Path
) -> None:
    refused = fit(tmp_path, colours, **{"early_stopping": 2, **changes})
    assert refused.returncode == 2, refused.output
    assert expected in refused.output
    assert not (tmp_path / "run").exists()
