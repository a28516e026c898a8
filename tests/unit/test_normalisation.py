from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from support import Explosive
from torchvision.models._api import WeightsEnum

from job.errors import WeightsError
from job.model.backbone import build_backbone
from job.model.normalisation import complete_normalisation, default_normalisation

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", IMAGENET),
        ("googlenet", HALF),
        ("inception_v3", HALF),
        ("timm/resnet18", IMAGENET),
        ("timm/tf_efficientnet_lite0", HALF),
        ("timm/vit_base_patch16_224.augreg_in21k", HALF),
    ],
)
@pytest.mark.parametrize("weights", ["DEFAULT", "none", "w.pth"])
def test_defaults_are_those_of_the_pretrained_weights(name: str, expected: object, weights: str) -> None:
    assert default_normalisation(name, weights)[:2] == expected


def test_chosen_values_win_and_the_log_says_what_is_used(caplog: pytest.LogCaptureFixture) -> None:
    mean = (0.1, 0.2, 0.3)
    with caplog.at_level(logging.INFO):
        assert complete_normalisation(mean, None, "timm/tf_efficientnet_lite0", "none") == (mean, HALF[1])
    assert "the pretrained weights of timm/tf_efficientnet_lite0" in caplog.text


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_pretrained_networks_expect_the_default_normalisation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    options = {"weights": None, "init_weights": False}
    state = torchvision.models.get_model(name, **options).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: state)
    reference = torchvision.models.get_model(name, weights="DEFAULT").eval()
    reference.fc = torch.nn.Identity()
    backbone = build_backbone(name, "DEFAULT").eval()
    images = torch.rand(2, 3, 96, 96)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    with torch.no_grad():
        expected = reference((images - mean) / std)
        assert torch.allclose(backbone((images - 0.5) / 0.5), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mnasnet0_5", "efficientnet_b0"])
def test_builders_take_their_pretrained_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = torchvision.models.get_model(name, weights=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: state)
    loaded = build_backbone(name, "DEFAULT").state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_a_damaged_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    (folder / url.rsplit("/", 1)[-1]).write_bytes(b"not a state dict")
    with pytest.raises(WeightsError, match="the pretrained weights of squeezenet1_1 cannot be loaded"):
        build_backbone("squeezenet1_1", "DEFAULT")


def test_pickled_code_in_a_download_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    torch.save({"a": Explosive(tmp_path / "exploded")}, folder / url.rsplit("/", 1)[-1])
    with pytest.raises(WeightsError, match="cannot be loaded"):
        build_backbone("squeezenet1_1", "DEFAULT")
    assert not (tmp_path / "exploded").exists()
