"""Predictions against the labels that the data has: the metrics of ``validate``, and a file of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from job.checkpoint import confusion
from job.cluster import ranks
from job.data.index.index import Index
from job.model.evaluation import Evaluation
from job.model.tasks import TASKS
from job.monitoring.report.measures import most_confused, per_class, result_of
from job.predict.output import Row
from job.predict.predictor import Predictor
from job.process.terminal import print_table, say
from job.storage.json_files import write_json

log = logging.getLogger(__name__)

WORST_ERRORS = 12
CLASSES_SHOWN = 10
CLASSES_LISTED = 1000
"""Classes that the network does not know, which the terminal and the file name."""
OF_ALL_PROBABILITIES = ("loss", "auroc", "mAP", "average_precision_of/")
"""Metrics, and a prefix of some, that follow from the probabilities of all classes only."""
TOP_FIVE = "top5_accuracy"


class Evaluator:
    """Compares predictions with the labels of an index, in its order; on one process alone.

    Images that cannot be read or have no label do not count, nor those of a class that the network does not know. The
    latter are counted by class. Of several labels per image, those that are known count.

    The metrics are those of ``validate``, from the same code. The loss follows from the probabilities, where
    ``validate`` has logits: it differs where a probability rounds to 0.

    Args:
        predictor: whose predictions these are.
        index: the images and their labels.
        top_k: number of classes of each prediction whose probabilities are known; None: all.

    Attributes:
        images: images that count.
        unlabelled: images without a label.
        unknown: images by the name of a class that the network does not know.
    """

    def __init__(self, predictor: Predictor, index: Index, top_k: int | None = None) -> None:
        self.predictor = predictor
        self.index = index
        self.top_k = top_k if top_k is not None and top_k < len(predictor.classes) else None
        self.images = 0
        self.unlabelled = 0
        self.unknown: Counter[str] = Counter()
        self._accepted = self._accepted_correct = 0
        self._next_sample = 0
        self._numbers = {name: number for number, name in enumerate(predictor.classes)}
        # By class number of the index, the last for -1, no label.
        self._known = np.array([*(self._numbers.get(name, -1) for name in index.classes), -1], np.int64)
        self._takes_several = TASKS[predictor.net.task].takes_several_labels
        self._metrics = TASKS[predictor.net.task].make_metrics(predictor.classes, samples=len(index), synchronise=False)
        if self._metrics.thresholds is not None:
            self._metrics.thresholds = list(predictor.thresholds)

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add the next rows of the index, as entries of JSON lines."""
        samples = np.arange(self._next_sample, self._next_sample + len(entries))
        self._next_sample += len(entries)
        if not len(entries):
            return
        readable = np.array([entry.get("error") is None for entry in entries])
        labels, counts = self._multi_hot(samples) if self._takes_several else self._labels(samples)
        mask = torch.from_numpy(readable & counts)
        self.images += int(mask.sum())
        probabilities = self._probabilities(entries)
        if self.predictor.reject_below is not None:
            accepted = torch.tensor([entry.get("rejected") is False for entry in entries]) & mask
            self._accepted += int(accepted.sum())
            self._accepted_correct += int((probabilities.argmax(dim=1) == labels)[accepted].sum())
        losses = self._losses(probabilities, labels)
        self._metrics.update(losses, probabilities, labels, mask, torch.from_numpy(samples))

    def watch(self, batches: Iterable[list[Row]]) -> Iterator[list[Row]]:
        """Add the rows of all batches, and pass them on."""
        for rows in batches:
            self.add([row.as_json(self.predictor) for row in rows])
            yield rows

    def compute(self) -> Evaluation:
        """The evaluation, without what does not follow from the probabilities of ``top_k`` classes."""
        evaluation = self._metrics.compute()
        if self.predictor.reject_below is not None and self.images:
            evaluation.metrics["coverage"] = self._accepted / self.images
            if self._accepted:
                evaluation.metrics["selective_accuracy"] = self._accepted_correct / self._accepted
        if self.top_k is None:
            return evaluation
        dropped = OF_ALL_PROBABILITIES + (("ece",) if self._takes_several else ())
        dropped += (TOP_FIVE,) if self.top_k < 5 else ()
        metrics = {name: value for name, value in evaluation.metrics.items() if not name.startswith(dropped)}
        calibration = None if self._takes_several else evaluation.calibration
        return Evaluation(metrics, evaluation.confusion, calibration)

    def write(self, uri: str, evaluation: Evaluation) -> None:
        """Write the metrics, the confusion matrix and what a report shows of them."""
        classes = self.predictor.classes
        cells = evaluation.confusion
        result = result_of(evaluation, 0, classes, self.index.uri, WORST_ERRORS)
        details = msgspec.to_builtins(result)
        del details["global_step"]
        write_json(
            uri,
            {
                "model": self.predictor.fingerprint,
                "precision": self.predictor.precision,
                "images": self.images,
                "unlabelled": self.unlabelled,
                "images_of_unknown_classes": dict(self.unknown.most_common(CLASSES_LISTED)),
                "metrics": evaluation.metrics,
                "classes": list(classes),
                "confusion_matrix": confusion.as_json(cells, len(classes)),
                "per_class": msgspec.to_builtins(per_class(cells, classes)),
                "most_confused": msgspec.to_builtins(most_confused(cells, classes)),
                **details,
            },
        )

    def print(self, evaluation: Evaluation) -> None:
        """Print the metrics, and which images do not count."""
        rows = [(name, f"{value:.4f}") for name, value in evaluation.metrics.items()]
        if rows:
            print_table(["metric", "value"], rows, title=f"{self.images:,} image(s) with a label", right=["value"])
        if self.unlabelled:
            say(f"{self.unlabelled:,} image(s) without a label do not count.")
        if self.unknown:
            named = ", ".join(f"{name} ({count:,})" for name, count in self.unknown.most_common(CLASSES_SHOWN))
            more = f" and {len(self.unknown) - CLASSES_SHOWN:,} more" if len(self.unknown) > CLASSES_SHOWN else ""
            whose = "label(s)" if self._takes_several else "image(s)"
            say(
                f"{self.unknown.total():,} {whose} of {len(self.unknown):,} class(es) that the network does not know "
                f"do not count: {named}{more}."
            )

    def _labels(self, samples: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The network's class of each sample, int64 [N], 0 where there is none, and whether it has one, bool [N]."""
        numbers = self.index.labels_of(samples)
        known = self._known[numbers]
        self.unlabelled += int((numbers < 0).sum())
        self._count_unknown(numbers[(numbers >= 0) & (known < 0)])
        return torch.from_numpy(known.clip(0)), known >= 0

    def _multi_hot(self, samples: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The network's classes of each sample, uint8 [N, C], and whether it counts, bool [N]."""
        targets = torch.zeros(len(samples), len(self._numbers), dtype=torch.uint8)
        if self.index.has_several_labels:
            rows, numbers = self.index.multi_hot_of(samples).nonzero()
            known = self._known[numbers]
            self._count_unknown(numbers[known < 0])
            targets[rows[known >= 0], known[known >= 0]] = 1
            return targets, np.ones(len(samples), np.bool_)
        labels, counts = self._labels(samples)
        targets[np.flatnonzero(counts), labels[counts]] = 1
        return targets, counts

    def _count_unknown(self, numbers: np.ndarray) -> None:
        for number, count in zip(*(each.tolist() for each in np.unique(numbers, return_counts=True)), strict=True):
            self.unknown[self.index.classes[number]] += count

    def _probabilities(self, entries: Sequence[Mapping[str, Any]]) -> Tensor:
        """float [N, C]; 0 for classes whose probability is not known, 1 for those of them that are predicted."""
        values = np.zeros((len(entries), len(self._numbers)), np.float32)
        for row, entry in zip(values, entries, strict=True):
            if entry.get("error") is not None:
                continue
            listed = entry["probabilities"]
            if self.top_k is None:
                row[:] = list(listed.values())
                continue
            row[[self._numbers[name] for name in listed]] = list(listed.values())
            row[[self._numbers[name] for name in entry.get("labels") or () if name not in listed]] = 1
        return torch.from_numpy(values)

    def _losses(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy per sample, or mean binary cross-entropy over its classes; float [N]."""
        tiny = torch.finfo(torch.float32).tiny
        if not self._takes_several:
            return -probabilities.gather(1, labels[:, None])[:, 0].clamp_min(tiny).log()
        right = torch.where(labels > 0, probabilities, 1 - probabilities)
        return -right.clamp_min(tiny).log().mean(dim=1)


def evaluator_of(predictor: Predictor, index: Index, top_k: int | None = None) -> Evaluator | None:
    """The evaluator on rank 0 for an index with labels of the kind that the network predicts, else None.

    Args:
        predictor: the network.
        index: the images.
        top_k: see :class:`Evaluator`.
    """
    if not index.classes or ranks.rank():
        return None
    if index.has_several_labels and not TASKS[predictor.net.task].takes_several_labels:
        log.warning("the images have several labels each, and the network predicts one: no accuracy is computed")
        return None
    return Evaluator(predictor, index, top_k)
