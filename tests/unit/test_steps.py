"""Optimizer steps and accumulation windows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from support import TINY, final_weights, options, picture_files, run_here, write_files

from job import checkpoint
from job.model.steps import accumulation, batches_per_epoch, optimizer_steps, window_samples


def trainer(**settings: Any) -> Any:
    defaults = {"callbacks": [], "accumulate_grad_batches": 1, "limit_train_batches": 1.0, "max_epochs": 3}
    return SimpleNamespace(**{**defaults, **settings})


def test_the_steps_of_a_run() -> None:
    schedule = GradientAccumulationScheduler({0: 1, 2: 4})
    assert optimizer_steps(trainer(), 33, 8) == 15
    assert optimizer_steps(trainer(accumulate_grad_batches=2), 33, 8) == 9
    assert optimizer_steps(trainer(callbacks=[schedule]), 33, 8) == 5 + 5 + 2
    assert optimizer_steps(trainer(max_epochs=-1), 33, 8) is None
    assert batches_per_epoch(trainer(limit_train_batches=2), 33, 8) == 2
    assert batches_per_epoch(trainer(limit_train_batches=0.5), 33, 8) == 2
    assert [accumulation(trainer(callbacks=[schedule]), epoch) for epoch in range(4)] == [1, 1, 4, 4]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("limit", [9, 7, 1])
def test_windows_hold_every_sample_once(accumulate: int, limit: int) -> None:
    size, batch = 33, 4
    sizes = [min(batch, size - first) for first in range(0, size, batch)][:limit]
    for number in range(limit):
        first = number // accumulate * accumulate
        expected = sum(sizes[first : first + accumulate])
        assert window_samples(number, accumulate, limit, size, batch) == expected


@pytest.mark.parametrize("scheduled", [False, True])
def test_batches_that_are_accumulated_equal_larger_batches(scheduled: bool, tmp_path: Path) -> None:
    """33 images, one of which is in the last step; with accumulation the last window has 3 batches."""
    data = write_files(tmp_path / "data", picture_files(["red", "blue", "green"], 14))
    (data / "green" / "013.jpg").unlink()
    schedule = [
        {
            "class_path": "pytorch_lightning.callbacks.GradientAccumulationScheduler",
            "init_args": {"scheduling": {0: 4}},
        }
    ]
    accumulating: dict[str, object] = {"trainer.accumulate_grad_batches": 4}
    if scheduled:
        accumulating = {"trainer.callbacks": json.dumps(schedule)}
    common = {
        **TINY,
        "model.milestones": "[9]",
        "trainer.max_epochs": 2,
        "features.use": "never",
        "model.optimizer": "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}",
        "data.root": data,
    }
    for name, more in (
        ("large", {"data.global_batch_size": 12}),
        ("small", {"data.global_batch_size": 3, **accumulating}),
    ):
        outcome = run_here("fit", *options({**common, **more}, run_dir=tmp_path / name))
        assert outcome.returncode == 0, outcome.output
    large, small = final_weights(f"{tmp_path}/large"), final_weights(f"{tmp_path}/small")
    assert all(torch.allclose(large[name], small[name], atol=1e-6) for name in large)


def test_a_run_resumed_within_an_epoch_accumulates_as_its_schedule_says(colours: Path, tmp_path: Path) -> None:
    """Lightning applies the schedule at the start of an epoch only. Epoch 1 has 4 batches and steps after 2 and 4."""
    schedule = {"class_path": "pytorch_lightning.callbacks.GradientAccumulationScheduler"}
    callbacks = json.dumps([{**schedule, "init_args": {"scheduling": {"1": 2}}}])
    settings = {
        **TINY,
        "trainer.max_epochs": 2,
        "trainer.callbacks": callbacks,
        "checkpoint.every_n_steps": 1,
        "checkpoint.keep_last": 20,
        "data.root": colours,
    }
    run_dir = tmp_path / "run"
    outcome = run_here("fit", *options(settings, run_dir=run_dir))
    assert outcome.returncode == 0, outcome.output
    committed = checkpoint.manifests(str(run_dir))
    assert [(m.epoch, m.batch, m.global_step) for m in committed[-3:]] == [(1, 0, 4), (1, 2, 5), (2, 0, 6)]
    expected = final_weights(str(run_dir))
    checkpoint.remove(f"{run_dir}/checkpoints/{committed[-1].file}")
    resumed = run_here("fit", *options(settings, run_dir=run_dir))
    assert resumed.returncode == 0, resumed.output
    assert checkpoint.manifests(str(run_dir))[-1].global_step == 6
    assert all(torch.equal(expected[name], value) for name, value in final_weights(str(run_dir)).items())
