"""The best trials on the terminal and in TensorBoard's HPARAMS tab."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from job import storage
from job.monitoring.tensorboard.event_folders import FOLDER
from job.monitoring.tensorboard.hparams_summary import session_end
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.process.terminal import print_table
from job.sweep.result import SweepResult, TrialResult

SHOWN = 10
"""Trials of the table."""
SETTINGS: dict[str, Callable[[TrialResult], str]] = {
    "backbone": lambda trial: trial.backbone,
    "lr": lambda trial: f"{trial.lr:g}",
    "weight_decay": lambda trial: f"{trial.weight_decay:g}",
    "hidden": lambda trial: "x".join(map(str, trial.hidden)) or "none",
    "label_smoothing": lambda trial: f"{trial.label_smoothing:g}",
    "class_weights": lambda trial: trial.class_weights,
    "dropout": lambda trial: f"{trial.dropout:g}",
}
"""Text of each setting of a trial."""


def print_leaderboard(result: SweepResult) -> None:
    """Print the best trials; settings that all trials share are in the title."""
    columns = [name for name, text in SETTINGS.items() if len(set(map(text, result.trials))) > 1]
    common = [f"{name} {text(result.trials[0])}" for name, text in SETTINGS.items() if name not in columns]
    rows = [
        [number, *(SETTINGS[name](trial) for name in columns), *_scores(trial)]
        for number, trial in enumerate(result.trials[:SHOWN], start=1)
    ]
    title = f"best of {len(result.trials):,} trials, {result.folds}-fold cross-validation"
    scores = [result.metric, "±", "loss"]
    print_table(
        ["", *columns, *scores], rows, title="; ".join([title, *common]), right=["", "lr", "weight_decay", *scores]
    )


def _scores(trial: TrialResult) -> list[str]:
    if trial.mean is None or trial.standard_error is None:
        return ["diverged", "", ""]
    return [f"{trial.mean:.4f}", f"{trial.standard_error:.4f}", "" if trial.loss is None else f"{trial.loss:.4f}"]


def write_events(trials: Sequence[TrialResult], metric: str, folder: str, before_write: Callable[[], None]) -> None:
    """Write each trial as a run of its own, in place of those of an earlier sweep.

    Args:
        trials: best first.
        metric: name of their score.
        folder: of the results of the sweep.
        before_write: called immediately before each write; raises if this job may not write there.

    Raises:
        StorageError: the folder cannot be written.
    """
    events = storage.join(folder, FOLDER)
    if storage.exists(events):
        for entry in storage.list_files(events):
            if not entry.is_dir:
                before_write()
                storage.remove(storage.join(events, entry.key))
    for number, trial in enumerate(trials, start=1):
        uri = storage.join(events, f"{number:03d}")
        logger = BucketTensorBoardLogger(uri, before_write=before_write)
        logger.log_hyperparams({name: getattr(trial, name) for name in SETTINGS})
        values = {metric: trial.mean, f"{metric}_standard_error": trial.standard_error, "loss": trial.loss}
        logger.log_metrics({f"cv/{name}": value for name, value in values.items() if value is not None}, step=0)
        logger.add_summary(session_end(), 0)
        logger.finalize("success")
