"""Suggestions of ``tune``, for given losses and memory."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning.plugins import Precision
from support import own_messages

from job.errors import ConfigError
from job.model.backbone import build_backbone
from job.model.classifier import Classifier
from job.model.freeze import Stage
from job.model.module import TransferLearningModel
from job.train.batch_size_finder import BatchSizeFinder
from job.train.lr_finder import LRFinder
from job.train.step_memory import peak_bytes


def finder(losses: list[float]) -> LRFinder:
    finder = LRFinder(1e-6, 1.0, 100)
    finder.rates = np.geomspace(1e-6, 1.0, 100)[: len(losses)].tolist()
    finder.losses = losses
    return finder


def test_the_learning_rate_of_the_steepest_loss_is_suggested() -> None:
    """The loss falls around 1e-3, and diverges from 0.1 on."""
    rates = np.geomspace(1e-6, 1.0, 100)
    losses = 2 / (1 + (rates / 1e-3) ** 2) + np.where(rates > 0.1, (rates / 0.1) ** 2, 0)
    assert 5e-4 < finder(losses.tolist()).suggestion() < 5e-3
    broken = [*losses[:80].tolist(), *[math.nan] * 20]
    assert finder(broken).suggestion() == finder(losses[:80].tolist()).suggestion()


def test_a_suggestion_at_the_edge_of_the_range_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The loss falls from the first rate on, or to the last."""
    position = np.arange(100)
    finder((1 + np.exp(-position / 3)).tolist()).suggestion()
    assert "Lower --lr_finder.lowest" in caplog.text
    caplog.clear()
    finder((5 - np.exp((position - 99) / 8)).tolist()).suggestion()
    assert "Raise --lr_finder.highest" in caplog.text
    caplog.clear()
    rates = np.geomspace(1e-6, 1.0, 100)
    finder((2 / (1 + (rates / 1e-3) ** 2)).tolist()).suggestion()
    assert not own_messages(caplog)


def test_no_learning_rate_is_suggested_without_a_falling_loss() -> None:
    with pytest.raises(ConfigError, match="falls at no learning rate"):
        finder(np.linspace(1, 3, 100).tolist()).suggestion()
    with pytest.raises(ConfigError, match="is not finite"):
        finder([1.0, 1.0, math.nan]).suggestion()
    with pytest.raises(ConfigError, match="lowest"):
        LRFinder(0.1, 0.1)
    with pytest.raises(ConfigError, match="steps"):
        LRFinder(steps=5)


def test_memory_is_predicted_and_the_network_restored() -> None:
    module = TransferLearningModel(backbone="resnet18", label_smoothing=0.1)
    backbone = build_backbone("resnet18")
    half = (0.5, 0.5, 0.5)
    module.net = Classifier(backbone, name="resnet18", classes="ab", hidden=[4], image_size=64, mean=half, std=half)
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    trainer = SimpleNamespace(precision_plugin=Precision())
    shares: list[float] = []
    # In this process a thread of an earlier test may free memory at the moment, but not three times in a row.
    while len(shares) < 3 and not any(0.7 < share < 1.4 for share in shares):
        module.enter_stage(Stage.HEAD)
        finder = BatchSizeFinder()
        finder.on_train_start(trainer, module)  # type: ignore[arg-type]
        assert module.stage == Stage.HEAD
        assert all(torch.equal(value, before[name]) for name, value in module.net.state_dict().items())
        assert not any(parameter.requires_grad for parameter in module.net.backbone.parameters())
        assert finder.per_rank % 8 == 0

        module.enter_stage(Stage.ALL)  # 256 images of about 2.5 MB, far beyond what was measured
        small, large = (peak_bytes(trainer, module, size) for size in (32, 256))  # type: ignore[arg-type]
        shares.append((large - small) / (224 * finder.bytes_each))
    assert 0.7 < shares[-1] < 1.4, shares
    assert finder.per_rank * finder.bytes_each > 1e9  # of the memory of any machine that runs this
