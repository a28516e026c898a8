"""LoRA: adapters in vision transformers of torchvision and timm, from the first step to prediction."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from support import TINY, Outcome, options, picture_files, run_here, scalars, write_files
from torch import Tensor, nn

from job import checkpoint
from job.checkpoint.state import LORA_KEY
from job.errors import CheckpointError, ConfigError
from job.features.key import weights_hash
from job.model import lora
from job.model.backbone import build_backbone
from job.model.classifier import Classifier, build_classifier
from job.model.config import ModelConfig
from job.model.ema import WeightAverage
from job.model.freeze import Stage, apply_stage
from job.model.optimizer import parameter_groups
from job.model.spec import net_state
from job.predict import load

VIT = "timm/test_vit"
IMAGES = torch.randint(0, 255, (2, 3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 16}
FUNCTIONAL: dict[str, Callable[[], nn.Module]] = {
    "multihead attention": lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 32),
    "torchvision's Swin": lambda: torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [1, 2], [4, 4]),
    "EVA and DINOv3": lambda: timm.models.eva.Eva(**SMALL),
    "BEiT": lambda: timm.models.beit.Beit(**SMALL),
}
"""Small networks that use the weights of attention layers without calling these layers."""


def config(backbone: str = VIT, **settings: Any) -> ModelConfig:
    return ModelConfig(backbone=backbone, weights="none", **{"hidden": [8], "lora_rank": 4, **settings})


def network(settings: ModelConfig, size: int = 160) -> Classifier:
    return build_classifier(settings, "none", classes=["a", "b"], image_size=size, device_type="cpu").eval()


def updated(backbone: nn.Module, seed: int = 0) -> list[lora.LowRankUpdate]:
    """Give the adapters values as after training."""
    generator = torch.Generator().manual_seed(seed)
    updates = lora.adapters(backbone)
    with torch.no_grad():
        for update in updates:
            update.lora_B.normal_(std=0.1, generator=generator)
    return updates


@torch.no_grad()
def logits(net: nn.Module) -> Tensor:
    return net(IMAGES)  # type: ignore[no-any-return]


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_before_training_the_network_is_the_base_bit_for_bit(targets: str, precision: torch.dtype) -> None:
    net, settings = network(config()), config(lora_targets=targets)
    before, weights = weights_hash(net.backbone), {name: value.clone() for name, value in net.state_dict().items()}
    for trains in (False, True):
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            expected = logits(net)
            if not trains:
                assert lora.add_adapters(net.backbone, settings) == {"attention": 12, "all": 24}[targets]
            apply_stage(net.backbone, Stage.ALL, last_share=1.0, train_bn=False)
            assert torch.equal(logits(net), expected)
    merged, parts = lora.merge(net.state_dict(), settings.lora_alpha)
    assert list(merged) == list(weights)
    assert all(torch.equal(merged[name], value) for name, value in weights.items())
    assert len(parts) == 3 * len(lora.adapters(net.backbone))
    assert weights_hash(net.backbone) == before  # cached features of the frozen epochs are those of the base


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_merged_weights_give_the_same_values_bit_for_bit(precision: torch.dtype) -> None:
    net, plain, settings = network(config()), network(config()), config(lora_alpha=7.0)
    base = logits(net)
    lora.add_adapters(net.backbone, settings)
    updated(net.backbone)
    plain.load_state_dict(lora.merge(net.state_dict(), settings.lora_alpha)[0])
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        assert torch.equal(logits(net), logits(plain))
    assert not torch.allclose(logits(plain), base, atol=1e-4)


def test_an_update_of_full_rank_is_any_change_of_the_weight() -> None:
    net, changed = network(config()), network(config())
    generator = torch.Generator().manual_seed(5)
    width = net.backbone.blocks[0].attn.proj.weight.shape[0]  # type: ignore[union-attr, index]
    settings = config(lora_rank=width, lora_alpha=float(width))
    deltas = {}
    with torch.no_grad():
        for module, name in lora.adaptable_weights(changed.backbone, settings):
            weight = getattr(module, name)
            deltas[id(weight)] = 0.1 * torch.randn(weight.shape, generator=generator)
            weight += deltas[id(weight)]
        lora.add_adapters(net.backbone, settings)
        for update, delta in zip(lora.adapters(net.backbone), deltas.values(), strict=True):
            # B @ A = delta, with A of full rank.
            update.lora_B.copy_(torch.linalg.lstsq(update.lora_A.double().T, delta.double().T).solution.T)
    merged, _ = lora.merge(net.state_dict(), settings.lora_alpha)
    for name, value in changed.state_dict().items():
        assert torch.allclose(merged[name], value, atol=1e-4), name
    assert torch.allclose(logits(net), logits(changed), atol=1e-3)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_each_adapter_is_trained_where_a_layer_is_not_called(name: str) -> None:
    backbone = FUNCTIONAL[name]()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)  # torchvision's head is zero at first, and has no gradient to pass on
    lora.add_adapters(backbone, config())
    apply_stage(backbone, Stage.ALL, last_share=0.5, train_bn=False)
    images = torch.randn(1, 3, 32, 32)
    backbone(images).square().sum().backward()
    trained = {parameter for parameter in backbone.parameters() if parameter.requires_grad}
    assert trained == {parameter for update in lora.adapters(backbone) for parameter in update.parameters()}
    for update in lora.adapters(backbone):
        assert update.lora_B.grad is not None
        assert update.lora_B.grad.any()
        assert update.lora_A.grad is not None  # zero at first: DDP takes parameters without gradient for unused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet18"}, "resnet18 has no attention with linear layers to adapt. Use a vision transformer"),
        ({"backbone": "timm/test_resnet", "lora_targets": "all"}, "has no linear layers to adapt"),
        ({"backbone": "convnext_tiny"}, "--model.lora_targets=all adapts"),
        ({"lora_rank": 65}, "--model.lora_rank 65 is higher than the rank of any adapted layer of timm/test_vit, 64"),
        ({"lora_rank": -1}, "--model.lora_rank must be at least 0"),
        ({"lora_alpha": 0.0}, "--model.lora_alpha must be a positive number"),
        ({"lora_alpha": float("nan")}, "--model.lora_alpha must be a positive number"),
        ({"lora_dropout": 1.0}, "--model.lora_dropout must be"),
        ({"train_bn": True}, "Use --model.train_bn=false"),
    ],
)
def test_what_cannot_be_adapted_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora.add_adapters(build_backbone(settings.get("backbone", VIT)), config(**settings))


def test_stages_and_parameter_groups_are_those_of_the_adapters() -> None:
    net, settings = network(config()), config(decay_norm_and_bias=False, backbone_lr_factor=0.5)
    lora.add_adapters(net.backbone, settings)
    updates = lora.adapters(net.backbone)
    half = len(updates) // 2
    for stage, trained in ((Stage.HEAD, []), (Stage.LAST_LAYERS, updates[half:]), (Stage.ALL, updates)):
        net.backbone.train()
        apply_stage(net.backbone, stage, last_share=0.5, train_bn=False)
        expected = {parameter for update in trained for parameter in update.parameters()}
        assert {parameter for parameter in net.backbone.parameters() if parameter.requires_grad} == expected
        assert [module for module in net.backbone.modules() if module.training] == trained
    groups = parameter_groups(net, settings)
    assert [(group.name, group.lr_factor, group.decays) for group in groups] == [
        ("head", 1.0, True),
        ("lora/last", 0.5, True),
        ("lora/first", 0.5, True),
        ("head", 1.0, False),
    ]
    grouped = {parameter for group in groups for parameter in group.parameters}
    assert grouped == expected | set(net.head.parameters())
    bands = parameter_groups(net, config(first_lr_factor=0.1))
    assert [group.name for group in bands][:3] == ["head", "lora/last", "lora/7"]


def test_dropout_is_off_outside_of_training() -> None:
    net, settings = network(config()), config(lora_dropout=0.5)
    lora.add_adapters(net.backbone, settings)
    update = updated(net.backbone)[0]
    weight = torch.zeros(len(update.lora_B), update.lora_A.shape[1])
    assert torch.equal(update(weight), update(weight))
    update.train()
    torch.manual_seed(1)
    kept = torch.stack([update(weight) for _ in range(400)])
    assert 0.3 < float((kept[:, 0] == 0).float().mean()) < 0.7
    assert ((kept == 0).all(1) == (kept == 0).any(1)).all()  # an input is dropped whole
    assert torch.allclose(kept.mean(0), update.eval()(weight), atol=0.15)


def test_averages_are_those_of_the_adapters() -> None:
    net, settings = network(config()), config()
    lora.add_adapters(net.backbone, settings)
    apply_stage(net.backbone, Stage.ALL, last_share=1.0, train_bn=False)
    average = WeightAverage(net, 0.5)
    updated(net.backbone)
    average.update(100)
    saved: dict[str, Any] = {"state_dict": {f"net.{name}": value for name, value in net.state_dict().items()}}
    average.save(saved)
    lora.save(saved, settings.lora_alpha)
    net.load_state_dict(average.averages)
    expected = lora.merge(net.state_dict(), settings.lora_alpha)[0]
    assert all(torch.equal(saved["state_dict"][f"net.{name}"], value) for name, value in expected.items())
    assert set(saved["training_weights"]) == {name for name in net.state_dict() if name.endswith("lora_B")}


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.pop(LORA_KEY),
        lambda saved: saved.update({LORA_KEY: [1]}),
        lambda saved: saved[LORA_KEY].popitem(),
        lambda saved: saved[LORA_KEY].update({"head.0.weight": torch.zeros(2)}),
        lambda saved: saved[LORA_KEY].update({next(iter(saved[LORA_KEY])): torch.zeros(2)}),
        lambda saved: saved[LORA_KEY].update({next(iter(saved[LORA_KEY])): "text"}),
    ],
)
def test_a_checkpoint_without_these_adapters_is_refused(damage: Any) -> None:
    net, settings = network(config()), config()
    lora.add_adapters(net.backbone, settings)
    updated(net.backbone)
    expected = {f"net.{name}": value.clone() for name, value in net.state_dict().items()}
    saved: dict[str, Any] = {"state_dict": dict(expected)}
    lora.save(saved, settings.lora_alpha)
    assert not any("parametrizations" in name for name in saved["state_dict"])
    intact = {name: dict(value) for name, value in saved.items()}
    lora.restore(intact, net.state_dict())
    assert set(intact["state_dict"]) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in intact["state_dict"].items())
    damage(saved)
    with pytest.raises(CheckpointError, match="does not hold the adapters of this run"):
        lora.restore(saved, net.state_dict())


def fit(tmp_path: Path, name: str, **changes: object) -> Outcome:
    """Train timm's smallest ViT on pictures of two colours."""
    data = write_files(tmp_path / "data", picture_files(["blue", "red"], 10))
    fixed: dict[str, object] = {"data__image_size": 160, "data__cache_dir": tmp_path / "cache", "data__num_workers": 0}
    fixed |= {"model__backbone": VIT, "model__lora_rank": 4, "model__milestones": "[1,2]", "seed_everything": 3}
    return run_here("fit", *options(TINY, data__root=data, run_dir=tmp_path / name, **{**fixed, **changes}))


