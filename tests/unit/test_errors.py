"""What torch cannot compute is said in the words of the command line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from job.errors import ConfigError
from job.train.errors import translate_errors


def test_memory_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^32 images at once .* job tune .* tried to allocate"), translate_errors(32):
        torch.empty(2**60)


def test_batch_norm_of_one_value() -> None:
    with pytest.raises(ConfigError, match="1 image"), translate_errors(1):
        nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))


def test_mistakes_of_the_code_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), translate_errors(1):
        nn.Linear(2, 2)(torch.zeros(1, 3))
