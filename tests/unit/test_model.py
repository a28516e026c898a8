from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from support import Explosive
from torch import nn

from job.errors import ConfigError, WeightsError
from job.model.backbone import build_backbone, feature_width
from job.model.classifier import Classifier, from_spec
from job.model.freeze import Stage, apply_stage, split_layers, stage_at
from job.model.loading import read_weights
from job.model.task import ClassificationTask, per_sample_loss

MEAN = STD = (0.5, 0.5, 0.5)


def classifier(classes: list[str], backbone: str = "resnet18", hidden: tuple[int, ...] = (8,)) -> Classifier:
    return Classifier(
        build_backbone(backbone), name=backbone, classes=classes, hidden=hidden, image_size=64, mean=MEAN, std=STD
    )


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("resnet18", 64, 512),
        ("mobilenet_v3_small", 64, 1024),
        ("efficientnet_b0", 64, 1280),
        ("convnext_tiny", 64, 768),
        ("vit_b_16", 224, 768),
        ("swin_t", 64, 768),
        ("squeezenet1_1", 64, 512),
        ("densenet121", 64, 1024),
        ("googlenet", 64, 1024),
        ("timm/test_vit", 160, 64),
        ("timm/test_resnet", 64, 96),
    ],
)
def test_any_architecture_gets_a_new_head(name: str, size: int, width: int) -> None:
    backbone = build_backbone(name)
    assert feature_width(backbone, size) == width
    net = Classifier(backbone, name=name, classes="abc", hidden=[4], image_size=size, mean=MEAN, std=STD).eval()
    assert net(torch.zeros(2, 3, size, size, dtype=torch.uint8)).shape == (2, 3)
    restored = from_spec(net.spec())
    restored.load_state_dict(net.state_dict())


def test_the_tutorials_head_is_the_default_one() -> None:
    from job.model.module import TransferLearningModel

    head = classifier(["cat", "dog"], hidden=tuple(TransferLearningModel(backbone="resnet18").config.hidden)).head
    assert [tuple(m.weight.shape) for m in head if isinstance(m, nn.Linear)] == [(256, 512), (32, 256), (1, 32)]


def test_an_unknown_architecture_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean resnet50"):
        build_backbone("resnet_50")
    with pytest.raises(ConfigError, match="timm/efficientnet_lite0"):
        build_backbone("timm/efficientnet_lite_0")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_come_from_a_uri(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = torchvision.models.resnet18()
    uri = str(tmp_path / f"w.{suffix}")
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}, uri)
    else:
        safetensors.torch.save_file(whole.state_dict(), uri)
    assert torch.equal(build_backbone("resnet18", read_weights(uri)).conv1.weight, whole.conv1.weight)


def test_weights_of_another_architecture_are_named(tmp_path: Path) -> None:
    uri = str(tmp_path / "w.pth")
    torch.save(torchvision.models.resnet34().state_dict(), uri)
    with pytest.raises(WeightsError, match=r"do not fit the backbone resnet18; .* not of this architecture: layer1\.2"):
        build_backbone("resnet18", read_weights(uri))
    state = torchvision.models.resnet18().state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    torch.save(state, uri)
    with pytest.raises(WeightsError, match=r"conv1\.weight is \(64, 1, 7, 7\), expected \(64, 3, 7, 7\)"):
        build_backbone("resnet18", read_weights(uri))


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    torch.save({"a": Explosive(tmp_path / "exploded")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="cannot be loaded safely: it holds an object made by"):
        build_backbone("resnet18", read_weights(str(tmp_path / "w.pth")))
    assert not (tmp_path / "exploded").exists()


def test_stages_follow_the_epoch() -> None:
    assert [stage_at(e, [2, 4]) for e in range(6)] == [0, 0, 1, 1, 2, 2]
    assert stage_at(9, [3]) == Stage.LAST_LAYERS


def test_a_frozen_backbone_keeps_its_statistics_and_uses_them() -> None:
    net = classifier(["a", "b"])
    apply_stage(net.backbone, Stage.HEAD, last_share=0.5, train_bn=False)
    before = {k: v.clone() for k, v in net.backbone.state_dict().items()}
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    alone = net(images[:1]).detach()
    together = net(images)
    together.sum().backward()
    # Batch statistics would make an image's output depend on its neighbours.
    assert torch.allclose(alone, together[:1], atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in net.backbone.state_dict().items())
    assert all(p.grad is None for p in net.backbone.parameters())
    assert all(p.grad is not None for p in net.head.parameters())


def test_unfreezing_goes_from_the_last_layers_to_all() -> None:
    net = classifier(["a", "b"])
    first, last = split_layers(net.backbone, 0.5)
    apply_stage(net.backbone, Stage.LAST_LAYERS, last_share=0.5, train_bn=False)
    assert all(p.requires_grad for layer in last for p in layer.parameters(recurse=False))
    assert not any(p.requires_grad for layer in first for p in layer.parameters(recurse=False))
    assert not any(layer.training for layer in first)
    apply_stage(net.backbone, Stage.ALL, last_share=0.5, train_bn=False)
    assert all(p.requires_grad for p in net.backbone.parameters())
    assert all(m.training for m in net.backbone.modules())


def test_train_bn_trains_batch_norm_alone() -> None:
    net = classifier(["a", "b"])
    apply_stage(net.backbone, Stage.HEAD, last_share=0.5, train_bn=True)
    for module in net.backbone.modules():
        trains = isinstance(module, nn.BatchNorm2d)
        assert all(p.requires_grad == trains for p in module.parameters(recurse=False))
    before = net.backbone.bn1.running_mean.clone()
    net(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    assert not torch.equal(net.backbone.bn1.running_mean, before)


def test_one_logit_gives_two_probabilities() -> None:
    logits = torch.tensor([[-3.0], [0.0], [3.0]])
    predicted = ClassificationTask.probabilities(logits)
    assert torch.allclose(predicted.sum(dim=1), torch.ones(3))
    assert predicted.argmax(dim=1)[[0, 2]].tolist() == [0, 1]
    labels = torch.tensor([0, 1, 1])
    expected = nn.functional.nll_loss(predicted.log(), labels, reduction="none")
    assert torch.allclose(per_sample_loss(logits, labels), expected)