def test_a_run_from_the_head_to_prediction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An epoch of the head, two with adapters; resumed, evaluated, predicted, exported and fine-tuned."""
    changes = {"model__ema": 0.5, "model__lora_dropout": 0.2, "model__optimizer": "AdamW"}
    whole = fit(tmp_path, "whole", trainer__max_epochs=3, **changes)
    assert whole.returncode == 0, whole.output
    assert "LoRA: 12 weights of the backbone have adapters" in whole.output
    assert "epoch 2: training adapters of last layers" in whole.output
    rates = {tag for tag in scalars(str(tmp_path / "whole")) if tag.startswith("lr/")}
    assert rates == {"lr/head", "lr/lora/last", "lr/lora/first"}
    for epochs in (1, 2, 3):
        part = fit(tmp_path, "parts", trainer__max_epochs=epochs, **changes)
        assert part.returncode == 0, part.output
    one, other = (checkpoint.load(checkpoint.resolve(f"{tmp_path}/{n}/checkpoints/last")) for n in ("whole", "parts"))
    for section in ("state_dict", LORA_KEY, "training_weights"):
        assert one[section].keys() == other[section].keys()
        assert all(torch.equal(value, other[section][name]) for name, value in one[section].items()), section
    base = build_classifier(config(seed=3, hidden=[8]), "none", classes=["a", "b"], image_size=160, device_type="cpu")
    originals = {name: value for name, value in one[LORA_KEY].items() if name.endswith("original")}
    for name, value in base.state_dict().items():
        if name.startswith("backbone."):
            module, _, weight = name.rpartition(".")
            saved = originals.pop(f"{module}.parametrizations.{weight}.original", None)
            assert torch.equal(value, one["state_dict"][f"net.{name}"] if saved is None else saved), name
            assert saved is None or not torch.equal(value, one["state_dict"][f"net.{name}"]), name
    assert not originals

    refused = fit(tmp_path, "parts", trainer__max_epochs=3, **{**changes, "model__lora_rank": 8})
    assert refused.returncode == 2
    assert "--model.lora_rank" in refused.output
    refused = fit(tmp_path, "parts", trainer__max_epochs=3, **{**changes, "model__lora_rank": 0})
    assert refused.returncode == 2
    assert "a run that trains adapters. Use its --model.lora_rank" in refused.output
    refused = fit(tmp_path, "parts", trainer__max_epochs=3, **{**changes, "model__lora_alpha": 8})
    assert "model.lora_alpha was 16.0, is 8.0" in refused.output

    run_dir = str(tmp_path / "whole")
    validated = run_here("validate", run_dir, "--data.cache_dir", str(tmp_path / "cache"))
    assert validated.returncode == 0, validated.output
    measured = json.loads((tmp_path / "whole/validate.json").read_text())["metrics"]
    best = checkpoint.load(checkpoint.resolve(run_dir))["manifest"]["metrics"]
    assert measured["val/loss"] == best["val/loss"]
    predictor = load(f"{run_dir}/checkpoints/last")
    assert not lora.adapters(predictor.net.backbone)
    with_adapters = network(config())
    lora.add_adapters(with_adapters.backbone, config())
    lora.restore(one, with_adapters.state_dict())
    with_adapters.load_state_dict(net_state(one, "the last one"))
    second = logits(with_adapters).sigmoid()
    assert torch.equal(predictor.probabilities(IMAGES), torch.cat([1 - second, second], dim=1))

    caplog.set_level(logging.INFO)
    again = fit(tmp_path, "again", init_from=run_dir, trainer__max_epochs=1, model__milestones="[]")
    assert again.returncode == 0, again.output
    assert "backbone features are not cached: the adapters" in again.output
    start = checkpoint.load(checkpoint.resolve(f"{tmp_path}/again/checkpoints/last"))[LORA_KEY]
    source = checkpoint.load(checkpoint.resolve(run_dir))["state_dict"]
    for name, value in start.items():
        if name.endswith("original"):
            assert torch.equal(value, source[f"net.{name.replace('parametrizations.', '').removesuffix('.original')}"])
