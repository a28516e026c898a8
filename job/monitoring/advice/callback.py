"""Gives advice on a run after each validation."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, EarlyStopping

from job import storage
from job.cluster import ranks
from job.data.datamodule import ImageDataModule, image_data
from job.data.loader import BatchLoader
from job.data.repeated_images import RepeatedImages, find_repeated_images
from job.errors import JobError
from job.model.evaluation import Evaluation
from job.model.module import TransferLearningModel
from job.monitoring.advice import Advice, Context, advise
from job.monitoring.history import ValidationRecord
from job.process.cpus import available_cpus

log = logging.getLogger(__name__)


class Advisor(Callback):
    """Logs each kind of advice once per attempt as a warning, on rank 0.

    Args:
        history: returns the validations of the run so far, that of the moment included.

    Attributes:
        advice: advice after the last validation.
    """

    def __init__(self, history: Callable[[], Sequence[ValidationRecord]]) -> None:
        self.history = history
        self.advice: list[Advice] = []
        self._logged: set[str] = set()
        self._has_failed = False
        self._class_counts: tuple[int, ...] = ()
        self._repeated_images: RepeatedImages | None = None
        self._search: threading.Thread | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the images of each class, and look for repeated ones beside the training."""
        if not trainer.is_global_zero:
            return
        data = image_data(trainer)
        self._class_counts = tuple(data.parts["train"].class_counts().tolist())
        self._search = threading.Thread(target=self._find_repeated, args=(data,), name="repeated-images", daemon=True)
        self._search.start()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update :attr:`advice`, and log kinds that are new in this attempt."""
        module = cast("TransferLearningModel", pl_module)
        evaluation = module.evaluation
        if not trainer.is_global_zero or trainer.state.fn != "fit" or evaluation is None:
            return
        classes = image_data(trainer).classes
        try:
            self.advice = advise(self.history(), evaluation, classes, self._context(trainer, module, evaluation))
        except Exception as error:  # rank 0 must not end where the others go on
            if not self._has_failed:
                log.warning("there is no advice on this run: %s: %s", type(error).__name__, error)
            self._has_failed = True
        for each in self.advice:
            if each.kind not in self._logged:
                self._logged.add(each.kind)
                log.warning("%s %s", each.message, each.suggestion)

    def _context(self, trainer: pl.Trainer, module: TransferLearningModel, evaluation: Evaluation) -> Context:
        data, config, confusion = image_data(trainer), module.config, evaluation.confusion
        loader = cast("BatchLoader", trainer.train_dataloader)
        group = trainer.optimizers[0].param_groups[0]
        return Context(
            class_counts=self._class_counts,
            train_images=min(len(data.parts["train"]), int(trainer.num_training_batches) * data.global_batch_size),
            val_images=int((confusion[0] if confusion.ndim == 3 else confusion[:, 2]).sum()),
            has_several_labels=module.task.takes_several_labels,
            max_epochs=None if trainer.max_epochs == -1 else trainer.max_epochs,
            milestones=tuple(config.milestones),
            early_stopping=any(isinstance(each, EarlyStopping) for each in trainer.callbacks),  # type: ignore[attr-defined]
            lr=float(group.get("initial_lr", group["lr"])),
            backbone_lr_factor=config.backbone_lr_factor,
            has_augmentation=data.augment is not None,
            mixes_images=bool(config.mixup or config.cutmix),
            label_smoothing=config.label_smoothing,
            is_balanced=data.sampling == "balanced" or config.class_weights == "balanced",
            image_size=data.image_size,
            num_workers=loader.threads + loader.num_workers,
            available_cpus=max(available_cpus() // ranks.local_world_size(), 1),
            trains_on_cpu=module.device.type == "cpu",
            data_bytes=_cacheable_bytes(data),
            cache_bytes=data.cache_bytes,
            has_cached_features=bool(data.features),
            repeated_images=self._repeated_images,
        )

    def _find_repeated(self, data: ImageDataModule) -> None:
        try:
            self._repeated_images = find_repeated_images(data.parts["train"], str(data.cache_dir))
        except JobError as error:
            log.debug("no search for repeated images: %s", error)  # training reports what it cannot read


def _cacheable_bytes(data: ImageDataModule) -> int:
    """Size of all images, if the cache of samples is for them."""
    stores = {uri for index in data.parts.values() for uri in index.stores}
    if not data.is_cache_usable or all(storage.is_local(uri) or storage.is_process_local(uri) for uri in stores):
        return 0
    return int(sum(index.info.mean_bytes * len(index) for index in data.parts.values()))
