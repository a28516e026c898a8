from __future__ import annotations

import pytest
import torch
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn

from job.errors import ConfigError
from job.model.backbone import build_backbone
from job.model.classifier import Classifier
from job.model.sync_batchnorm import require_synchronisable

MEAN = STD = (0.5, 0.5, 0.5)


def classifier(backbone: nn.Module, name: str) -> Classifier:
    net = Classifier(backbone, name=name, classes=["a", "b"], hidden=[8], image_size=64, mean=MEAN, std=STD)
    return net.eval()


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_resnet", "resnet18"])
def test_synchronised_layers_keep_their_activations(name: str) -> None:
    torch.manual_seed(0)
    net = classifier(build_backbone(name), name)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    names, count = set(net.state_dict()), sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    with torch.no_grad():
        before = net(images)
        converted = TorchSyncBatchNorm().apply(net)
        assert torch.allclose(converted.eval()(images), before, atol=1e-6)
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == count
        assert set(converted.state_dict()) == names
        reverted = TorchSyncBatchNorm().revert(converted)
        assert torch.allclose(reverted.eval()(images), before, atol=1e-6)


class Doubling(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_other_layers_are_refused_by_name() -> None:
    backbone = build_backbone("timm/test_resnet")
    backbone.bn1 = Doubling(backbone.bn1.num_features)  # type: ignore[arg-type,union-attr]
    net = classifier(backbone, "timm/test_resnet")
    with pytest.raises(ConfigError, match="bn1 is a Doubling"):
        TorchSyncBatchNorm().apply(net)


def test_processes_on_cpus_are_refused() -> None:
    require_synchronisable("cuda", 2)
    require_synchronisable("cpu", 1)
    with pytest.raises(ConfigError, match="not between processes on CPUs"):
        require_synchronisable("cpu", 2)
