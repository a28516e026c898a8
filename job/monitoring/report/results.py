"""Results of validations while a fit lasts: a bounded number of them."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from job.checkpoint.manifest import Mode
from job.monitoring.report.content import EvaluationResult

KEPT_LAST = 2
"""The last validations: their checkpoints may not have been saved yet."""
KEPT_BEST = 2
"""The best validations with a checkpoint: that of the best one may not be committed yet."""


class _Scored(NamedTuple):
    score: float
    result: EvaluationResult


class ValidationResults:
    """Keeps the results that a report can need, however long the fit lasts.

    These are the last :data:`KEPT_LAST`, the :data:`KEPT_BEST` best with a checkpoint, of equals the newest, and the
    one in the report of an earlier attempt.

    Args:
        mode: whether the higher or the lower value of the metric that ranks checkpoints is better.
        earlier: the result in the report of an earlier attempt; None where there is none.
    """

    def __init__(self, mode: Mode, earlier: EvaluationResult | None = None) -> None:
        self._sign = 1 if mode == "max" else -1
        self._earlier = earlier
        self._last: deque[_Scored] = deque(maxlen=KEPT_LAST)
        self._best: list[_Scored] = []

    def add(self, result: EvaluationResult, value: float) -> None:
        """Add the result of a validation, which replaces one at the same step.

        Args:
            result: of the validation.
            value: of the metric that ranks checkpoints; NaN where it was not measured.
        """
        step = result.global_step
        self._last = deque((each for each in self._last if each.result.global_step != step), KEPT_LAST)
        self._best = [each for each in self._best if each.result.global_step != step]
        self._last.append(_Scored(self._sign * value if math.isfinite(value) else -math.inf, result))

    def keep_saved(self, global_step: int) -> None:
        """A checkpoint of this step is saved: keep its result if it is among the best."""
        saved = [each for each in self._last if each.result.global_step == global_step and each not in self._best]
        ranked = sorted([*self._best, *saved], key=lambda each: (each.score, each.result.global_step), reverse=True)
        self._best = ranked[:KEPT_BEST]

    def by_step(self) -> dict[int, EvaluationResult]:
        """The results that are kept, by ``global_step``."""
        earlier = [] if self._earlier is None else [self._earlier]
        results = [*earlier, *(each.result for each in (*self._best, *self._last))]
        return {result.global_step: result for result in results}
