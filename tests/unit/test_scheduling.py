"""Schedulers: their length, the groups' learning rates, and refused settings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, options, run_here, scalars
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR

from job.errors import ConfigError
from job.model.scheduling import AutoSchedule, build_scheduler, require_length

FACTORS = [1.0, 0.1]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1 * factor} for factor in FACTORS], 0.1, 0.9
    )


def schedule(name: str, **settings: object) -> AutoSchedule:
    return AutoSchedule.parse({"class_path": name, "init_args": settings})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": "auto"}),
        ("torch.optim.lr_scheduler.CosineAnnealingLR", {"T_max": "auto"}),
        ("PolynomialLR", {"total_iters": "auto"}),
        ("LinearLR", {"total_iters": "auto", "start_factor": 1.0, "end_factor": 0.0}),
        ("job.model.schedule.WarmupCosine", {"warmup": 2, "total": "auto"}),
    ],
)
def test_auto_is_the_whole_run(name: str, settings: dict[str, object]) -> None:
    scheduler = build_scheduler(schedule(name, **settings), optimizer(), factors=FACTORS, length=20)
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    assert all(head == pytest.approx(10 * backbone) for head, backbone in rates)
    assert 0.02 < max(rates)[0] <= 0.1
    assert rates[-1][0] < 0.02
    with pytest.raises(ConfigError, match="max_epochs"):
        build_scheduler(schedule(name, **settings), optimizer(), factors=FACTORS, length=None)


@pytest.mark.parametrize(
    "value",
    [
        {"class_path": "StepLR", "init_args": {"step_size": "auto"}},
        {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.1, "total_steps": 5}},
        {"class_path": "OneCycleLR", "init_args": {"max_rate": 0.1, "total_steps": "auto"}},
        {"class_path": "subprocess.Popen", "init_args": {"total": "auto"}},
        {"class_path": "torch.optim.lr_scheduler.math", "init_args": {"total": "auto"}},
        {"init_args": {"total": "auto"}},
        "OneCycleLR",
    ],
)
def test_values_that_are_no_auto_schedule_are_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        AutoSchedule.parse(value)


def test_rates_of_a_scheduler_are_the_heads_or_one_per_group() -> None:
    built = build_scheduler(partial(OneCycleLR, max_lr=0.2, total_steps=9), optimizer(), factors=FACTORS, length=9)
    assert [group["max_lr"] for group in built.optimizer.param_groups] == pytest.approx([0.2, 0.02])
    built = build_scheduler(
        partial(OneCycleLR, max_lr=[0.2, 0.2], total_steps=9), optimizer(), factors=FACTORS, length=9
    )
    assert [group["max_lr"] for group in built.optimizer.param_groups] == pytest.approx([0.2, 0.2])
    built = build_scheduler(partial(CyclicLR, base_lr=0.1, max_lr=0.2), optimizer(), factors=FACTORS, length=9)
    assert built.max_lrs == pytest.approx([0.2, 0.02])  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="2 parameter groups"):
        build_scheduler(partial(OneCycleLR, max_lr=[0.1] * 3, total_steps=9), optimizer(), factors=FACTORS, length=9)
    assert isinstance(
        build_scheduler(lambda o: LambdaLR(o, lambda n: 1 / (n + 1)), optimizer(), factors=FACTORS, length=9), LambdaLR
    )


def test_a_scheduler_that_ends_before_the_run_is_refused() -> None:
    require_length(OneCycleLR(optimizer(), 0.1, total_steps=10), 10, "step")
    for length in (11, 10_000_000, None):
        with pytest.raises(ConfigError, match="total_steps: auto"):
            require_length(OneCycleLR(optimizer(), 0.1, total_steps=10), length, "step")
    with pytest.raises(ConfigError, match="is shorter than the run"):
        require_length(LambdaLR(optimizer(), lambda n: [1.0, 0.5, 0.25][n]), 3, "epoch")
    require_length(CosineAnnealingLR(optimizer(), 10), None, "epoch")


def scheduler(name: str, **settings: object) -> str:
    arguments = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"{{class_path: {name}, init_args: {{{arguments}}}}}"


ONE_CYCLE = "torch.optim.lr_scheduler.OneCycleLR"
PLATEAU = "pytorch_lightning.cli.ReduceLROnPlateau"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.lr_scheduler": scheduler(ONE_CYCLE, max_lr=0.1, total_steps=11), "model.lr_interval": "step"},
            "12 times",
        ),
        ({"model.lr_scheduler": scheduler(ONE_CYCLE, max_lr=0.1, total_steps=2)}, "3 times (once per epoch)"),
        (
            {
                "model.lr_scheduler": scheduler(ONE_CYCLE, max_lr="[0.1, 0.1]", total_steps=12),
                "model.lr_interval": "step",
            },
            "3 parameter groups",
        ),
        ({"model.lr_interval": "step"}, "milestones [1, 2] are epochs"),
        ({"model.lr_scheduler": scheduler(PLATEAU, monitor="val/auc")}, "Metrics to monitor: val/loss, val/accuracy"),
        ({"model.lr_scheduler": scheduler(PLATEAU, monitor="val/accuracy")}, "Use mode: max"),
        (
            {"model.lr_scheduler": scheduler(PLATEAU, monitor="val/loss"), "trainer.limit_val_batches": 0},
            "'val/loss' is not logged",
        ),
        (
            {"model.lr_scheduler": scheduler(PLATEAU, monitor="val/loss"), "model.lr_interval": "step"},
            "--model.lr_interval=epoch",
        ),
        (
            {
                "model.lr_scheduler": scheduler(PLATEAU, monitor="val/loss"),
                "trainer.check_val_every_n_epoch": "null",
                "trainer.val_check_interval": 2,
            },
            "end of epochs",
        ),
        ({"trainer.max_epochs": 0}, "--trainer.max_epochs must be at least 1"),
        ({"model.optimizer": "torch.optim.LBFGS"}, "LBFGS cannot train this network"),
        ({"model.optimizer": "torch.optim.Muon"}, "Muon cannot train this network"),
        ({"model.optimizer": "torch.optim.SparseAdam"}, "SparseAdam cannot train this network"),
    ],
)
def test_incompatible_schedules_are_refused_before_training(
    changes: dict[str, object], message: str, colours: Path, tmp_path: Path
) -> None:
    outcome = run_here("fit", *options({**TINY, **changes}, data__root=colours, run_dir=tmp_path / "run"))
    assert outcome.returncode == 2, outcome.output
    assert message in outcome.output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_cycle_over_the_whole_run_and_a_resume(colours: Path, tmp_path: Path) -> None:
    """``auto`` from the command line and, by config.yaml, from a file."""
    settings = {
        **TINY,
        "model.backbone_lr_factor": 0.1,
        "model.milestones": "[]",  # the rates of frozen layers are not logged
        "model.lr_interval": "step",
        "model.lr_scheduler": scheduler(ONE_CYCLE, max_lr=0.01, total_steps="auto"),
        "data.root": colours,
    }
    run_dir = tmp_path / "run"
    assert run_here("fit", *options(settings, run_dir=run_dir)).returncode == 0
    rates = {
        tag: [value for _, value in points] for tag, points in scalars(str(run_dir)).items() if tag.startswith("lr/")
    }
    assert len(rates) == 3
    highest = sorted(max(values) for values in rates.values())
    assert highest == pytest.approx([0.001, 0.001, 0.01], rel=0.1)
    assert all(values[-1] < max(values) / 20 for values in rates.values())

    repeated = run_here("fit", "--config", run_dir / "config.yaml", "--run_dir", tmp_path / "again")
    assert repeated.returncode == 0, repeated.output
    longer = run_here("fit", "--config", run_dir / "config.yaml", "--run_dir", run_dir, "--trainer.max_epochs=4")
    assert longer.returncode == 2
    assert "'total_steps': 12" in longer.output
    assert "'total_steps': 16" in longer.output


def test_reduce_on_plateau_steps_where_there_was_a_validation(colours: Path, tmp_path: Path) -> None:
    plateau = scheduler(PLATEAU, monitor="val/loss", factor=0.5, patience=0, threshold=1e9, threshold_mode="abs")
    changes = {"model.lr_scheduler": plateau, "trainer.check_val_every_n_epoch": 2, "trainer.max_epochs": 6}
    outcome = run_here("fit", *options({**TINY, **changes}, data__root=colours, run_dir=tmp_path / "run"))
    assert outcome.returncode == 0, outcome.output
    rates = [value for _, value in scalars(str(tmp_path / "run"))["lr/head"]]
    # The first validation sets the best; each later one is no better, and halves the rate after its epoch.
    assert rates == pytest.approx([0.001] * 16 + [0.0005] * 8)
