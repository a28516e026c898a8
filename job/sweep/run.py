"""A sweep from beginning to end: features, cross-validation, choice of the best head, files in ``run_dir/sweep``."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl

from job import storage
from job.cluster import ranks
from job.cluster.shared_work import Helpers, ProgressBarrier, from_rank_zero
from job.data.datamodule import ImageDataModule
from job.errors import ConfigError, DataError, DivergedError
from job.features.training_options import extraction_settings, feature_precision, frozen_network
from job.model.backbone import build_skeleton
from job.model.classifier import Classifier
from job.model.config import ModelConfig
from job.model.loading import weights_file
from job.process.terminal import say
from job.resilience.lease import Lease
from job.storage.json_files import write_json
from job.sweep.crossvalidation import cross_validate, gathered, plan_of
from job.sweep.features import PartFeatures, part_features
from job.sweep.folds import copies, stratified_folds
from job.sweep.heads import Plan
from job.sweep.leaderboard import print_leaderboard, write_events
from job.sweep.result import FILE, LuckResult, SweepResult, TrialResult
from job.sweep.scores import FoldScore, Luck, luck_of, ranking, standard_error
from job.sweep.trials import SweepSettings, Trial
from job.sweep.winner import (
    Winner,
    config_of,
    train_winner,
    validate_winner,
    write_checkpoint,
    write_recipe,
)

log = logging.getLogger("job")

FOLDER = "sweep"
"""Folder of the results, below run_dir; a run_dir itself for predict, validate and export."""
MOST_BACKBONES = 100


@dataclass(frozen=True)
class Scores:
    """The result of a cross-validation.

    Attributes:
        trials: all of them.
        values: accuracy or mAP, float64 [T, folds].
        losses: cross-entropy, of the same shape.
        order: numbers of the trials, best first.
        luck: how far the best may be luck.
    """

    trials: Sequence[Trial]
    values: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    order: list[int]
    luck: Luck | None


class Sweep:
    """Heads of one or several frozen backbones, trained together and compared.

    Args:
        config: hyperparameters of the model; ``backbone`` and ``weights`` may be several, separated by commas.
        data: the images.
        settings: the heads to train.
        trainer: chooses device and precision.
        run_dir: folder of the run; the results are in its folder ``sweep``.
        options: the options that differ from their defaults, by section, for the recipe.

    Raises:
        ConfigError: an option cannot be used.
    """

    def __init__(
        self,
        config: ModelConfig,
        data: ImageDataModule,
        settings: SweepSettings,
        trainer: pl.Trainer,
        run_dir: str,
        options: Mapping[str, Any],
    ) -> None:
        self.backbones = backbones_of(config)
        self.config = self.backbones[0]
        self.data = data
        self.settings = settings
        self.trainer = trainer
        self.run_dir = run_dir
        self.folder = storage.join(run_dir, FOLDER)
        self.options = options
        self.device = trainer.strategy.root_device
        self.precision = feature_precision(trainer, "sweep")
        if data.sampling != "shuffle":
            raise ConfigError(
                "sweep does not support --data.sampling=balanced. Use --sweep.class_weights=balanced, which weights "
                "rare classes."
            )
        self._began = time.monotonic()

    def run(self) -> None:
        """Train and compare all heads, and write the results; called on all ranks."""
        data, settings = self.data, self.settings
        data.trainer = self.trainer  # as Lightning does: the index is that of run_dir
        data.setup("fit")
        self._require_classes()
        if len(self.backbones) > 1:
            ranks.from_rank_zero(self._require_backbones)
        trials = settings.trials(len(self.backbones), self.config.seed)
        train = data.parts["train"]
        plan = plan_of(
            len(train),
            settings.epochs,
            settings.batch_size,
            self.config.seed,
            train.info.run_length,
            decay_biases=self.config.decay_norm_and_bias,
        )
        lease = Lease(self.folder)
        with lease.released_at_end():
            ranks.from_rank_zero(lease.acquire)
            scores, repeated = self._cross_validate(trials, plan)
            best = scores.trials[scores.order[0]]
            config = config_of(best, self.backbones[best.backbone])
            net = self._network(config)
            val = self._features(net, "val")  # by all ranks

            def finish(helpers: Helpers | None) -> str:
                tick = helpers.tick if helpers is not None else lambda: None
                self._finish(scores, plan, repeated, net, config, val, lease, tick)
                return ""

            # No collective operation, which would end the job if this took longer than the group's timeout.
            from_rank_zero(finish, lambda job, tasks: None)

    def _require_classes(self) -> None:
        data, task = self.data, self.config.task
        if len(data.classes) < 2 and task == "classification":
            raise DataError(
                f"{data.parts['train'].root} has {len(data.classes)} class, and a classifier needs at least two."
            )
        if data.parts["train"].has_several_labels and task == "classification":
            raise ConfigError("images have several labels, or none. Use --model.task=multilabel.")

    def _require_backbones(self) -> None:
        """Find a mistyped name among several, or weights that do not exist, before the first backbone computes."""
        for config in self.backbones:
            build_skeleton(config.backbone, self.data.image_size, config.pooling)
            if config.weights not in ("DEFAULT", "none"):
                storage.info(weights_file(config.weights))

    def _cross_validate(self, trials: list[Trial], plan: Plan) -> tuple[Scores, int]:
        """Scores of all trials, and number of repeated training images."""
        folds: npt.NDArray[np.int64] | None = None
        repeated = 0
        barrier = ProgressBarrier()
        scored: list[tuple[int, int, FoldScore]] = []
        for number, config in enumerate(self.backbones):
            own = [(place, trial) for place, trial in enumerate(trials) if trial.backbone == number]
            if not own:
                continue
            part = self._features(self._network(config), "train")
            if folds is None:
                # By one rank: another node's processor may round features to other neighbours.
                folds, repeated = ranks.from_rank_zero(lambda part=part: self._folds(part, plan))  # type: ignore[misc]
                log.info(
                    "sweep: %d trials x %d folds, %d epochs of %d images in batches of %d%s",
                    len(trials),
                    self.settings.folds,
                    plan.epochs,
                    len(folds),
                    plan.batch_size,
                    f"; {repeated} images repeat another one, and are in its fold" if repeated else "",
                )
            block_bytes = self.settings.block_mb * 1e6
            scored += cross_validate(own, part, folds, plan, block_bytes, self.device, barrier.tick)
        barrier.wait()  # ranks have blocks of different sizes
        return self._scores(trials, gathered(scored)), repeated

    def _folds(self, part: PartFeatures, plan: Plan) -> tuple[npt.NDArray[np.int64], int]:
        """The fold of each training image, and the number of images that repeat another one."""
        valid = part.targets.valid.cpu().numpy()
        # The features of unreadable images are equal, which are no copies.
        groups = np.where(valid, copies(part.rows.plain, plan.seed), np.arange(len(valid)))
        labels = self.data.parts["train"].rarest_labels().astype(np.int64)
        folds = stratified_folds(labels, groups, self.settings.folds, self.data.classes, self.config.seed)
        return folds, len(groups) - len(np.unique(groups))

    def _network(self, config: ModelConfig) -> Classifier:
        return frozen_network(config, self.data.classes, self.data.image_size, self.device)

    def _features(self, net: Classifier, part: str) -> PartFeatures:
        data = self.data
        settings = extraction_settings(data, self.run_dir, self.precision)
        return part_features(net, data, part, settings, self.device)

    def _scores(self, trials: list[Trial], scored: dict[tuple[int, int], FoldScore]) -> Scores:
        shape = (len(trials), self.settings.folds)
        values, losses = np.empty(shape), np.empty(shape)
        for trial, fold in np.ndindex(*shape):
            score = scored[trial, fold]
            values[trial, fold], losses[trial, fold] = score.value, score.loss
        order = ranking(values, losses)
        if math.isnan(values[order[0]].mean()):
            raise DivergedError("no head has finite losses in all folds. Lower --sweep.lr.")
        return Scores(trials, values, losses, order, luck_of(values))

    def _finish(
        self,
        scores: Scores,
        plan: Plan,
        repeated: int,
        net: Classifier,
        config: ModelConfig,
        val: PartFeatures,
        lease: Lease,
        tick: Callable[[], None],
    ) -> None:
        """Train and validate the best head, write everything and print it; on rank 0."""
        best = scores.trials[scores.order[0]]
        train_winner(best, net, self._features(net, "train"), plan, self.device, tick)
        evaluation, metrics = validate_winner(net, config, self.data, val)
        steps = plan.epochs * math.ceil(len(self.data.parts["train"]) / plan.batch_size)
        winner = Winner(net, config, evaluation, metrics, plan, steps)
        trainer_precision = str(self.trainer.precision)
        lease.require_held()
        storage.remove(storage.join(self.folder, FILE))
        file = write_checkpoint(winner, self.data, trainer_precision, self.folder, lease)
        recipe = write_recipe(best, config, plan, self.options, self.folder, lease)
        luck = scores.luck
        result = SweepResult(
            task=config.task,
            metric="mAP" if config.task == "multilabel" else "accuracy",
            trials=[self._trial_result(scores, number) for number in scores.order],
            luck=None if luck is None else LuckResult(luck.standard_error, luck.expected, luck.trials, luck.within),
            validation={name: _finite(value) for name, value in evaluation.metrics.items()},
            checkpoint=file,
            folds=self.settings.folds,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            train_images=len(self.data.parts["train"]),
            validation_images=len(self.data.parts["val"]),
            repeated_images=repeated,
            classes=len(self.data.classes),
            seconds=round(time.monotonic() - self._began, 1),
        )
        write_events(result.trials[: self.settings.logged], result.metric, self.folder, lease.require_held)
        write_json(storage.join(self.folder, FILE), msgspec.to_builtins(result), lease.require_held)
        self._report(result, recipe)

    def _trial_result(self, scores: Scores, number: int) -> TrialResult:
        trial, values = scores.trials[number], scores.values[number]
        has_diverged = bool(np.isnan(values).any())
        return TrialResult(
            backbone=self.backbones[trial.backbone].backbone,
            lr=trial.lr,
            weight_decay=trial.weight_decay,
            hidden=list(trial.hidden),
            label_smoothing=trial.label_smoothing,
            class_weights=trial.class_weights,
            dropout=trial.dropout,
            folds=[_finite(value) for value in values.tolist()],
            mean=None if has_diverged else float(values.mean()),
            standard_error=None if has_diverged else standard_error(values.tolist()),
            loss=_finite(float(scores.losses[number].mean())),
        )

    def _report(self, result: SweepResult, recipe: str) -> None:
        print_leaderboard(result)
        measured, images = result.validation.get(result.metric), result.validation_images
        if measured is not None:
            error = f" ± {math.sqrt(measured * (1 - measured) / images):.4f}" if result.metric == "accuracy" else ""
            say(
                f"The best head, trained on all {result.train_images:,} training images: val/{result.metric} "
                f"{measured:.4f}{error} on {images:,} validation images, which had no part in the choice."
            )
        if result.luck is not None and result.luck.expected > 0:
            best = result.trials[0].mean
            log.warning(
                "the best of %d trials, %s %.4f, is partly luck: among %d equally good ones the best would exceed "
                "their mean by %.4f. %d trial(s) are within that of the best.",
                len(result.trials),
                result.metric,
                best,
                result.luck.trials,
                result.luck.expected,
                result.luck.within,
            )
        say(f"Checkpoint, as a run_dir: python -m job predict {self.folder} --input IMAGES")
        say(f"Recipe: python -m job fit RUN_DIR --config {recipe}")


def backbones_of(config: ModelConfig) -> list[ModelConfig]:
    """One configuration per backbone of ``--model.backbone A,B,C``, with weights of its own or the same for all.

    Raises:
        ConfigError: there are no names, or another number of weights.
    """
    names = [name.strip() for name in config.backbone.split(",")]
    weights = [config.weights] if len(names) == 1 else [each.strip() for each in config.weights.split(",")]
    if not all(names) or len(set(names)) < len(names) or len(names) > MOST_BACKBONES:
        raise ConfigError(
            f"--model.backbone {config.backbone} must be different names, separated by commas, at most "
            f"{MOST_BACKBONES}."
        )
    if weights in (["DEFAULT"], ["none"]):
        weights *= len(names)
    if len(weights) != len(names):
        raise ConfigError(
            f"--model.weights has {len(weights)} value(s) for {len(names)} backbones. Give DEFAULT, or one for each "
            "backbone, separated by commas, in the order of --model.backbone."
        )
    return [
        replace(config, backbone=name, weights=uri, hidden=[], dropout=0.0)
        for name, uri in zip(names, weights, strict=True)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
