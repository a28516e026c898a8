"""Scalars of training in TensorBoard: their names, and what they measure."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers.logger import Logger
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, multilabel_confusion_matrix
from support import TINY, cells_of, fit_here, options, picture, picture_files, run_here, scalars, write_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.optim import SGD, Optimizer

from job import lightning_internals
from job.model.training_metrics import TrainingAccuracy, TrainingF1, TrainingMetrics
from job.monitoring.gradient_norm import GradientNorm
from job.monitoring.learning_rates import LearningRates
from job.monitoring.tensorboard.worst_classes import worst_classes

RATES = ["lr/backbone/first", "lr/backbone/last", "lr/head"]
ONE_LABEL = [
    *("data/bad_samples", "epoch", *RATES),
    *("train/accuracy", "train/grad_norm", "train/images_per_second", "train/loss", "train/loss_epoch"),
    *("val/accuracy", "val/accuracy_of/blue", "val/accuracy_of/red", "val/auroc", "val/ece", "val/f1", "val/loss"),
]
SEVERAL_LABELS = [
    *("data/bad_samples", "epoch", *RATES),
    *("train/grad_norm", "train/images_per_second", "train/loss", "train/loss_epoch", "train/micro_f1"),
    *("val/average_precision_of/blue", "val/average_precision_of/red", "val/ece", "val/loss", "val/mAP"),
    *("val/macro_f1", "val/micro_f1"),
]
VALIDATION_OF_MANY = ["val/accuracy", "val/auroc", "val/ece", "val/f1", "val/loss", "val/top5_accuracy"]
OWN_TESTS = ("accounting/", "wall_time/", "time/", "system/", "pr/", "hparams", "best/")


@pytest.mark.parametrize(("task", "tags"), [("classification", ONE_LABEL), ("multilabel", SEVERAL_LABELS)])
def test_the_names_of_scalars_stay(task: str, tags: list[str], tmp_path: Path) -> None:
    """Dashboards and scripts find curves by name: a change of this list belongs in the changelog."""
    found = scalars(str(fit_here(tmp_path, model__task=task)))
    assert sorted(tag for tag in found if not tag.startswith(OWN_TESTS)) == sorted(tags)
    assert [step for step, _ in found["lr/head"]] == [step for step, _ in found["train/loss"]]
    assert next(step for step, _ in found["lr/backbone/last"]) == len(found["train/loss"]) // 3  # frozen until then


def test_a_validation_within_an_epoch_has_the_loss_of_its_step_also_where_it_is_not_logged(tmp_path: Path) -> None:
    """Callbacks may monitor it there."""
    interval = {"trainer__val_check_interval": 2, "trainer__max_epochs": 1, "data__global_batch_size": 4}
    every_step = scalars(str(fit_here(tmp_path / "all", **interval)))["train/loss"]
    run_dir = fit_here(tmp_path / "few", **interval, trainer__log_every_n_steps=3)
    logged = scalars(str(run_dir))["train/loss"]
    assert logged == [every_step[step] for step in (2, 3)]
    records = json.loads((run_dir / "report.json").read_text())["history"]
    assert [record["metrics"]["train/loss"] for record in records] == [every_step[step][1] for step in (1, 3)]


def test_training_accuracy_is_that_of_the_samples_and_the_last_step_is_logged(tmp_path: Path) -> None:
    """With a negligible learning rate the epoch's value is what a validation of the same images measures."""
    colours = write_files(tmp_path / "colours", picture_files(["blue", "red"], 11))
    settings = {
        **TINY,
        "model.lr": 1e-12,
        "model.milestones": "[3]",
        "data.global_batch_size": 5,
        "trainer.max_epochs": 2,
        "trainer.log_every_n_steps": 2,
    }
    outcome = run_here(
        "fit",
        *options(settings, data__train=colours, data__val=colours, run_dir=tmp_path / "run", features__use="never"),
    )
    assert outcome.returncode == 0, outcome.output
    found = scalars(str(tmp_path / "run"))
    steps = [1, 3, 4, 5, 7, 9]  # each second one, and the last of five in an epoch
    for tag in ("train/loss", "train/accuracy", "train/grad_norm", "lr/head"):
        assert [step for step, _ in found[tag]] == steps
    assert [step for step, _ in found["train/loss_epoch"]] == [4, 9]
    for tag, other in (("train/accuracy", "val/accuracy"), ("train/loss_epoch", "val/loss")):
        measured = [value for step, value in found[tag] if step in (4, 9)]
        assert measured == pytest.approx([value for _, value in found[other]], rel=0.05)
    hits = [value * samples for (_, value), samples in zip(found["train/accuracy"], [10, 20, 22, 5], strict=False)]
    assert hits == pytest.approx([round(value) for value in hits], abs=1e-4)


