"""DINOv2, DINOv3, SigLIP 2, EVA-02 and ConvNeXt V2: from a folder of weights to equal probabilities everywhere."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from support import (
    COLOURS,
    TINY,
    fit_here,
    options,
    own_messages,
    picture,
    picture_files,
    run_here,
    write_files,
)
from tiny_backbones import FAMILIES, MEAN, STD, hub_folder, random_network
from torch import Tensor, nn

from job import checkpoint
from job.checkpoint.state import CLASSIFIER_KEY
from job.data.dataset import Preprocessing
from job.errors import ConfigError, WeightsError
from job.features.key import feature_key
from job.features.network import bare_backbone
from job.model.backbone import build_backbone, feature_width
from job.model.classifier import from_spec
from job.model.image_size import own_image_size
from job.model.loading import read_weights
from job.model.normalisation import complete_normalisation
from job.model.pooling import Pooling
from job.model.spec import decode_spec
from job.model.weights_config import MAX_BYTES
from job.predict import load

POOLINGS: dict[str, Pooling] = {
    "tiny_dinov2": "cls+mean",
    "tiny_dinov3": "cls",
    "tiny_siglip2": "mean",
    "tiny_eva02": "cls+mean",
    "tiny_convnextv2": "auto",
}
PREFIX_TOKENS = {"tiny_dinov2": 5, "tiny_dinov3": 5, "tiny_siglip2": 0, "tiny_eva02": 1}


def reference(network: Any, name: str, pooling: Pooling, images: Tensor) -> Tensor:
    """Features by timm's own functions."""
    if pooling == "auto":
        pooled: Tensor = network.forward_head(network.forward_features(images), pre_logits=True)
        return pooled
    tokens = network.forward_features(images)
    parts = {"cls": tokens[:, 0], "mean": tokens[:, PREFIX_TOKENS[name] :].mean(1)}
    return torch.cat([network.fc_norm(parts[each]) for each in pooling.split("+")], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_fit_on_features_predict_and_export_agree(name: str, tmp_path: Path) -> None:
    network = hub_folder(name, tmp_path / "weights")
    pooling = POOLINGS[name]
    run_dir = fit_here(
        tmp_path,
        model__backbone=f"timm/{name}",
        model__weights=tmp_path / "weights" / "model.safetensors",
        model__pooling=pooling,
        model__milestones="[3]",
        data__image_size="auto",
    )
    assert (run_dir / "features").is_dir()
    spec = checkpoint.load(checkpoint.resolve(str(run_dir)))[CLASSIFIER_KEY]
    assert spec["image_size"] == FAMILIES[name]
    assert spec["mean"] == pytest.approx(MEAN)
    assert spec["std"] == pytest.approx(STD)
    assert spec.get("pooling", "auto") == pooling

    predictor = load(str(run_dir), device="cpu")
    content = picture(COLOURS["red"], 5, (FAMILIES[name],) * 2, "PNG")
    images = torch.as_tensor(predictor.preprocessing.decoded(content)).float()[None] / 255
    with torch.no_grad():
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        logit = predictor.net.head(reference(network, name, pooling, (images - mean) / std))
    assert predictor.predict(content).probabilities["red"] == pytest.approx(logit.sigmoid().item(), abs=1e-5)

    formats = "onnx,weights" if name == "tiny_eva02" else "weights"
    exported = run_here("export", run_dir, tmp_path / "out", "--format", formats)
    assert exported.returncode == 0, exported.output
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config.get("pooling", "auto") == pooling


@pytest.mark.parametrize("name", PREFIX_TOKENS)
def test_poolings_differ_and_are_restored(name: str) -> None:
    size = FAMILIES[name]
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    own = "mean" if name == "tiny_siglip2" else "cls"
    poolings: list[Pooling] = ["auto", "mean"] if own == "mean" else ["auto", "cls", "mean", "cls+mean"]
    features: dict[Pooling, Tensor] = {}
    keys = set()
    for pooling in poolings:
        net = bare_backbone(f"timm/{name}", "none", image_size=size, mean=MEAN, std=STD, pooling=pooling)
        features[pooling] = net.features(images)
        restored = from_spec(net.spec(), net.state_dict()).eval()
        assert restored.pooling == pooling
        assert torch.equal(restored.features(images), features[pooling])
        assert net.spec()["format"] == (1 if pooling == "auto" else 3)
        keys.add(feature_key(net, "weights", "content", Preprocessing(size, "squash"), seed=0, precision="32-true"))
    assert len(keys) == len(poolings)
    width = features["auto"].shape[1]
    assert features["mean"].shape[1] == width
    if own == "cls":
        assert features["cls+mean"].shape[1] == 2 * width
        assert torch.allclose(features["cls+mean"], torch.cat([features["cls"], features["mean"]], 1), atol=1e-6)
        assert not torch.allclose(features["cls"], features["mean"], atol=1e-3)
    else:
        assert not torch.allclose(features["auto"], features["mean"], atol=1e-3)


def test_descriptions_of_earlier_versions_have_the_own_pooling() -> None:
    net = bare_backbone("timm/test_vit", "none", image_size=160)
    assert "pooling" not in net.spec()
    assert decode_spec(net.spec(), "old").pooling == "auto"


@pytest.mark.parametrize(
    ("name", "pooling", "message"),
    [
        ("timm/test_convnext2", "cls", "timm/test_convnext2, no vision transformer of timm. It has: auto"),
        ("resnet18", "mean", "It has: auto"),
        ("vit_b_32", "cls+mean", "It has: auto"),
        ("timm/tiny_siglip2", "cls+mean", "without a class token. It has: auto, mean"),
    ],
)
def test_poolings_that_do_not_exist_are_named(name: str, pooling: Pooling, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--model.pooling={pooling.replace('+', '.')} .*{message}"):
        build_backbone(name, image_size=64, pooling=pooling)


def test_init_from_requires_the_same_pooling(tmp_path: Path) -> None:
    settings = {"model__backbone": "timm/tiny_dinov2", "data__image_size": 28, "trainer__max_epochs": 1}
    run_dir = fit_here(tmp_path, **settings, model__pooling="cls+mean")
    changes = {"data__root": tmp_path / "colours", "run_dir": tmp_path / "other", "init_from": run_dir, **settings}
    result = run_here("fit", *options(TINY, **changes))
    assert result.returncode == 2
    assert "Use --model.pooling=cls+mean." in result.output
    result = run_here("fit", *options(TINY, **changes, model__pooling="cls+mean"))
    assert result.returncode == 0, result.output


def dinov2_file(network: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the original repository: the class token has a position of its own there."""
    state = dict(network.state_dict())
    position = torch.randn(1, 1, 32)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 32)
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def dinov3_file(network: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the original repository."""
    names = {"reg_token": "storage_tokens"}
    state = {names.get(name, name): value for name, value in network.state_dict().items()}
    state = {name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for name, v in state.items()}
    own = {name: value for name, value in state.items() if not name.startswith("head.")}
    own |= {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4, dtype=torch.bfloat16)}
    for block in range(2):
        own[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(96)
        own[f"blocks.{block}.attn.qkv.bias_mask"] = torch.zeros(96)
    return own


@pytest.mark.parametrize(("name", "renamed"), [("tiny_dinov2", dinov2_file), ("tiny_dinov3", dinov3_file)])
def test_files_of_the_original_repositories(
    name: str,
    renamed: Callable[[nn.Module], dict[str, Tensor]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = random_network(name)
    torch.save(renamed(network), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        loaded = build_backbone(f"timm/{name}", read_weights(str(tmp_path / "w.pth"))).state_dict()
    expected = network.state_dict()
    assert all(torch.allclose(value, expected[key], atol=1e-6) for key, value in loaded.items())
    assert "tensors were renamed as timm does" in caplog.text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["tiny_dinov2", "tiny_siglip2", "tiny_eva02"])
def test_position_embeddings_are_resampled_as_timm_does(name: str, tmp_path: Path) -> None:
    hub_folder(name, tmp_path)
    size = 2 * FAMILIES[name]
    file = str(tmp_path / "model.safetensors")
    backbone = build_backbone(f"timm/{name}", read_weights(file), size).eval()
    overlay = {"file": file}
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, num_classes=0)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(backbone(images), other.eval()(images), atol=1e-5)
    assert feature_width(backbone, size) == 32


def test_images_smaller_than_a_patch_are_named() -> None:
    with pytest.raises(ConfigError, match="does not accept 8x8 images"):
        bare_backbone("timm/tiny_dinov2", "none", image_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {name: v for name, v in s.items() if name != "blocks.1.norm1.weight"}, "1 missing: blocks.1.norm1"),
        (lambda s: {"pos_embed": torch.zeros(3), **{n: v for n, v in s.items() if n != "pos_embed"}}, "pos_embed is"),
        (lambda s: {"embeddings.cls_token": torch.zeros(1)}, "names of the library transformers.*timm organization"),
        (lambda s: {"mask_token": torch.zeros(1, 32)}, "missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    state = change(dict(random_network("tiny_dinov2").state_dict()))
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=message):
        build_backbone("timm/tiny_dinov2", read_weights(str(tmp_path / "w.safetensors")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub")
    hub_folder("tiny_dinov2", path)
    return path


def planted(folder: Path, tmp_path: Path, config: bytes) -> str:
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    return str(tmp_path / "model.safetensors")


def test_chosen_values_win_and_a_contradiction_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = read_weights(str(folder / "model.safetensors"))
    assert complete_normalisation(None, None, "timm/tiny_dinov2.test", weights) == (MEAN, STD)
    chosen = (0.5, 0.5, 0.5)
    caplog.clear()
    assert complete_normalisation(chosen, STD, "timm/tiny_dinov2", weights) == (chosen, STD)
    (warning,) = own_messages(caplog)
    assert "--model.mean is [0.5, 0.5, 0.5], and the weights were trained with [0.1, 0.2, 0.3]" in warning
    caplog.clear()
    assert complete_normalisation(MEAN, STD, "timm/tiny_dinov2", weights) == (MEAN, STD)
    assert own_messages(caplog) == []


def test_a_config_of_another_architecture_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = read_weights(str(folder / "model.safetensors"))
    assert complete_normalisation(None, None, "timm/test_vit", weights) == ((0.5,) * 3, (0.5,) * 3)
    assert "config.json is not used: it describes tiny_dinov2, and not timm/test_vit" in caplog.text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (b'{"architecture": "tiny_dinov2", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}', MEAN),
        (b'{"preprocessing": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "image_size": 28}}', MEAN),
        (b'{"architectures": ["Dinov2Model"], "image_size": "large", "mean": "no number"}', None),
        (b"{}", None),
    ],
)
def test_forms_of_a_config(config: bytes, expected: object, folder: Path, tmp_path: Path) -> None:
    found = read_weights(planted(folder, tmp_path, config)).config
    assert (None if found is None else found.mean) == expected


@pytest.mark.parametrize(
    "config",
    [
        b"no JSON",
        b"[1, 2]",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"pretrained_cfg": {"mean": [0.1, 0.2], "std": [0.4, 0.5, 0.6]}}',
        b'{"pretrained_cfg": {"mean": [0.1, 0.2, 1e999], "std": [0.4, 0.5, 0.6]}}',
        b'{"pretrained_cfg": {"mean": [0.1, 0.2, NaN], "std": [0.4, 0.5, 0.6]}}',
        b'{"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0, 0.5, 0.6]}}',
        b'{"pretrained_cfg": {"mean": [124, 116, 104], "std": [58, 57, 57]}}',
        b'{"pretrained_cfg": {"input_size": [3, 1000000000, 1000000000]}}',
    ],
)
def test_a_damaged_config_is_named(config: bytes, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json, beside the weights, is invalid: .*remove the file"):
        read_weights(planted(folder, tmp_path, config))


def test_a_config_that_is_too_large_is_not_read(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_weights(planted(folder, tmp_path, b" " * (MAX_BYTES + 1))).config is None
    assert "is not used" in caplog.text


@pytest.mark.parametrize(
    ("backbone", "weights", "size"),
    [
        ("resnet50", "DEFAULT", 224),
        ("inception_v3", "none", 299),
        ("timm/vit_small_patch14_dinov2", "DEFAULT", 518),
        ("timm/vit_base_patch16_siglip_384.v2_webli", "none", 384),
        ("timm/convnextv2_tiny.fcmae_ft_in22k_in1k_384", "none", 384),
    ],
)
def test_image_sizes_of_architectures(backbone: str, weights: str, size: int) -> None:
    assert own_image_size(backbone, weights) == size


def test_image_sizes_of_files(folder: Path, tmp_path: Path) -> None:
    size = b'{"architecture": "tiny_dinov2", "pretrained_cfg": {"input_size": [3, 28, 28]}}'
    weights = planted(folder, tmp_path, size)
    assert own_image_size("timm/tiny_dinov2", weights) == 28
    assert own_image_size("timm/test_vit", weights) == 160
    for name in ("resnet_50", "timm/no_such"):
        with pytest.raises(ConfigError, match="unknown backbone"):
            own_image_size(name, weights)


def test_a_run_keeps_its_image_size_when_the_weights_are_gone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "weights")
    settings: dict[str, object] = {
        "model__backbone": "timm/tiny_dinov2",
        "model__weights": tmp_path / "weights" / "model.safetensors",
        "data__image_size": "auto",
    }
    run_dir = fit_here(tmp_path, **settings, trainer__max_epochs=1)
    shutil.rmtree(tmp_path / "weights")
    again = options(TINY, **settings, data__root=tmp_path / "colours", run_dir=run_dir, trainer__max_epochs=2)
    result = run_here("fit", *again)
    assert result.returncode == 0, result.output
    assert "image_size: 56" in (run_dir / "config.yaml").read_text()
    tested = run_here("validate", run_dir)
    assert tested.returncode == 0, tested.output


@pytest.mark.parametrize(
    ("recipe", "changes", "pooling"),
    [
        ("linear_probe", {"trainer.max_epochs": 4}, "auto"),
        ("dinov2", {"trainer.max_epochs": 4, "data.image_size": 28, "model.backbone": "timm/tiny_dinov2"}, "cls+mean"),
        ("probe_then_finetune", {"trainer.max_epochs": 7}, "auto"),
    ],
)
def test_recipes(recipe: str, changes: dict[str, object], pooling: str, folder: Path, tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", picture_files(["blue", "red"], 10))
    weights = folder / "model.safetensors"
    settings: dict[str, object] = {
        "config": recipe,
        "model.backbone": "timm/tiny_dinov2",
        "model.weights": weights,
        "data.root": images,
        "data.global_batch_size": 8,
        "data.num_workers": 1,
        "run_dir": tmp_path / "run",
        "trainer.accelerator": "cpu",
        **changes,
    }
    result = run_here("fit", *options(settings))
    assert result.returncode == 0, result.output
    saved = checkpoint.load(checkpoint.resolve(f"{tmp_path / 'run'}/checkpoints/last"))
    assert saved[CLASSIFIER_KEY].get("pooling", "auto") == pooling
    assert saved[CLASSIFIER_KEY]["hidden"] == []
    assert saved[CLASSIFIER_KEY]["image_size"] == changes.get("data.image_size", 56)
    pretrained = build_backbone("timm/tiny_dinov2", read_weights(str(weights)), 56).state_dict()["norm.weight"]
    trained = not torch.equal(saved["state_dict"]["net.backbone.norm.weight"], pretrained)
    assert trained == (recipe == "probe_then_finetune")
    assert (tmp_path / "run" / "features").is_dir()


def test_timm_loads_an_export_of_another_image_size(tmp_path: Path) -> None:
    run_dir = fit_here(
        tmp_path,
        model__backbone="timm/tiny_dinov2",
        model__hidden="[]",
        data__image_size=28,
        trainer__max_epochs=1,
    )
    result = run_here("export", run_dir, tmp_path / "out", "--format", "weights")
    assert result.returncode == 0, result.output
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    predictor = load(str(run_dir), device="cpu")
    content = picture(COLOURS["red"], 5, (28, 28), "PNG")
    image = torch.as_tensor(predictor.preprocessing.decoded(content)).float()[None] / 255
    with torch.no_grad():
        probabilities = network((image - predictor.net.mean) / predictor.net.std).softmax(1)[0].tolist()
    assert list(predictor.predict(content).probabilities.values()) == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.backbone": "timm/test_convnext2", "model.pooling": "cls"}, "It has: auto."),
        ({"model.pooling": "max"}, "model.pooling"),
        ({"data.image_size": "automatic"}, "image_size"),
        ({"model.backbone": "timm/tiny_dinov", "data.image_size": "auto"}, "Did you mean timm/tiny_dinov"),
    ],
)
def test_mistakes_end_in_a_message(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", picture_files(["blue", "red"], 5))
    result = run_here("fit", *options({**TINY, "data.root": images, "run_dir": tmp_path / "run", **changes}))
    assert result.returncode == 2
    assert message in result.output
    assert "Traceback" not in result.output
