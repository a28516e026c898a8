"""Trials: the settings of a head, all combinations of a grid or random draws from it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from job.errors import ConfigError

MOST_TRIALS = 20_000
MOST_FOLDS = 1000
LARGEST_WIDTH = 65_536
"""Of a hidden layer, as in a checkpoint."""

ClassWeights = Literal["none", "balanced"]
T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """Settings of one head, as of the options of the same names of ``fit``.

    Attributes:
        backbone: number of the backbone, from 0.
        lr: initial learning rate of AdamW.
        weight_decay: of AdamW.
        hidden: widths of the hidden layers; empty: a linear head.
        label_smoothing: from 0 to below 1.
        class_weights: "balanced" weights classes inversely to their frequency.
        dropout: of the inputs of each linear layer.
    """

    backbone: int
    lr: float
    weight_decay: float
    hidden: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    class_weights: ClassWeights = "none"
    dropout: float = 0.0


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, uniform in their logarithm; or uniform, if the lower bound is 0."""

    low: float
    high: float

    def draw(self, generator: random.Random) -> float:
        """A random number, with four significant digits."""
        if self.low == 0:
            value = generator.uniform(self.low, self.high)
        else:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        return min(max(float(f"{value:.4g}"), self.low), self.high)


@dataclass(frozen=True)
class SweepSettings:
    """The heads to train, and how they are compared.

    Each of ``lr`` to ``dropout`` is one value, or several separated by commas: every combination is one trial. With
    ``samples``, as many random combinations are drawn, and a number may be a range LOW..HIGH.

    Args:
        lr: learning rates of AdamW, which fall to 0 along a cosine.
        weight_decay: weight decays of AdamW.
        hidden: widths of the head's hidden layers: none for a linear head, 256 for one layer, 256x32 for two.
        label_smoothing: label smoothing, from 0 to below 1.
        class_weights: none, balanced, or both.
        dropout: dropout of the inputs of each of the head's linear layers, from 0 to below 1.
        samples: number of random combinations; 0: the grid of all combinations.
        folds: folds of the cross-validation on the training images.
        epochs: epochs per head. Default: as many as have about 300 steps, from 5 to 100.
        batch_size: samples per step. Default: a power of two between 32 and 1024, by the number of images.
        block_mb: memory of the heads that are trained together, in 10^6 bytes.
        logged: number of best trials that TensorBoard shows, each as a run of its own.
    """

    lr: list[float] | float | str = "1e-4,3e-4,1e-3,3e-3,1e-2,3e-2"
    weight_decay: list[float] | float | str = "0,0.01,0.1,1"
    hidden: list[list[int]] | int | str = "none,64"
    label_smoothing: list[float] | float | str = "0,0.1"
    class_weights: str = "none"
    dropout: list[float] | float | str = "0"
    samples: int = 0
    folds: int = 5
    epochs: int | None = None
    batch_size: int | None = None
    block_mb: float = 512.0
    logged: int = 50

    def __post_init__(self) -> None:
        if not 2 <= self.folds <= MOST_FOLDS:
            raise ConfigError(f"--sweep.folds must be at least 2 and at most {MOST_FOLDS:,}, not {self.folds}.")
        if not 0 <= self.samples <= MOST_TRIALS:
            raise ConfigError(f"--sweep.samples must be between 0 and {MOST_TRIALS:,}, not {self.samples}.")
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--sweep.{name} must be at least 1, not {value}.")
        if not 1 <= self.block_mb < math.inf:
            raise ConfigError(f"--sweep.block_mb must be at least 1, not {self.block_mb}.")
        if not 0 <= self.logged <= 1000:
            raise ConfigError(f"--sweep.logged must be between 0 and 1000, not {self.logged}.")
        self.trials(1, seed=0)

    def trials(self, backbones: int, seed: int) -> list[Trial]:
        """All trials, without repetition.

        Args:
            backbones: number of backbones.
            seed: of random draws.

        Raises:
            ConfigError: a value is out of its range, or there are more than :data:`MOST_TRIALS`.
        """
        choices = self._choices()
        lists = [options for options in choices.values() if not isinstance(options, Range)]
        is_grid, count = len(lists) == len(choices), backbones * math.prod(map(len, lists))
        if self.samples and not (is_grid and count <= self.samples):
            generator = random.Random(seed)
            drawn: dict[Trial, None] = {}
            for _ in range(100 * self.samples):  # a narrow range has fewer numbers than draws
                values = {name: _draw(options, generator) for name, options in choices.items()}
                drawn[Trial(backbone=generator.randrange(backbones), **values)] = None
                if len(drawn) == self.samples:
                    break
            return list(drawn)
        if name := next((name for name, options in choices.items() if isinstance(options, Range)), None):
            raise ConfigError(
                f"--sweep.{name} is a range, which needs random draws: give --sweep.samples, for example 100, or list "
                "values."
            )
        if count > MOST_TRIALS:
            raise ConfigError(
                f"the grid has {count:,} combinations, at most {MOST_TRIALS:,} are allowed. List fewer values, or draw "
                "some of them by --sweep.samples."
            )
        combinations = itertools.product(range(backbones), *lists)
        return [Trial(backbone, **dict(zip(choices, values, strict=True))) for backbone, *values in combinations]

    def _choices(self) -> dict[str, list[Any] | Range]:
        return {
            "lr": _numbers("lr", self.lr, lambda value: 0 < value <= 1000, "above 0 and at most 1000"),
            "weight_decay": _numbers(
                "weight_decay", self.weight_decay, lambda value: 0 <= value <= 1000, "between 0 and 1000"
            ),
            "hidden": _hidden(self.hidden),
            "label_smoothing": _numbers(
                "label_smoothing", self.label_smoothing, lambda value: 0 <= value < 1, "at least 0 and below 1"
            ),
            "class_weights": _class_weights(self.class_weights),
            "dropout": _numbers("dropout", self.dropout, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        }


def _draw(options: list[Any] | Range, generator: random.Random) -> Any:
    return options.draw(generator) if isinstance(options, Range) else generator.choice(options)


def _numbers(
    name: str, value: Sequence[float] | float | str, in_range: Callable[[float], bool], bounds: str
) -> list[float] | Range:
    """The numbers of an option, or its range.

    Raises:
        ConfigError: one is no number, or out of its range.
    """
    if isinstance(value, str) and ".." in value:
        low, _, high = value.partition("..")
        ends = [_number(name, low, in_range, bounds), _number(name, high, in_range, bounds)]
        if ends[0] >= ends[1]:
            raise ConfigError(f"--sweep.{name}: {value} is no range LOW..HIGH: {low} is not below {high}.")
        return Range(*ends)
    listed: list[float | str]
    if isinstance(value, str):
        listed = list(value.strip("[] ").split(","))
    else:
        listed = [value] if isinstance(value, (int, float)) else list(value)
    return _without_repetition(name, [_number(name, item, in_range, bounds) for item in listed])


def _number(name: str, item: float | str, in_range: Callable[[float], bool], bounds: str) -> float:
    try:
        value = float(item)
    except ValueError as error:
        raise ConfigError(
            f"--sweep.{name}: {str(item).strip()!r} is no number. Separate values by commas, as 0.001,0.01, or give a "
            "range, as 1e-4..1e-1."
        ) from error
    if not in_range(value):  # NaN is in no range
        raise ConfigError(f"--sweep.{name} must be {bounds}, not {value}.")
    return value


def _hidden(value: list[list[int]] | int | str) -> list[tuple[int, ...]]:
    """Widths of hidden layers per choice.

    Raises:
        ConfigError: one is no width.
    """
    choices: list[tuple[int, ...]] = []
    lists: object = value
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            lists = json.loads(value)
        except json.JSONDecodeError as error:
            raise _hidden_error(value) from error
    if isinstance(lists, list):
        nested = lists if all(isinstance(widths, list) for widths in lists) else [lists]
        choices = [tuple(widths) for widths in nested]
    else:
        for item in str(value).split(","):
            text = item.strip().lower()
            try:
                choices.append(() if text in ("none", "linear") else tuple(int(width) for width in text.split("x")))
            except ValueError as error:
                raise _hidden_error(item) from error
    for widths in choices:
        if len(widths) > 8 or not all(type(width) is int and 1 <= width <= LARGEST_WIDTH for width in widths):
            raise _hidden_error(str(list(widths)))
    return _without_repetition("hidden", choices)


def _hidden_error(text: str) -> ConfigError:
    return ConfigError(
        f"--sweep.hidden: {text.strip()!r} is no list of layer widths from 1 to {LARGEST_WIDTH:,}. Give none for a "
        "linear head, 256 for one hidden layer, 256x32 for two, separated by commas: none,256,256x32."
    )


def _class_weights(value: str) -> list[ClassWeights]:
    names: dict[str, ClassWeights] = {"none": "none", "balanced": "balanced"}
    items = [item.strip() for item in value.strip("[] ").split(",")]
    for item in items:
        if item not in names:
            raise ConfigError(f"--sweep.class_weights: {item!r} is neither none nor balanced.")
    return _without_repetition("class_weights", [names[item] for item in items])


def _without_repetition(name: str, values: list[T]) -> list[T]:
    if not values:
        raise ConfigError(f"--sweep.{name} is empty: give at least one value.")
    return list(dict.fromkeys(values))
