"""Errors of torch, Lightning and collectives are translated by their type and origin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn

from job.cluster.ranks import _translate_failures
from job.errors import ConfigError, DeviceError, RankLost, StorageError
from job.train.errors import translate_errors


def test_out_of_memory_is_translated() -> None:
    with pytest.raises(ConfigError, match=r"^32 images at once .* job tune .* tried to allocate"), translate_errors(32):
        torch.empty(2**60)


def test_batch_norm_of_one_value() -> None:
    with pytest.raises(ConfigError, match="1 image"), translate_errors(1):
        nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))


def test_a_full_disk_of_temporary_files() -> None:
    """Predictions, embeddings and lists of images are written there first."""
    full = pytest.raises(StorageError, match=r"disk of this machine is full .*No space left.* set TMPDIR")
    with full, translate_errors(1), Path("/dev/full").open("wb") as file:
        file.write(b"x")


def test_programming_errors_are_not_translated() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), translate_errors(1):
        nn.Linear(2, 2)(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trainer(accelerator="gpu", logger=False), "No supported gpu backend"),
        (lambda: Trainer(gradient_clip_val=1, gradient_clip_algorithm="bogus", logger=False), "bogus is invalid"),
        (lambda: Trainer(max_time="soon", logger=False), "not a valid duration"),
        (lambda: EarlyStopping("val/loss", mode="median"), "mode"),
        (lambda: torch.optim.Adam(nn.Linear(1, 1).parameters(), lr=-1), "Invalid learning rate"),
    ],
)
def test_options_that_lightning_or_torch_refuse(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message), translate_errors():
        make()


def test_a_failing_gpu_is_a_transient_error() -> None:
    with pytest.raises(DeviceError, match="uncorrectable ECC"), translate_errors():
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    with pytest.raises(ConfigError, match="one process per GPU"), translate_errors():
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4567"
DUPLICATE = (
    "NCCL error in: x.cpp:1, invalid usage, NCCL version 2.27\nncclInvalidUsage: …\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 10"
)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (RuntimeError(GLOO), RankLost, "Connection closed by peer"),
        (RuntimeError(f"Gloo connectFullMesh failed with {GLOO}"), RankLost, "connectFullMesh"),
        (dist.DistNetworkError("The client socket has timed out after 60000ms"), RankLost, "timed out"),
        (dist.DistStoreError("wait timeout after 30000ms, keys: /x"), RankLost, "wait timeout"),
        (dist.DistBackendError("NCCL error: ncclRemoteError: a call failed possibly"), RankLost, "ncclRemoteError"),
        (dist.DistBackendError(DUPLICATE), ConfigError, "two ranks share one GPU"),
        (RuntimeError("nccl is not built in"), RuntimeError, "nccl"),
        (RuntimeError("the lock timed out"), RuntimeError, "lock"),
        (RuntimeError("Broken pipe of gloomy weather"), RuntimeError, "pipe"),
    ],
)
def test_collectives_that_fail(error: Exception, expected: type[Exception], message: str) -> None:
    with pytest.raises(expected, match=message) as excinfo, _translate_failures():
        raise error
    assert excinfo.type is expected
    assert excinfo.value is error or excinfo.value.__cause__ is error
