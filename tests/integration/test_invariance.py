"""Training does not depend on the number of processes or on interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import TINY, assert_same_weights, options, run_well, scalars

from job import checkpoint

pytestmark = pytest.mark.integration


def test_one_two_and_four_processes_give_the_same_losses(colours: Path, tmp_path: Path) -> None:
    """For a frozen, a half and a fully trained backbone, with layer norm: batch norm depends on local batches."""
    settings = {
        **TINY,
        "model.backbone": "timm/test_vit",
        "model.optimizer": "{class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}",
        "data.image_size": 160,
        "data.global_batch_size": 12,  # 32 samples: the last batch is filled up, differently on the ranks
        "trainer.max_epochs": 8,
    }
    losses, others = {}, {}
    tags = ("train/loss_epoch", "train/accuracy", "train/grad_norm")
    for processes in (1, 2, 4):
        run_dir = str(tmp_path / str(processes))
        run_well("fit", *options(settings, data__root=colours, run_dir=run_dir), processes=processes)
        curves = scalars(run_dir)
        losses[processes] = [value for _, value in curves["train/loss"]] + [value for _, value in curves["val/loss"]]
        others[processes] = {tag: curves[tag] for tag in tags}
    assert len(losses[1]) == 8 * 3 + 8
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[4] == pytest.approx(losses[1], rel=1e-4)
    for tag, points in others[1].items():
        assert len(points) == (8 if tag == "train/loss_epoch" else 8 * 3)
        for processes in (2, 4):
            assert [step for step, _ in others[processes][tag]] == [step for step, _ in points]
            values = [value for _, value in others[processes][tag]]
            assert values == pytest.approx([value for _, value in points], rel=1e-3)


def test_adapters_do_not_depend_on_the_number_of_processes(colours: Path, tmp_path: Path) -> None:
    """At each stage, from one that trains none; DDP would fail at a parameter without a gradient."""
    settings = {
        **TINY,
        "model.backbone": "timm/test_vit",
        "model.lora_rank": 4,
        "model.optimizer": "{class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}",
        "data.image_size": 160,
        "data.global_batch_size": 12,
    }
    losses = {}
    for processes in (1, 2):
        run_dir = str(tmp_path / str(processes))
        started = run_well("fit", *options(settings, data__root=colours, run_dir=run_dir), processes=processes)
        assert started.stderr.count("LoRA: 12 weights of the backbone have adapters") == 1
        curves = scalars(run_dir)
        losses[processes] = [value for tag in ("train/loss", "val/loss") for _, value in curves[tag]]
    assert len(losses[1]) == 3 * 3 + 3
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_resume_at_an_epochs_end_is_bit_equal(epochs: int, colours: Path, tmp_path: Path) -> None:
    """At each milestone: the unfreezing stage, the optimizer and the order are restored."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    settings = options(TINY, data__root=colours, trainer__max_epochs=4, model__train_bn="true")
    run_well("fit", *settings, "--run_dir", whole, processes=2)
    run_well("fit", *settings, "--run_dir", parts, f"--trainer.max_epochs={epochs}", processes=2)
    run_well("fit", *settings, "--run_dir", parts, processes=2)
    assert_same_weights(whole, parts)
    one, other = scalars(whole), scalars(parts)
    trained = ("train/loss", "train/loss_epoch", "train/accuracy", "train/grad_norm")
    for tag in (*trained, "val/loss", "lr/head", "lr/backbone/first"):
        assert other[tag] == one[tag]


