"""Cached features are those of one augmentation: its code and all of its parameters, however it is printed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support import REPOSITORY
from torch import Tensor
from torchvision.transforms import v2

from job.features.transform_hash import transform_hash


class Shift(v2.Transform):
    """A transform whose ``repr`` hides its parameters."""

    def __init__(self, amount: int, names: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._amount = amount
        self._names = names

    def transform(self, inpt: Tensor, params: dict[str, object]) -> Tensor:
        return inpt + self._amount


def shifted(amount: int) -> Callable[[Tensor], Tensor]:
    return lambda image: image + amount


def with_table(value: float) -> Shift:
    transform = Shift(1)
    transform.register_buffer("table", torch.full((3,), value))
    return transform


def nested(amount: int) -> v2.Compose:
    return v2.Compose([v2.RandomHorizontalFlip(), Shift(amount)])


def partial_of_lambda(amount: int) -> Callable[[Tensor], Tensor]:
    return partial(lambda image, amount: image + amount, amount=amount)


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (Shift, 1, 2),
        (shifted, 1, 2),
        (with_table, 0.0, 1.0),
        (nested, 1, 2),
        (partial(partial, shifted), 1, 2),
        (partial_of_lambda, 1, 2),
    ],
    ids=["private attribute", "closure", "buffer", "nested", "partial", "partial of a lambda"],
)
def test_a_hidden_parameter_changes_the_hash(make: Callable[[float], object], one: float, other: float) -> None:
    assert transform_hash(make(one)) == transform_hash(make(one))
    assert transform_hash(make(one)) != transform_hash(make(other))


def test_parameters_of_torchvision() -> None:
    assert transform_hash(v2.RandomResizedCrop(32)) == transform_hash(v2.RandomResizedCrop(32))
    assert transform_hash(v2.RandomResizedCrop(32)) != transform_hash(v2.RandomResizedCrop(32, antialias=False))


def test_code_changes_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, line in enumerate(["return inpt", "return inpt + 1"]):
        source = (
            "from torchvision.transforms import v2\nclass T(v2.Transform):\n def transform(self, inpt, params):\n  "
        )
        (tmp_path / f"module_{number}.py").write_text(f"{source}{line}\n")
        module = __import__(f"module_{number}")
        module.T.__module__ = "module"
        sys.modules["module"] = module
        hashes.add(transform_hash(module.T()))
    del sys.modules["module"]
    assert len(hashes) == 2


def test_a_transform_that_holds_itself() -> None:
    transform = Shift(1)
    transform.__dict__["_self"] = [transform]
    assert transform_hash(transform) != transform_hash(Shift(1))


def test_the_hash_is_the_same_in_another_process() -> None:
    transform = "Shift(1, frozenset(['a', 'bc', 'def', 'gh']))"
    program = f"from test_transform_hash import *; print(transform_hash({transform}))"
    path = f"{REPOSITORY}:{REPOSITORY}/tests:{REPOSITORY}/tests/unit"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": path, "PYTHONHASHSEED": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == transform_hash(Shift(1, frozenset(["a", "bc", "def", "gh"])))
