"""TensorBoard's TEXT tab: the classes that are recognised worst, where there are too many for a curve of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job.data.datamodule import image_data
from job.model.class_counts import counts_of_cells
from job.model.evaluation import Counts
from job.model.metrics import PER_CLASS_LIMIT
from job.model.module import TransferLearningModel
from job.monitoring.drawing.class_labels import shortened
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger

TAG = "val/worst_classes"
LISTED = 10


class WorstClasses(Callback):
    """Writes ``val/worst_classes`` after each validation of more classes than have scalars of their own, on rank 0.

    Args:
        logger: of TensorBoard.
    """

    def __init__(self, logger: BucketTensorBoardLogger) -> None:
        self.logger = logger

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the table."""
        classes = image_data(trainer).classes
        if not trainer.is_global_zero or len(classes) <= PER_CLASS_LIMIT:
            return
        assert isinstance(pl_module, TransferLearningModel)
        if pl_module.evaluation is not None:
            text = worst_classes(pl_module.evaluation.confusion, classes)
            self.logger.add_text(TAG, text, trainer.global_step - 1)


def worst_classes(confusion: Counts, classes: Sequence[str]) -> str:
    """A Markdown table of the classes with the lowest F1, of those that have samples.

    Args:
        confusion: int64 [N, 3], or [C, 2, 2], as of :class:`~job.model.evaluation.Evaluation`.
        classes: names.
    """
    hits, samples, predicted = counts_of_cells(confusion, len(classes))
    f1 = 2 * hits / np.maximum(samples + predicted, 1)
    present = np.flatnonzero(samples)
    lowest = present[f1[present].argsort(kind="stable")[:LISTED]].tolist()
    lines = ["| class | F1 | precision | recall | samples |", "|---|---:|---:|---:|---:|"]
    for number in lowest:
        correct, count, guesses = int(hits[number]), int(samples[number]), int(predicted[number])
        precision = f"{correct / guesses:.3f}" if guesses else "-"
        name = shortened(classes[number]).replace("`", "ˋ").replace("|", "¦")  # no markup
        lines.append(f"| `{name}` | {float(f1[number]):.3f} | {precision} | {correct / count:.3f} | {count:,} |")
    return "\n".join(lines)
