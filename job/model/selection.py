"""Selection of the samples whose predictions are shown: the worst errors, and a fixed selection as examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import starmap

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from job.cluster import ranks
from job.model.evaluation import MOST_IMAGES, SamplePrediction

MOST_LABELS = 20
"""Labels of one sample that are listed: what ranks exchange has a bound."""

Predictions = tuple[SamplePrediction, ...]
Predict = Callable[..., tuple[SamplePrediction, bool]]

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


class SmallestKeys:
    """The samples of this rank with the smallest keys, at most :data:`~job.model.evaluation.MOST_IMAGES`.

    Of equal keys those of smaller sample ids are kept, so that the order of samples does not matter.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self._keys: npt.NDArray[np.float64] = np.empty(0)
        self._rows: tuple[Tensor, ...] = ()

    def offer(self, keys: npt.NDArray[np.float64], eligible: Tensor | None, samples: Tensor, *details: Tensor) -> None:
        """Keep those samples whose keys are among the smallest.

        Args:
            keys: of each sample, [N].
            eligible: samples that may be kept, bool [N]; None: all.
            samples: sample ids, int64 [N].
            details: what to keep of each sample, each [N, …].
        """
        small = keys <= (self._keys[-1] if len(self._keys) == MOST_IMAGES else np.inf)
        chosen = np.flatnonzero(small if eligible is None else small & eligible.numpy())
        if not len(chosen):
            return
        keys = np.concatenate([self._keys, keys[chosen]])
        rows = tuple(each[torch.from_numpy(chosen)] for each in (samples, *details))
        if self._rows:
            rows = tuple(torch.cat(both) for both in zip(self._rows, rows, strict=True))
        order = np.lexsort((rows[0].numpy(), keys))[:MOST_IMAGES]
        self._keys = keys[order]
        self._rows = tuple(each[torch.from_numpy(order)] for each in rows)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Sample id and details of each sample."""
        return zip(*self._rows, strict=True)


class SampleSelection:
    """The wrong predictions of the highest loss, and examples that are evenly spread over the data.

    Which samples are examples follows from the evaluated sample ids alone, not from predictions or the number of ranks:
    so they are the same in each validation. A readable sample takes the place of one that cannot be read.
    """

    def __init__(self) -> None:
        self._worst = SmallestKeys()
        self._examples = SmallestKeys()

    def clear(self) -> None:
        """Forget all samples."""
        self._worst.clear()
        self._examples.clear()

    def add(self, wrong: Tensor | None, samples: Tensor, losses: Tensor, *details: Tensor) -> None:
        """Add a batch.

        Args:
            wrong: wrong predictions, bool [N]; None: any may be.
            samples: sample ids, int64 [N].
            losses: float [N].
            details: what the predictions follow from, each [N, …].
        """
        # A loss that is NaN counts as the highest.
        self._worst.offer(-losses.double().nan_to_num(nan=torch.inf).numpy(), wrong, samples, losses, *details)
        self._examples.offer(spread_keys(samples), None, samples, losses, *details)

    def compute(self, predict: Predict, *, synchronise: bool) -> tuple[Predictions, Predictions]:
        """The worst errors, the worst first, and the examples, in the order of sample ids.

        Args:
            predict: returns the prediction of a sample of this rank, and whether it is wrong; from sample id, loss and
                details.
            synchronise: select from the samples of all ranks; a collective operation.
        """
        worst = {prediction for prediction, wrong in starmap(predict, self._worst) if wrong}
        examples = {prediction for prediction, _ in starmap(predict, self._examples)}
        if synchronise:
            both = ranks.union({(True, each) for each in worst} | {(False, each) for each in examples})
            worst, examples = ({each for kind, each in both if kind is wanted} for wanted in (True, False))
        by_loss = sorted(worst, key=lambda each: (not math.isnan(each.loss), -each.loss, each.sample))
        by_key = sorted(examples, key=lambda each: float(spread_keys(torch.tensor([each.sample]))[0]))
        selected = sorted(by_key[:MOST_IMAGES], key=lambda each: each.sample)
        return tuple(by_loss[:MOST_IMAGES]), tuple(selected)


def spread_keys(samples: Tensor) -> npt.NDArray[np.float64]:
    """Keys whose smallest belong to evenly spread sample ids: fractional parts of multiples of the golden ratio."""
    return ((samples.numpy().astype(np.uint64) * _GOLDEN_RATIO) >> np.uint64(11)).astype(np.float64)