def test_a_warm_start_and_a_step_back_do_not_depend_on_the_number_of_processes(colours: Path, tmp_path: Path) -> None:
    """The highest loss counts as the best, so that the run goes back to its first checkpoint."""
    first = str(tmp_path / "first")
    run_well("fit", *options(TINY, data__root=colours, run_dir=first, trainer__max_epochs=1, model__milestones="[0]"))
    frozen = {"model__milestones": "[9]", "features__use": "never", "trainer__max_epochs": 2}
    ranking = {"checkpoint__monitor": "val/loss", "checkpoint__mode": "max", "model__lr": 0.01}
    losses = {}
    for processes in (1, 2):
        run_dir = str(tmp_path / str(processes))
        settings = options(TINY, data__root=colours, run_dir=run_dir, init_from=first, **frozen, **ranking)
        started = run_well("fit", *settings, processes=processes)
        assert started.stderr.count("head: 2 of 2 classes taken over") == 1
        back = run_well("fit", *settings, "--resume=best", "--trainer.gradient_clip_val=0.1", processes=processes)
        assert back.stderr.count("1 later checkpoint(s) are abandoned") == 1
        names = [manifest.file for manifest in checkpoint.manifests(run_dir)]
        assert names == ["epoch=001-step=00000004.ckpt", "epoch=002-step=00000008-2.ckpt"]
        curves = scalars(run_dir)
        losses[processes] = [value for tag in ("train/loss", "val/loss") for _, value in curves[tag]]
    assert len(losses[1]) == 8 + 2
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


def test_resuming_at_another_precision_is_logged(colours: Path, tmp_path: Path) -> None:
    """From bf16 to float32, as on a machine without bf16 units."""
    settings = options(TINY, data__root=colours, run_dir=tmp_path / "run", model__milestones="[]")
    first = run_well("fit", *settings, "--trainer.precision=bf16-mixed", "--trainer.max_epochs=2")
    assert "precision bf16-mixed" in first.stderr
    assert "continues at" not in first.stderr
    second = run_well("fit", *settings, "--trainer.max_epochs=4")
    assert "written at precision bf16-mixed; the run continues at 32-true" in second.stderr
    losses = [value for _, value in scalars(str(tmp_path / "run"))["train/loss"]]
    assert len(losses) == 16
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_recipe_with_all_options_learns_and_resumes_bit_for_bit(colours: Path, tmp_path: Path) -> None:
    settings = options(
        {
            **TINY,
            "model.optimizer": "{class_path: torch.optim.AdamW, init_args: {lr: 0.01, weight_decay: 0.05}}",
            "model.decay_norm_and_bias": "false",
            "model.lr_scheduler": (
                "{class_path: job.model.schedule.WarmupCosine, init_args: {warmup: 4, total: 24, final_factor: 0.05}}"
            ),
            "model.lr_interval": "step",
            "model.label_smoothing": 0.1,
            "model.class_weights": "balanced",
            "model.mixup": 0.2,
            "model.cutmix": 1.0,
            "model.ema": 0.9,
            "model.first_lr_factor": 0.5,
            "trainer.gradient_clip_val": 1.0,
            "trainer.max_epochs": 6,
            "data.root": colours,
        }
    )
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run_well("fit", *settings, "--run_dir", whole, processes=2)
    run_well("fit", *settings, "--run_dir", parts, "--trainer.max_epochs=2", processes=2)
    run_well("fit", *settings, "--run_dir", parts, processes=2)
    assert_same_weights(whole, parts)
    curves = scalars(whole)
    assert curves["train/loss"] == scalars(parts)["train/loss"]
    assert curves["val/accuracy"][-1][1] >= 0.9
    run_well("validate", "--run_dir", whole, "--ckpt", f"{whole}/checkpoints/last")
    repeated = json.loads((tmp_path / "whole" / "validate.json").read_text())["metrics"]["val/loss"]
    # The metrics are those of the averaged weights, not of the last step's.
    assert repeated == pytest.approx(curves["val/loss"][-1][1], rel=1e-5)
    assert checkpoint.load(checkpoint.resolve(f"{whole}/checkpoints/last"))["training_weights"]
    rates = [value for _, value in curves["lr/head"]]
    assert rates.index(max(rates)) == 4
    bands = ["first", *map(str, range(2, 8)), "last"]
    assert {tag for tag in curves if tag.startswith("lr/")} == {"lr/head", *(f"lr/backbone/{band}" for band in bands)}