def test_mixed_images_have_no_accuracy(tmp_path: Path) -> None:
    found = scalars(str(fit_here(tmp_path, model__mixup=0.2, model__milestones="[]", trainer__max_epochs=1)))
    assert "train/loss_epoch" in found
    assert not [tag for tag in found if tag.startswith("train/accuracy")]


def test_the_worst_of_many_classes_are_listed_without_a_scalar_of_each(tmp_path: Path) -> None:
    files = {f"c{n % 51:02d}/{n}.jpg": picture((n, 100, 100), n) for n in range(102)}
    settings = {**TINY, "trainer.max_epochs": 1, "data.val_fraction": 0.5, "monitoring.images": 0}
    colours = write_files(tmp_path / "colours", files)
    outcome = run_here("fit", *options(settings, data__root=colours, run_dir=tmp_path / "run"))
    assert outcome.returncode == 0, outcome.output
    found = scalars(str(tmp_path / "run"))
    assert sorted(tag for tag in found if tag.startswith("val/")) == VALIDATION_OF_MANY
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    (event,) = reader.Tensors("val/worst_classes")
    assert event.tensor_proto.string_val[0].decode().count("\n") == 2 + 10 - 1
    assert event.step == found["val/loss"][-1][0]


def test_the_worst_classes_are_those_of_the_lowest_f1() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 12, (400,), generator=generator)
    predicted = torch.where(torch.rand(400, generator=generator) < 0.5, true, true.roll(1))
    true, predicted = torch.cat([true, torch.tensor([12])]), torch.cat([predicted, torch.tensor([0])])
    names = [*(f"c{number}" for number in range(12)), "a|`b`", "absent"]
    f1 = f1_score(true, predicted, average=None, labels=range(13))
    order = [int(place) for place in f1.argsort(kind="stable")[:10]]
    one_hot = [F.one_hot(each, 14) for each in (true, predicted)]
    cells = cells_of(confusion_matrix(true, predicted, labels=range(14)))
    for counts in (cells, multilabel_confusion_matrix(*one_hot)):
        lines = worst_classes(counts, names).split("\n")[2:]
        assert lines[0] == "| `a¦ˋbˋ` | 0.000 | - | 0.000 | 1 |"
        assert [line.split("`")[1] for line in lines[1:]] == [names[place] for place in order[1:]]
        assert [float(line.split(" | ")[1]) for line in lines] == pytest.approx(
            [f1[place] for place in order], abs=6e-4
        )


Batches = list[tuple[Tensor, Tensor, dict[str, Any]]]


def batches(logits: int, classes: int, *, several: bool = False) -> Batches:
    """Losses, logits and batches of 40 steps of 6 samples."""
    generator = torch.Generator().manual_seed(0)
    result: Batches = []
    for _ in range(40):
        labels = torch.randint(0, 2 if several else classes, (6, classes) if several else (6,), generator=generator)
        batch = {"labels" if several else "label": labels, "mask": torch.rand(6, generator=generator) > 0.2}
        scores = torch.randn(6, logits, generator=generator)
        result.append((torch.rand(6, generator=generator), scores, batch))
    return result


def added(metrics: TrainingMetrics, steps: Batches) -> TrainingMetrics:
    for losses, logits, batch in steps:
        metrics.add(losses, logits, batch)  # type: ignore[arg-type]
    return metrics


def alone(sums: Tensor) -> Tensor:
    return sums


@pytest.mark.parametrize(("logits", "classes"), [(1, 2), (2, 2), (7, 7)])
def test_training_accuracy_agrees_with_scikit_learn(logits: int, classes: int) -> None:
    steps = batches(logits, classes)
    metrics = TrainingAccuracy()
    assert metrics.compute(alone) == {}
    for first, last in itertools.pairwise((0, 3, 4, len(steps))):
        values = added(metrics, steps[first:last]).compute(alone)
        mask = torch.cat([batch["mask"] for _, _, batch in steps[:last]])
        true = torch.cat([batch["label"] for _, _, batch in steps[:last]])[mask]
        scores = torch.cat([scores for _, scores, _ in steps[:last]])[mask]
        predicted = (scores[:, 0] > 0).long() if logits == 1 else scores.argmax(dim=1)
        losses = torch.cat([losses for losses, _, _ in steps[:last]])[mask]
        assert values == pytest.approx({"loss": losses.mean().item(), "accuracy": accuracy_score(true, predicted)})
    metrics.start_epoch()
    assert metrics.compute(alone) == {}


