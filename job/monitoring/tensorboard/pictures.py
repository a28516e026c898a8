"""Pictures in TensorBoard: a training batch, validation samples with their predictions, charts of the evaluation."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from job.data.datamodule import ImageDataModule, image_data
from job.data.dataset import Batch
from job.data.sampler import BatchIndices, ResumableBatchSampler
from job.model.evaluation import Evaluation, SamplePrediction
from job.model.module import TransferLearningModel
from job.monitoring.drawing import charts
from job.monitoring.drawing.canvas import Figure
from job.monitoring.drawing.class_labels import class_labels
from job.monitoring.drawing.curves import THRESHOLDS, pr_counts
from job.monitoring.drawing.image_grid import Tile, frame_colour, grid, join_labels, note, prediction_caption
from job.monitoring.drawing.thumbnails import SIZE, ValidationThumbnails
from job.monitoring.settings import MonitoringSettings
from job.monitoring.tensorboard.custom_scalars import layout
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger

log = logging.getLogger(__name__)

GRID_BYTES = 256 << 10
"""Limit on the JPEG of a grid of images."""
LARGEST_SHARE = 0.05
"""Share of the run's time that drawing takes, between the first validation and the last one."""
END_SECONDS = 60.0
"""How long the end of a run waits for the last pictures."""


