from __future__ import annotations

import pytest
import torch
from torch import nn

from job.model.backbone import build_backbone
from job.model.channels_last import CHANNELS_LAST_ON_CPU
from job.model.classifier import Classifier
from job.model.memory_format import memory_format

MEAN = STD = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "device", "layout"),
    [
        ("resnet18", "cpu", torch.channels_last),
        ("resnet50", "cpu", torch.channels_last),
        ("timm/tf_efficientnet_lite0", "cpu", torch.channels_last),
        ("timm/test_resnet.r160_in1k", "cpu", torch.channels_last),
        ("timm/repvgg_a0", "cpu", torch.contiguous_format),
        ("timm/fastvit_t8", "cpu", torch.contiguous_format),
        ("timm/repvgg_a0", "cuda", torch.channels_last),
        ("resnet18", "xla", torch.contiguous_format),
    ],
)
def test_the_layout_follows_the_measured_list(name: str, device: str, layout: torch.memory_format) -> None:
    assert memory_format(name, nn.Identity(), device) == layout


def test_an_unsafe_convolution_overrules_the_list() -> None:
    assert memory_format("resnet18", nn.Conv2d(3, 8, 1, stride=2), "cpu") == torch.contiguous_format
    assert memory_format("resnet18", nn.Conv2d(16, 8, 1, stride=2), "cpu") == torch.channels_last


def test_the_list_covers_torchvision_and_timm() -> None:
    timm = {name.removeprefix("timm/") for name in CHANNELS_LAST_ON_CPU if name.startswith("timm/")}
    assert len(timm) >= 60
    assert len(CHANNELS_LAST_ON_CPU) - len(timm) >= 60


@pytest.mark.parametrize("name", ["timm/repvgg_a0", "resnet18"])
def test_a_classifier_computes_in_its_layout(name: str) -> None:
    net = Classifier(
        build_backbone(name), name=name, classes=["a", "b"], hidden=[4], image_size=64, mean=MEAN, std=STD
    ).eval()
    weight = next(m.weight for m in net.backbone.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3)
    assert weight.is_contiguous(memory_format=net.memory_format)
    net(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).sum().backward()
