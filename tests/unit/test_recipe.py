"""Parts of a recipe: targets, mixup and CutMix, class weights, parameter groups, the schedule."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.cli import LightningArgumentParser, OptimizerCallable
from torch import nn

from job.errors import ConfigError
from job.model.backbone import build_backbone
from job.model.classifier import Classifier
from job.model.compile import compile_module
from job.model.config import ModelConfig
from job.model.ema import WeightAverage
from job.model.module import TransferLearningModel
from job.model.optimizer import fuse
from job.model.schedule import WarmupCosine
from job.model.scheduling import AutoSchedule
from job.model.task import balanced_weights, mixing, per_sample_loss, smoothed
from job.torch_internals import compile_seconds

MEAN = STD = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_hard_targets_give_the_plain_loss(num_classes: int) -> None:
    logits = torch.randn(16, 1 if num_classes == 2 else num_classes)
    labels = torch.randint(num_classes, (16,))
    assert torch.allclose(per_sample_loss(logits, smoothed(labels, num_classes, 0.0)), per_sample_loss(logits, labels))


def test_smoothing_is_torchs() -> None:
    logits, labels = torch.randn(16, 5), torch.randint(5, (16,))
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")
    assert torch.allclose(per_sample_loss(logits, smoothed(labels, 5, 0.2)), expected)
    two = torch.randn(16, 2)
    one = (two[:, 1] - two[:, 0])[:, None]  # the same probabilities by one logit
    expected = F.cross_entropy(two, labels % 2, label_smoothing=0.2, reduction="none")
    assert torch.allclose(per_sample_loss(one, smoothed(labels % 2, 2, 0.2)), expected, atol=1e-6)


def test_balanced_weights_average_to_one_and_equalise_classes() -> None:
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10 + [-1] * 5, np.int32)
    weights = balanced_weights(labels, 3)
    counted = torch.from_numpy(labels[labels >= 0]).long()
    assert weights[counted].mean() == pytest.approx(1.0)
    assert [float(weights[counted][counted == c].sum()) for c in range(3)] == pytest.approx([100 / 3] * 3, rel=1e-5)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixed_targets_equal_the_share_of_pixels(mixup: float, cutmix: float) -> None:
    """With constant images, the mean of a mixed image is the share of each class."""
    mix = mixing(mixup, cutmix)
    assert mix is not None
    for seed in range(10):
        torch.manual_seed(seed)
        labels = torch.tensor([0, 1, 1, 0])
        images = (255.0 * labels)[:, None, None, None].expand(4, 3, 32, 32).clone()
        mixed, targets = mix(images, smoothed(labels, 2, 0.0))
        assert torch.allclose(mixed.mean((1, 2, 3)) / 255, targets[:, 1], atol=1e-4)
        assert torch.allclose(targets.sum(1), torch.ones(4))
    assert mixing(0.0, 0.0) is None


def model(**settings: object) -> TransferLearningModel:
    """Return a module with the network that it would build for the data."""
    module = TransferLearningModel(backbone="timm/test_resnet", **settings)  # type: ignore[arg-type]
    backbone = build_backbone("timm/test_resnet")
    module.net = Classifier(backbone, name="x", classes="ab", hidden=[4], image_size=32, mean=MEAN, std=STD)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(strategy=strategy, max_epochs=15)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("decays", [True, False])
def test_each_parameter_is_in_one_group_and_vectors_do_not_decay(decays: bool) -> None:
    module = model(decay_norm_and_bias=decays, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.05))
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert len(groups) == (3 if decays else 6)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, module.net.parameters()))
    head = set(map(id, module.net.head.parameters()))
    for group in groups:
        assert group["initial_lr"] == pytest.approx(0.1 if id(group["params"][0]) in head else 0.01)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.05 if decays or parameter.ndim > 1 else 0.0)


def test_learning_rates_fall_from_the_head_to_the_first_layers() -> None:
    module = model(backbone_lr_factor=0.5, first_lr_factor=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    groups = module.configure_optimizers()["optimizer"].param_groups
    rates = [group["initial_lr"] for group in groups]
    assert rates[:2] == [1.0, 0.5]
    assert rates[-1] == pytest.approx(0.05)
    assert all(one > other for one, other in itertools.pairwise(rates))
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, module.net.parameters()))
    first = next(iter(module.net.backbone.parameters()))
    assert any(parameter is first for parameter in groups[-1]["params"])


@pytest.mark.parametrize("factory", [torch.optim.SGD, partial(torch.optim.SGD, lr=7.0), lambda p: torch.optim.SGD(p)])
def test_lr_overrides_the_optimizers_learning_rate(factory: OptimizerCallable) -> None:
    module = model(lr=0.5, backbone_lr_factor=0.1, optimizer=factory)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.5, 0.05, 0.05])
    assert module.fingerprint() == model(optimizer=partial(torch.optim.SGD, lr=0.5)).fingerprint()
    assert module.fingerprint() != model(lr=0.4, optimizer=factory).fingerprint()


def test_the_optimizer_is_created_once_besides_its_trial() -> None:
    parameters: list[int] = []

    def factory(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(params)
        parameters.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
        return optimizer

    module = model(optimizer=factory)
    module.fingerprint()
    module.configure_optimizers()
    module.fingerprint()
    trial, trained = parameters
    assert trial < 10 < trained == sum(p.numel() for p in module.net.head.parameters())


def test_a_new_run_tries_the_optimizer_again() -> None:
    module = model(lr_scheduler=AutoSchedule("CosineAnnealingLR", {"T_max": "auto"}))
    first = module.fingerprint()
    module.trainer.max_epochs = 30  # type: ignore[misc]
    module.setup("fit")
    assert "'T_max': 15" in first["model.lr_scheduler"]
    assert "'T_max': 30" in module.fingerprint()["model.lr_scheduler"]


@pytest.mark.parametrize(("saved", "loading"), [(True, None), (None, True), (False, True)])
def test_a_loaded_state_is_fused_as_the_optimizer_that_loads_it(saved: bool | None, loading: bool | None) -> None:
    """A checkpoint of another device."""
    first = torch.optim.Adam([nn.Parameter(torch.ones(2))], fused=saved)
    second = torch.optim.Adam([nn.Parameter(torch.ones(2))], fused=loading)
    fuse(second, torch.device("meta"))
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["fused"] is loading
    assert first.param_groups[0]["fused"] is saved


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_are_fused_by_default(kind: type[torch.optim.Optimizer]) -> None:
    def step(**settings: object) -> tuple[torch.optim.Optimizer, torch.Tensor]:
        module = model(optimizer=lambda p: kind(p, lr=0.1, **settings))  # type: ignore[call-arg]
        optimizer = module.configure_optimizers()["optimizer"]
        torch.manual_seed(0)
        for parameter in module.net.parameters():
            nn.init.ones_(parameter)
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return optimizer, torch.cat([parameter.detach().flatten() for parameter in module.net.parameters()])

    fused_optimizer, updated = step()
    plain_optimizer, expected = step(fused=False)
    assert {group["fused"] for group in fused_optimizer.param_groups} == {True}
    assert {group["fused"] for group in plain_optimizer.param_groups} == {False}
    assert torch.allclose(updated, expected, atol=1e-6)
    assert not step(foreach=True)[0].param_groups[0]["fused"]


def test_a_fused_optimizer_resumes_from_moments_in_another_memory_format() -> None:
    """The kernels index parameters and moments by their memory position."""

    def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            weight.grad = torch.randn(weight.shape).contiguous(memory_format=torch.channels_last)
            optimizer.step()

    def optimizer_and_weight() -> tuple[torch.optim.Optimizer, nn.Parameter]:
        weight = nn.Parameter(torch.zeros(4, 3, 5, 5).contiguous(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam([weight], lr=0.1)
        fuse(optimizer, torch.device("cpu"))
        return optimizer, weight

    whole, expected = optimizer_and_weight()
    steps(whole, expected, range(4))
    first, weight = optimizer_and_weight()
    steps(first, weight, range(2))
    saved = first.state_dict()
    for name in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][name] = saved["state"][0][name].contiguous()
    second, resumed = optimizer_and_weight()
    second.load_state_dict(saved)
    resumed.data.copy_(weight.data)
    steps(second, resumed, range(2, 4))
    assert torch.equal(resumed, expected)


def test_ema_weights_are_updated_swapped_and_saved() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    frozen = net[0].bias.clone()  # type: ignore[union-attr, operator]
    average = WeightAverage(net, 0.6)
    expected = net[0].weight.detach().clone()  # type: ignore[union-attr, operator]
    for step in range(1, 20):
        with torch.no_grad():
            net[0].weight.normal_()  # type: ignore[union-attr, operator]
        net[1].running_mean.fill_(1.0)  # type: ignore[union-attr, operator]
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()  # type: ignore[union-attr, operator]
    trained = net[0].weight.detach().clone()  # type: ignore[union-attr, operator]
    assert torch.allclose(average.averages["0.weight"], expected, atol=1e-6)
    assert torch.equal(average.averages["0.bias"], frozen)
    assert 0.99 < average.averages["1.running_mean"][0] < 1
    for _ in range(2):
        average.swap(averaged=True)
        assert torch.allclose(net[0].weight, expected, atol=1e-6)  # type: ignore[union-attr, arg-type]
        assert torch.equal(average.training["0.weight"], trained)
    average.swap(averaged=False)
    assert torch.equal(net[0].weight, trained)  # type: ignore[union-attr, arg-type]

    restored = WeightAverage(net, 0.6)
    restored.load(average.averages)
    assert all(torch.equal(restored.averages[name], value) for name, value in average.averages.items())


def test_ema_averages_only_trained_parameters() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    first, norm, _ = net
    first.requires_grad_(False)
    norm.requires_grad_(False).eval()
    average = WeightAverage(net, 0.6)
    before = {name: value.clone() for name, value in average.averages.items()}

    def moved() -> set[str]:
        with torch.no_grad():
            for value in (*net.parameters(), norm.running_mean):
                value.add_(1.0)  # type: ignore[operator, union-attr]
        average.update(20)
        return {name for name, value in average.averages.items() if not torch.equal(value, before[name])}

    assert moved() == {"2.weight", "2.bias"}
    norm.requires_grad_(True).train()
    average.set_trained(net)
    assert moved() == {"2.weight", "2.bias", "1.weight", "1.bias", "1.running_mean"}


def test_a_majority_class_weighs_as_much_as_the_other() -> None:
    module = model(class_weights="balanced")
    labels = torch.tensor([0] * 9 + [1])
    module.trainer = SimpleNamespace(
        datamodule=SimpleNamespace(parts={"train": SimpleNamespace(labels=labels.numpy())})
    )  # type: ignore[assignment]
    nn.init.zeros_(module.net.head[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(module.net.head[-1].bias)  # type: ignore[arg-type]
    batch = {"image": torch.zeros(10, 3, 32, 32, dtype=torch.uint8), "label": labels}
    with torch.no_grad():
        losses = module.eval().training_losses(batch)  # type: ignore[arg-type]
    assert losses[:9].sum() == pytest.approx(float(losses[9:].sum()), rel=1e-5)
    assert losses.mean() == pytest.approx(float(np.log(2)), rel=1e-5)


def test_the_schedule_rises_then_falls() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WarmupCosine(optimizer, warmup=3, total=11, final_factor=0.1)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[7] == pytest.approx(0.55)  # half of the way down
    assert rates[11:] == pytest.approx([0.1, 0.1])
    assert all(one > other for one, other in itertools.pairwise(rates[3:12]))


@pytest.mark.parametrize(("warmup", "total", "final_factor"), [(-1, 5, 0.0), (5, 5, 0.0), (0, 5, 1.5)])
def test_an_impossible_schedule_is_refused(warmup: int, total: int, final_factor: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match="WarmupCosine needs"):
        WarmupCosine(optimizer, warmup, total, final_factor)


def test_a_compiled_module_computes_the_same_and_the_time_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    module, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    names = list(module.state_dict())
    with monkeypatch.context() as context:
        context.setenv("CXX", "no-compiler")
        with pytest.raises(ConfigError, match="there is no no-compiler on this machine"):
            compile_module(module, torch.device("cpu"))
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    expected, before = module(images), compile_seconds()
    compile_module(module, torch.device("cpu"))
    assert torch.allclose(module(images), expected, atol=1e-5)
    assert compile_seconds() > before + 0.1
    assert list(module.state_dict()) == names


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_smoothing": 1.0},
        {"mixup": -1.0},
        {"ema": 1.0},
        {"first_lr_factor": 0.0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"milestones": [3, 2]},
        {"unfreeze_last": 0.0},
        {"hidden": [0]},
        {"max_skipped_steps": -1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"--model.{next(iter(wrong))}"):
        TransferLearningModel(**wrong)


def test_each_hyperparameter_has_a_description() -> None:
    """The description is the option's help."""
    options = {action.dest: action.help for action in parser_of_model()._actions}
    for each in fields(ModelConfig):
        assert options[f"model.{each.name}"], each.name


def parser_of_model() -> LightningArgumentParser:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(TransferLearningModel, "model")
    return parser
