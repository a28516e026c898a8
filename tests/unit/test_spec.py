from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import REPOSITORY

from job import predict
from job.errors import CheckpointError, ConfigError
from job.model.backbone import build_backbone
from job.model.classifier import Classifier, from_spec
from job.model.spec import FORMAT, ClassifierSpec, decode_spec

NAME = "timm/test_resnet"


def classifier(name: str = NAME, size: int = 32, **changes: Any) -> Classifier:
    settings: dict[str, Any] = {"classes": ["a", "b", "c"], "hidden": [4], "image_size": size}
    settings |= {"mean": (0.5,) * 3, "std": (0.5,) * 3} | changes
    return Classifier(build_backbone(name, image_size=size), name=name, **settings)


def saved(net: Classifier, path: Path, **changes: Any) -> str:
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    content = {"classifier": {**net.spec(), "resize": "crop", **changes}, "state_dict": state}
    torch.save(content, path / "w.ckpt")
    return str(path / "w.ckpt")


NET = classifier()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10**6}, "image_size"),
        ({"image_size": 10**40}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 4}, "32|size|fit|memory"),
        ({"hidden": [10**9]}, "hidden"),
        ({"hidden": [60_000]}, r"head\.0\.weight is \(4, 96\), expected \(60000, 96\)"),
        ({"hidden": "abc"}, "hidden"),
        ({"classes": ["a", "b"]}, r"head\.2\.weight is \(3, 4\), expected \(1, 4\)"),
        ({"classes": ["a", "b", "b"]}, "same name"),
        ({"classes": ["a", "b", 3]}, "classes"),
        ({"classes": ["a", "b", "x" * 10**6]}, "classes"),
        ({"classes": []}, "classes"),
        ({"mean": [0.5, 0.5, float("nan")]}, "finite"),
        ({"std": [0.5, 0.5, 0.0]}, "above 0"),
        ({"std": [0.5, 0.5]}, "std"),
        ({"backbone": "timm/resnet_nowhere"}, "unknown backbone"),
        ({"backbone": "../../x"}, "unknown backbone"),
        ({"backbone": "regnet_y_128gf"}, "does not fit the network that it describes"),
        ({"resize": "stretch"}, "resize"),
        ({"strategy": {"class_path": "subprocess.Popen"}}, "strategy"),
        ({"\x1b[31m\nred": 1}, "red"),
        ({"format": FORMAT + 1, "strategy": 1}, f"format {FORMAT + 1}, and this version of job reads"),
        ({"format": "2"}, "format"),
    ],
)
def test_a_description_is_checked_before_memory_is_allocated(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    uri = saved(NET, tmp_path, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if changes == {"image_size": 4}:
        predict.load(uri)  # small images are fine for a network without positions
        return
    with pytest.raises(CheckpointError, match=message) as excinfo:
        predict.load(uri)
    assert str(excinfo.value).isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("content", [None, [], 3, {}, {"classifier": 3}, {"backbone": NAME}])
def test_an_invalid_description_is_refused(content: Any) -> None:
    with pytest.raises(CheckpointError, match="invalid description of its network"):
        decode_spec(content, "w.ckpt")


def test_descriptions_from_before_the_format_number_load(tmp_path: Path) -> None:
    uri = saved(NET, tmp_path)
    content = torch.load(uri, weights_only=True)
    del content["classifier"]["format"]
    torch.save(content, uri)
    assert predict.load(uri).classes == ("a", "b", "c")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("net.head.0.weight"),
        lambda s: s.pop("net.backbone.layer1.0.conv1.weight"),
        lambda s: s.update({"net.more": torch.ones(1)}),
        lambda s: s.update({"net.mean": "0.5"}),
        lambda s: s.update({"net.head.0.weight": torch.zeros(1).expand(10**9)}),
        lambda s: s.update({"net.head.0.weight": torch.zeros(4, 96, device="meta")}),
        lambda s: s.update({7: torch.ones(1)}),
    ],
)
def test_tensors_are_compared_with_the_description(change: Any, tmp_path: Path) -> None:
    uri = saved(NET, tmp_path)
    content = torch.load(uri, weights_only=True)
    change(content["state_dict"])
    torch.save(content, uri)
    with pytest.raises(CheckpointError):
        predict.load(uri)


def test_a_network_beyond_the_limits_of_a_description_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hidden\[0\]"):
        classifier(hidden=[100_000])
    with pytest.raises(ConfigError, match="above 0"):
        classifier(std=(0.5, 0.5, 0.0))


@pytest.mark.parametrize(("name", "size"), [("vit_b_32", 64), ("mnasnet0_5", 32), ("googlenet", 64)])
def test_networks_are_rebuilt_from_their_description(name: str, size: int) -> None:
    net = classifier(name, size).eval()
    restored = from_spec(net.spec(), net.state_dict()).eval()
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(net(images), restored(images))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(field=st.sampled_from([*ClassifierSpec.__struct_fields__, "other"]), value=VALUES)
def test_any_value_of_any_field_is_accepted_or_refused(field: str, value: Any) -> None:
    try:
        spec = decode_spec({**NET.spec(), field: value}, "w.ckpt")
    except CheckpointError as error:
        assert "w.ckpt" in str(error)
    else:
        assert msgspec.to_builtins(spec)[field] is not None


def test_checkpoints_do_not_depend_on_the_model() -> None:
    """Two modules of the model read checkpoints: of predictions, and of a run that another one starts from."""

    def importing(folder: str, package: str) -> list[str]:
        imports = re.compile(rf"^\s*(from {re.escape(package)}\b|import {re.escape(package)}\b)", re.MULTILINE)
        return [file.name for file in sorted((REPOSITORY / folder).glob("*.py")) if imports.search(file.read_text())]

    assert importing("job/checkpoint", "job.model") == []
    assert importing("job/resilience", "job.model") == []
    assert importing("job/checkpoint", "job.storage")
    name = re.compile(r"^from job import (.*, )?checkpoint\b", re.MULTILINE)
    model = sorted((REPOSITORY / "job" / "model").glob("*.py"))
    assert [file.name for file in model if name.search(file.read_text())] == ["loading.py", "warm_start.py"]
    others = re.compile(r"^\s*(from|import) job\.checkpoint\b(?!\.(state|initial) import)", re.MULTILINE)
    assert [file.name for file in model if others.search(file.read_text())] == []