def test_micro_f1_of_training_agrees_with_scikit_learn() -> None:
    steps = batches(5, 5, several=True)
    mask = torch.cat([batch["mask"] for _, _, batch in steps])
    true, scores = torch.cat([b["labels"] for _, _, b in steps])[mask], torch.cat([s for _, s, _ in steps])[mask]
    values = added(TrainingF1(5), steps).compute(alone)
    assert values["micro_f1"] == pytest.approx(f1_score(true, scores.sigmoid() >= 0.5, average="micro"))
    single: dict[str, Any] = {"label": torch.tensor([0, 2, -1]), "mask": torch.tensor([True, True, False])}
    metrics = TrainingF1(3)
    metrics.add(torch.ones(3), torch.tensor([[1.0, -1, -1], [1, -1, -1], [9, 9, 9]]), single)  # type: ignore[arg-type]
    assert metrics.compute(alone)["micro_f1"] == pytest.approx(2 / (2 + 2))


def test_a_skipped_step_does_not_count() -> None:
    steps = batches(3, 3)
    expected = added(TrainingAccuracy(), steps).compute(alone)
    _, logits, batch = steps[0]
    bad = (torch.full((6,), math.nan), logits, batch)
    assert added(TrainingAccuracy(), [*steps, bad]).compute(alone) == expected


def one_of_two(rank: int, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)  # the process is forked
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def add(sums: Tensor) -> Tensor:
        dist.all_reduce(sums)
        return sums

    metrics = added(TrainingAccuracy(), batches(4, 4)[rank::2])
    queue.put(metrics.compute(add))
    dist.destroy_process_group()


def test_two_ranks_measure_as_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=one_of_two, args=(rank, str(tmp_path), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    first, second = queue.get(), queue.get()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert first == second
    assert first == pytest.approx(added(TrainingAccuracy(), batches(4, 4)).compute(alone))


class MemoryLogger(Logger):
    """Keeps what is logged."""

    name, version = "memory", ""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        for name, value in metrics.items():
            self.points.setdefault(name, {})[step] = float(value)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


class Steps(BoringModel):
    """SGD with a learning rate of 1: the weights change by the clipped gradient."""

    group_names = ("head", "backbone/last", "backbone/last")

    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        self.changes: list[float] = []

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.frozen.parameters())}, {"params": [self.layer.weight]}]
        return SGD([*groups, {"params": [self.layer.bias], "weight_decay": 0.0}], lr=1.0)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        layers = list(self.layer.parameters())
        before = [parameter.detach().clone() for parameter in layers]
        super().optimizer_step(*args, **kwargs)
        changes = [(one - other.detach()).flatten() for one, other in zip(before, layers, strict=True)]
        self.changes.append(float(torch.cat(changes).norm()))


def fitted(model: Steps, folder: Path, groups: Any = "total", **settings: Any) -> dict[str, dict[int, float]]:
    logger = MemoryLogger()
    fixed = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        **{**fixed, "max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 0, **settings},
        accelerator="cpu",
        logger=logger,
        callbacks=[GradientNorm(groups), LearningRates()],
        default_root_dir=folder,
    )
    lightning_internals.log_last_steps(trainer)
    trainer.fit(model)
    return logger.points


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_gradient_norm_is_that_of_the_step_before_clipping(
    accumulate: int, clip: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Steps()
    points = fitted(model, tmp_path, log_every_n_steps=1, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    norms = points["train/grad_norm"]
    assert sorted(norms) == list(range(len(model.changes)))
    if clip is None:
        assert list(norms.values()) == pytest.approx(model.changes, rel=1e-4)
    else:
        assert model.changes == pytest.approx([clip] * len(model.changes), rel=1e-3)
        assert min(norms.values()) > clip
    assert "train/grad_norm/head" not in points


def test_groups_of_one_name_have_one_norm_and_one_rate_and_frozen_ones_none(tmp_path: Path) -> None:
    points = fitted(Steps(), tmp_path, "per_group", log_every_n_steps=3)
    assert sorted(points["train/grad_norm"]) == [2, 4, 5, 8, 9]
    assert points["train/grad_norm/backbone/last"] == pytest.approx(points["train/grad_norm"])
    assert {tag for tag in points if tag.startswith("lr/")} == {"lr/backbone/last"}
    assert "train/grad_norm/head" not in points


class Scaler:
    def get_scale(self) -> float:
        return 1024.0


@pytest.mark.parametrize(("unscales", "expected"), [(True, 1024.0), (False, 1.0)])
def test_gradients_are_scaled_where_the_optimizer_divides(unscales: bool, expected: float) -> None:
    """As a fused one that the user chose does; Lightning divides for all others before the hook."""
    optimizer: Optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0, fused=unscales)
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=Scaler()))
    assert lightning_internals.gradient_scale(trainer, optimizer) == expected
    assert lightning_internals.gradient_scale(SimpleNamespace(precision_plugin=None), optimizer) == 1.0  # type: ignore[arg-type]