class Pictures(Callback):
    """Draws in a background thread of rank 0, and adds the pictures to TensorBoard.

    The first and the last validation are drawn, and others only as long as :data:`LARGEST_SHARE` of the time is
    enough. An error is logged, once, and ends nothing. Training does not wait, but in one case: the first images of
    cached features with ``--data.augment`` are loaded before the first step.

    Args:
        settings: how many images are shown.
        logger: where they go.
        thumbnails: of validation samples, shared with the report.
    """

    def __init__(
        self, settings: MonitoringSettings, logger: BucketTensorBoardLogger, thumbnails: ValidationThumbnails
    ) -> None:
        self.settings = settings
        self.logger = logger
        self.thumbnails = thumbnails
        self._thread: threading.Thread | None = None
        self._due_at = 0.0
        self._waiting: Callable[[], None] | None = None
        self._has_ended = False
        self._shown: set[str] = set()
        self._adding = threading.Lock()
        self._has_failed = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the layout of the custom scalars tab."""
        if trainer.is_global_zero:
            self.logger.experiment.add_custom_scalars(layout())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Draw the first batch of a run."""
        if trainer.is_global_zero and self.settings.images and trainer.global_step == 0 and batch_idx == 0:
            data = image_data(trainer)
            try:
                load = first_images(data, batch, min(self.settings.images, len(batch["sample"])))
            except Exception as error:
                self._report(error)
                return
            self._start(lambda: self._draw_batch(load(), data.classes))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the evaluation, now or at the end of the run."""
        evaluation = cast("TransferLearningModel", pl_module).evaluation
        if not trainer.is_global_zero or evaluation is None:
            return
        # TensorBoard drops what has the step that a run resumes from, or a later one.
        data, step = image_data(trainer), max(trainer.global_step - 1, 0)
        self._waiting = lambda: self._draw_evaluation(evaluation, data, step)
        if time.monotonic() >= self._due_at:
            self._draw_waiting()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last evaluation, and wait until it is drawn; the last checkpoint is committed by now."""
        self._draw_waiting()
        if self._thread is not None:
            self._thread.join(END_SECONDS)
            if self._thread.is_alive():
                log.warning("the last pictures for TensorBoard are left out: drawing them takes too long")
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw no more: the process is to end soon."""
        self._end()

    def _end(self) -> None:
        with self._adding:
            self._has_ended = True

    def _draw_waiting(self) -> None:
        if self._waiting is None:
            return
        draw, self._waiting, self._due_at = self._waiting, None, float("inf")

        def timed() -> None:
            began = time.monotonic()
            try:
                draw()
            finally:
                now = time.monotonic()
                self._due_at = now + (now - began) / LARGEST_SHARE

        self._start(timed)

    def _start(self, draw: Callable[[], None]) -> None:
        """Draw in the background, after what is being drawn."""
        before = self._thread

        def run() -> None:
            if before is not None:
                before.join()
            try:
                if not self._has_ended:
                    draw()
            except Exception as error:
                self._report(error)

        self._thread = threading.Thread(target=run, name="pictures", daemon=True)
        self._thread.start()

    def _report(self, error: Exception) -> None:
        level = logging.DEBUG if self._has_failed else logging.WARNING
        self._has_failed = True
        log.log(level, "pictures are missing in TensorBoard: %s: %s", type(error).__name__, error, exc_info=level < 20)

    def _draw_batch(self, batch: Batch, classes: Sequence[str]) -> None:
        if (error := batch.get("error")) is not None:
            raise error
        labels = class_labels(classes)
        captions = _true_labels(batch, labels)
        images = _resized(batch["image"], batch["mask"])
        tiles = [Tile(image, (caption,)) for image, caption in zip(images, captions, strict=True)]
        title = "First training batch, augmented, before MixUp and CutMix"
        self._add("train/augmented_batch", grid(title, tiles, GRID_BYTES), 0)

    def _draw_evaluation(self, evaluation: Evaluation, data: ImageDataModule, step: int) -> None:
        labels = class_labels(data.classes)
        cells = evaluation.confusion
        draw = charts.confusion_matrix if cells.ndim == 2 else charts.decisions
        self._add("val/confusion_matrix", draw(cells, labels), step)
        if evaluation.calibration is not None:
            self._add("val/reliability_diagram", charts.reliability_diagram(evaluation.calibration), step)
        fit = evaluation.calibrator_fit
        if fit is not None and fit.after is not None:
            self._add("val/reliability_diagram_calibrated", charts.reliability_diagram(fit.after), step)
        self._add_curves(evaluation, labels, step)
        count = self.settings.images
        for tag, title, predictions in (
            (
                "val/examples",
                "Validation samples: prediction and confidence; green: right, red: wrong",
                evaluation.examples[:count],
            ),
            ("val/worst_errors", "Wrong predictions of the highest loss, the worst first", evaluation.worst[:count]),
        ):
            if predictions:
                self._add(tag, self._prediction_grid(title, predictions, data, labels), step)
            elif count and tag in self._shown:  # not the pictures of an earlier validation
                self._add(tag, note("No wrong predictions", GRID_BYTES), step)

    def _add_curves(self, evaluation: Evaluation, labels: Sequence[str], step: int) -> None:
        scores = evaluation.scores
        if scores is None:
            return
        if len(scores.positives) < len(labels):
            labels = ["all classes"]
        if (figure := charts.roc(scores, labels)) is not None:
            self._add("val/roc_curves", figure, step)
        counts = pr_counts(scores)
        for number, label in enumerate(labels):
            if scores.positives[number].any():
                values = (each[number] for each in counts)
                with self._adding:
                    if not self._has_ended:
                        self.logger.experiment.add_pr_curve_raw(f"pr_curves/{label}", *values, step, THRESHOLDS)

    def _prediction_grid(
        self, title: str, predictions: Sequence[SamplePrediction], data: ImageDataModule, labels: Sequence[str]
    ) -> Figure:
        images = self.thumbnails.jpegs(data, [each.sample for each in predictions])
        tiles = [
            Tile(
                images[each.sample],
                prediction_caption(
                    [labels[number] for number in each.labels],
                    [labels[number] for number in each.predicted],
                    each.confidence,
                ),
                frame_colour(set(each.predicted) == set(each.labels)),
            )
            for each in predictions
        ]
        return grid(title, tiles, GRID_BYTES)

    def _add(self, tag: str, figure: Figure, step: int) -> None:
        with self._adding:
            if not self._has_ended:  # the logger would open another file
                self._shown.add(tag)
                self.logger.experiment.add_encoded_image(tag, figure.content, (figure.width, figure.height), step)


def first_images(data: ImageDataModule, batch: Batch, count: int) -> Callable[[], Batch]:
    """A function that returns the first samples of a run's first batch, with images in host memory.

    Args:
        data: the images.
        batch: the batch of this rank, from which they are copied; or, if it has features, or lies in shares on several
            chips, from which they are not, but loaded in the same variants.
        count: number of samples, at most those of the batch.
    """
    if "image" in batch and batch["image"].device.type != "xla":
        # The step may change its batch, and the device's memory must not be held until this is drawn.
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        copies = {name: tensor[:count].to("cpu", copy=True) for name, tensor in tensors.items()}
        return lambda: cast("Batch", copies)
    first = data.train_dataloader().images.sampler.batch(0, 0)
    repeats = None if first.repeats is None else first.repeats[:count]
    indices = BatchIndices(0, 0, first.samples[:count], first.valid[:count], count, repeats=repeats)
    dataset = data.dataset("train", ResumableBatchSampler(1, 1, rank=0, world_size=1, seed=0, shuffle=False))
    if dataset.preprocessing.augment is None:
        return lambda: dataset[indices]
    loaded = dataset[indices]  # in this thread: a transform draws from generators that all threads of a process share
    return lambda: loaded


def _true_labels(batch: Batch, labels: Sequence[str]) -> list[str]:
    if "labels" in batch:
        return [join_labels([labels[number] for number in row.nonzero()[:, 0].tolist()]) for row in batch["labels"]]
    return [labels[number] if number >= 0 else "" for number in batch["label"].tolist()]


def _resized(pixels: Tensor, readable: Tensor) -> list[Image.Image | None]:
    """uint8 [B, 3, S, S] as images of the size of thumbnails; None where one is not readable."""
    return [
        Image.fromarray(each.permute(1, 2, 0).contiguous().numpy()).resize((SIZE, SIZE)) if valid else None
        for each, valid in zip(pixels, readable.tolist(), strict=True)
    ]
