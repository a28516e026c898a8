"""A small head trains on one thread, larger networks on all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

from job.data.datamodule import ImageDataModule
from job.model.head import cpu_threads, is_small_head
from job.model.module import TransferLearningModel


class Seen(Callback):
    """Threads in use, by place and epoch."""

    def __init__(self) -> None:
        self.threads: dict[tuple[str, int], set[int]] = {}

    def note(self, phase: str, trainer: pl.Trainer) -> None:
        self.threads.setdefault((phase, trainer.current_epoch), set()).add(torch.get_num_threads())

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.net.backbone.register_forward_hook(lambda *_: self.note("backbone", trainer))

    def on_before_backward(self, trainer: pl.Trainer, *args: Any) -> None:
        self.note("backward", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.note("between", trainer)


@pytest.fixture
def two_threads() -> Iterator[None]:
    with cpu_threads(2):
        yield


@pytest.mark.parametrize("train_bn", [False, True])
@pytest.mark.usefixtures("two_threads")
def test_the_head_alone_trains_on_one_thread(colours: Path, tmp_path: Path, train_bn: bool) -> None:
    recorder = Seen()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    model = TransferLearningModel(
        backbone="timm/test_resnet", weights="none", hidden=[8], milestones=[1, 1], train_bn=train_bn
    )
    trainer.fit(model, ImageDataModule(str(colours), image_size=32, global_batch_size=8, cache_dir=str(tmp_path)))
    assert recorder.threads == {
        ("backbone", 0): {2},
        ("backward", 0): {2 if train_bn else 1},
        ("between", 0): {2},
        ("backbone", 1): {2},
        ("backward", 1): {2},
        ("between", 1): {2},
    }


def test_a_head_with_many_operations_is_not_small() -> None:
    assert is_small_head(nn.Linear(2048, 256), batch_size=32)
    assert not is_small_head(nn.Linear(2048, 256), batch_size=512)
