from __future__ import annotations

import argparse
import io
import logging
import tempfile
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from job.errors import WeightsError
from job.model.backbone import build_backbone
from job.model.loading import read_weights
from job.model.weights import load_weights

NAME = "timm/test_resnet"


def resnet_state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return dict(build_backbone(NAME).state_dict())


def saved(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def assert_loads(uri: str, state: dict[str, Tensor], backbone: str = NAME) -> None:
    loaded = build_backbone(backbone, read_weights(uri)).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "net.backbone.",
        "backbone.",
        "module._orig_mod.model.",
        "model.module.backbone.",
    ],
)
def test_any_stack_of_prefixes_is_removed(prefix: str, tmp_path: Path) -> None:
    state = resnet_state()
    others = {"criterion.weight": torch.ones(3), f"{prefix}fc.weight": torch.zeros(7, 96)}
    assert_loads(saved(prefixed(state, prefix) | (others if prefix != "_orig_mod." else {}), tmp_path / "w.pth"), state)


def test_compiled_submodules_are_found(tmp_path: Path) -> None:
    state = resnet_state()
    renamed = {name.replace("layer1.", "layer1._orig_mod."): value for name, value in state.items()}
    assert_loads(saved(renamed, tmp_path / "w.pth"), state)


def test_training_scripts_checkpoints_are_read_as_data(tmp_path: Path) -> None:
    state = resnet_state()
    reference = {"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=0.1, name="x")}
    assert_loads(saved(reference, tmp_path / "reference.pth"), state)
    lightning = {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 0.1}, "loops": {"a": [1]}}
    assert_loads(saved(lightning, tmp_path / "lightning.ckpt"), state)


@pytest.mark.parametrize("section", ["model_ema", "state_dict_ema", "ema"])
def test_ema_weights_are_preferred_and_logged(section: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = resnet_state()
    plain = {name: torch.zeros_like(value) for name, value in state.items()}
    averaged = prefixed(state, "module.") | {"n_averaged": torch.tensor(7)}
    content = {"model": plain, section: {"state_dict": averaged} if section == "ema" else averaged}
    with caplog.at_level(logging.INFO):
        assert_loads(saved(content, tmp_path / "w.pth"), state)
    assert f"the EMA weights, {section} is used" in caplog.text


def test_counters_of_batch_normalisation_may_be_missing(tmp_path: Path) -> None:
    state = {name: value for name, value in resnet_state().items() if "num_batches_tracked" not in name}
    assert_loads(saved(state, tmp_path / "w.pth"), state)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert_loads(str(tmp_path / "w.safetensors"), state)


def test_layers_with_versions_load(tmp_path: Path) -> None:
    state = dict(build_backbone("mnasnet0_5").state_dict())  # its version numbers are in no file
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert_loads(str(tmp_path / "w.safetensors"), state, "mnasnet0_5")


def test_heads_that_timm_removes_are_ignored(tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("test_vit2", num_classes=5).state_dict()
    uri = saved({"state_dict": whole}, tmp_path / "w.pth")
    kept = build_backbone("timm/test_vit2", read_weights(uri)).state_dict()
    assert kept
    assert all(torch.equal(value, whole[name]) for name, value in kept.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"conv1.0.weight": s["conv1.0.weight"] * float("nan")}, "not finite, first in conv1.0.weight"),
        (lambda s: s | {"conv1.0.weight": s["conv1.0.weight"].to(torch.complex64)}, "1 of another type"),
        (lambda s: s | {"conv1.0.weight": s["conv1.0.weight"].to_sparse()}, "no ordinary dense tensor"),
        (lambda s: s | {"conv1.0.weight": torch.zeros(1).expand(10**9)}, r"conv1.0.weight is \(1000000000,\)"),
        (lambda s: {"model": {"a": 1}}, "holds no state dict"),
        (lambda s: {"model": {**s, "epoch": 3}}, "holds no state dict in its section model"),
        (lambda s: list(s.values()), "holds no state dict"),
        (lambda s: {}, "holds no state dict"),
        (lambda s: {"other.weight": torch.ones(2)}, "missing"),
        (lambda s: s | {"\x1b[31m\nred": torch.ones(2)}, r"of this architecture: \\x1b\[31m\\x0ared"),
    ],
)
def test_unusable_weights_are_named(change: object, message: str, tmp_path: Path) -> None:
    uri = saved(change(resnet_state()), tmp_path / "w.pth")  # type: ignore[operator]
    with pytest.raises(WeightsError, match=message):
        build_backbone(NAME, read_weights(uri))


def test_an_archive_that_expands_is_refused(tmp_path: Path) -> None:
    plain = zipfile.ZipFile(saved(resnet_state(), tmp_path / "w.pth"))
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, bytes(10**8) if name.endswith("data/0") else plain.read(name))
    with pytest.raises(WeightsError, match="compressed archive"):
        read_weights(str(tmp_path / "bomb.pth"))


def test_messages_have_no_advice_of_torch_and_no_escape_codes(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as excinfo:
        read_weights(saved({"a": io.StringIO("x")}, tmp_path / "w.pth"))
    assert "\x1b" not in str(excinfo.value)
    assert "weights_only" not in str(excinfo.value)
    assert "_io.StringIO" in str(excinfo.value)


SMALL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def small_files() -> dict[str, bytes]:
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"model": SMALL.state_dict(), "args": argparse.Namespace(lr=0.1)}, zipped)
    torch.save(SMALL.state_dict(), legacy, _use_new_zipfile_serialization=False)
    tensors = safetensors.torch.save(dict(SMALL.state_dict()))
    return {"zip.pth": zipped.getvalue(), "legacy.pth": legacy.getvalue(), "w.safetensors": tensors}


FILES = small_files()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(FILES)),
    position=st.floats(0, 1, exclude_max=True),
    removed=st.integers(0, 64),
    added=st.binary(max_size=16),
)
def test_damaged_files_end_in_one_message(name: str, position: float, removed: int, added: bytes) -> None:
    content = FILES[name]
    start = int(position * len(content))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content[:start] + added + content[start + removed :])
        try:
            load_weights(SMALL, read_weights(str(path)).state, str(path), "small", ())
        except WeightsError as error:
            assert len(str(error).splitlines()) == 1
            assert str(error).isprintable()
