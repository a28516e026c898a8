"""Non-finite losses, gradients and weights end the run or skip the step, and are never saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import TINY, environment, final_weights, options, run, run_here, scalars

from job import checkpoint

SETTINGS = {**TINY, "model.milestones": "[]", "trainer.max_epochs": 3}  # 4 steps per epoch


def poisoned(**settings: object) -> str:
    return json.dumps([{"class_path": "poison.Poison", "init_args": settings}])


def steps(run_dir: Path) -> list[int]:
    return [manifest.global_step for manifest in checkpoint.manifests(str(run_dir))]


def assert_finite(run_dir: Path) -> None:
    assert all(value.isfinite().all() for value in final_weights(str(run_dir)).values())


def strict(path: Path) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    values: dict[str, object] = json.loads(path.read_bytes(), parse_constant=refuse)
    return values


def test_a_learning_rate_far_too_high_ends_the_run_before_its_first_checkpoint(colours: Path, tmp_path: Path) -> None:
    optimizer = "{class_path: torch.optim.SGD, init_args: {lr: 1.0e30}}"
    outcome = run_here(
        "fit", *options({**SETTINGS, "model.optimizer": optimizer}, data__root=colours, run_dir=tmp_path / "run")
    )
    assert outcome.returncode == 2, outcome.output
    assert "training diverged: the gradients were not finite at step 1 (epoch 0, batch 1)" in outcome.output
    assert "There is no checkpoint yet" in outcome.output
    assert not steps(tmp_path / "run")


@pytest.mark.parametrize(
    "changes", [{}, {"model.milestones": "[9]"}, {"model.ema": 0.9}], ids=["all", "features", "ema"]
)
def test_the_last_good_checkpoint_is_named_and_a_skipped_step_goes_on_from_it(
    changes: dict[str, object], colours: Path, tmp_path: Path
) -> None:
    settings = options({**SETTINGS, **changes}, data__root=colours, run_dir=tmp_path / "run")
    poison = f"--trainer.callbacks={poisoned(first=5)}"
    for _ in range(2):  # a restart ends alike
        outcome = run_here("fit", *settings, poison)
        assert outcome.returncode == 2, outcome.output
        assert "not finite at step 5 (epoch 1, batch 1)" in outcome.output
        assert f"The last good checkpoint is {tmp_path}/run/checkpoints/epoch=001-step=00000004.ckpt" in outcome.output
        assert steps(tmp_path / "run") == [4]
    outcome = run_here("fit", *settings, poison, "--model.nonfinite=skip")
    assert outcome.returncode == 0, outcome.output
    assert "the step is skipped" in outcome.output
    assert steps(tmp_path / "run")[-1] == 12
    assert_finite(tmp_path / "run")
    assert strict(tmp_path / "run" / "report.json")["skipped_steps"] == 1
    assert scalars(str(tmp_path / "run"))["train/skipped_steps"][-1][1] == 1


def test_a_skipped_step_leaves_the_network_as_it_was(colours: Path, tmp_path: Path) -> None:
    """Batch-norm statistics are unchanged too; one batch of an accumulation window skips the whole window."""
    settings = options(
        {**SETTINGS, "trainer.max_epochs": 1, "model.nonfinite": "skip", "data.global_batch_size": 4},
        data__root=colours,
    )
    for name, skipped, poison in (("all", 4, {"first": 0, "count": 8}), ("one", 1, {"first": 2})):
        outcome = run_here(
            *("fit", *settings, f"--run_dir={tmp_path}/{name}", "--trainer.accumulate_grad_batches=2"),
            *(f"--trainer.callbacks={poisoned(**poison)}",),
        )
        assert outcome.returncode == 0, outcome.output
        assert_finite(tmp_path / name)
        assert strict(tmp_path / name / "report.json")["skipped_steps"] == skipped
    untrained = {k: v for k, v in final_weights(f"{tmp_path}/all").items() if "running_" in k}
    assert untrained
    assert all(v.unique().tolist() == [float("var" in k)] for k, v in untrained.items())


def test_many_skipped_steps_in_a_row_end_the_run(colours: Path, tmp_path: Path) -> None:
    outcome = run_here(
        *("fit", *options(SETTINGS, data__root=colours, run_dir=tmp_path / "run"), "--model.nonfinite=skip"),
        *("--model.max_skipped_steps=3", f"--trainer.callbacks={poisoned(first=5, count=99)}"),
    )
    assert outcome.returncode == 2
    assert "in 4 consecutive steps, the last at step 8" in outcome.output
    assert steps(tmp_path / "run") == [4, 8]
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [(0.0, "inf", "held values that are not finite at step 8"), (1.0, "nan", "val/loss is nan at step 8")],
)
def test_statistics_that_are_not_finite_are_not_saved(
    limit: float, value: str, message: str, colours: Path, tmp_path: Path
) -> None:
    """Running statistics do not affect the training loss."""
    outcome = run_here(
        *("fit", *options(SETTINGS, data__root=colours, run_dir=tmp_path / "run")),
        *(
            f"--trainer.limit_val_batches={limit}",
            f"--trainer.callbacks={poisoned(first=5, value=value, statistic=True)}",
        ),
    )
    assert outcome.returncode == 2, outcome.output
    assert message in outcome.output
    assert "step=00000004.ckpt" in outcome.output
    assert steps(tmp_path / "run") == [4]


def test_a_sweep_of_learning_rates_diverges_on_purpose(colours: Path, tmp_path: Path) -> None:
    outcome = run_here(
        *("tune", *options(SETTINGS, data__root=colours, run_dir=tmp_path / "run")),
        *(
            "--lr_finder.lowest=1e-4",
            "--lr_finder.steps=40",
            "--model.lr_interval=step",
            f"--trainer.callbacks={poisoned(first=25)}",
        ),
    )
    assert outcome.returncode == 0, outcome.output
    assert None in strict(tmp_path / "run" / "tune.json")["losses"]  # type: ignore[operator]


@pytest.mark.integration
def test_all_ranks_end_together(colours: Path, tmp_path: Path) -> None:
    settings = options(SETTINGS, data__root=colours, run_dir=tmp_path / "run")
    path = environment(PYTHONPATH=str(Path(__file__).parents[1] / "faults"))["PYTHONPATH"]
    outcome = run(
        *("fit", *settings, f"--trainer.callbacks={poisoned(first=5, rank=1)}"),
        processes=2,
        PYTHONPATH=path,
    )
    assert outcome.returncode != 0
    for rank in (0, 1):
        assert f"job: error (rank {rank}): training diverged: the gradients were not finite at step 5" in outcome.stderr
    assert steps(tmp_path / "run") == [4]
