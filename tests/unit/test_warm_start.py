from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import COLOURS, TINY, Outcome, options, picture_files, run_here, write_files
from torch import Tensor

from job import checkpoint, redact
from job.checkpoint.initial import InitialWeights, initial_checkpoint, require_other_run, require_same_start
from job.errors import CheckpointError, ConfigError, JobError
from job.model.classifier import Classifier, build_classifier
from job.model.config import ModelConfig
from job.model.spec import TaskName
from job.model.warm_start import build_from, read_warm_start

NAME = "timm/test_resnet"
RED_GREEN_BLUE = ["blue", "green", "red"]
IMAGES = torch.randint(0, 255, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def network(classes: list[str], seed: int = 1, task: TaskName = "classification", **settings: Any) -> Classifier:
    config = ModelConfig(
        backbone=NAME, weights="none", seed=seed, task=task, **{"hidden": [8], "mean": (0.5,) * 3, **settings}
    )
    return build_classifier(config, "none", classes=classes, image_size=32, device_type="cpu").eval()


def saved(net: Classifier, path: Path, **changes: Any) -> str:
    state = {f"net.{name}": value for name, value in net.state_dict().items()} | changes.pop("state", {})
    torch.save({"state_dict": state, "classifier": net.spec() | changes, "format": 2}, path)
    return str(path)


def started(uri: str, classes: list[str], task: TaskName = "classification", size: int = 32, **settings: Any) -> Any:
    config = ModelConfig(backbone=NAME, seed=7, task=task, **{"hidden": [8], **settings})
    return build_from(
        read_warm_start(uri, config.backbone, config.pooling),
        config,
        classes=classes,
        image_size=size,
        resize="squash",
        device_type="cpu",
    ).eval()


def log_odds(net: Classifier, one: str, other: str) -> Tensor:
    """Log of the ratio of two classes' probabilities, per image."""
    with torch.no_grad():
        logits = net(IMAGES)
    classes = list(net.classes)
    if logits.shape[1] == 1:
        return logits[:, 0] * (1 if classes.index(other) == 0 else -1)
    return logits[:, classes.index(one)] - logits[:, classes.index(other)]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (["blue", "red"], ["blue", "red"]),
        (["blue", "red"], ["red", "blue"]),  # an order that a table's rows may have
        (["blue", "red"], RED_GREEN_BLUE),
        (RED_GREEN_BLUE, ["blue", "red"]),
        (RED_GREEN_BLUE, ["a", "blue", "c", "red"]),
    ],
)
def test_classes_in_both_runs_keep_their_odds(before: list[str], now: list[str], tmp_path: Path) -> None:
    old = network(before)
    new = started(saved(old, tmp_path / "old.ckpt"), now)
    assert torch.allclose(log_odds(new, "red", "blue"), log_odds(old, "red", "blue"), atol=1e-5)
    fresh = network(now, seed=7)
    for number, name in enumerate(now):  # initialised as without a warm start
        if name not in before:
            assert torch.equal(new.head[-1].weight[number], fresh.head[-1].weight[number])


@pytest.mark.parametrize(("before", "now"), [("classification", "multilabel"), ("multilabel", "classification")])
def test_the_head_is_taken_over_between_tasks(before: TaskName, now: TaskName, tmp_path: Path) -> None:
    old = network(["blue", "red"], task=before)
    new = started(saved(old, tmp_path / "old.ckpt"), ["blue", "red"], now)
    with torch.no_grad():
        if now == "multilabel":  # p(red) and 1 - p(red)
            assert torch.allclose(new(IMAGES)[:, 1], old(IMAGES)[:, 0], atol=1e-6)
            assert torch.allclose(new(IMAGES)[:, 0], -old(IMAGES)[:, 0], atol=1e-6)
        else:
            assert torch.allclose(new(IMAGES)[:, 0], log_odds(old, "red", "blue"), atol=1e-5)


def test_what_the_head_takes_over_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    uri = saved(network(["blue", "re\x1b[31md"]), tmp_path / "old.ckpt")
    new = started(uri, ["blue", "green", "white"])
    assert "head: 1 of 3 classes taken over; new: green, white; not in this run: re\\x1b[31md" in caplog.text
    assert not torch.equal(new.head[-1].weight, network(new.classes, seed=7).head[-1].weight)
    caplog.clear()
    pair = started(uri, ["blue", "green"])
    assert "head: 0 of 2 classes taken over; new: blue, green" in caplog.text
    assert "two classes share one logit" in caplog.text
    assert torch.equal(pair.head[-1].weight, network(pair.classes, seed=7).head[-1].weight)


def test_hidden_layers_are_taken_over_from_the_first_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    old = network(RED_GREEN_BLUE, hidden=[8, 5, 4])
    uri = saved(old, tmp_path / "old.ckpt")
    new, fresh = started(uri, RED_GREEN_BLUE, hidden=[8, 6, 4]), network(RED_GREEN_BLUE, seed=7, hidden=[8, 6, 4])
    assert [layer.out_features for layer in new.head[::2]] == [8, 6, 4, 3]
    layers = [(new.head[number], old.head[number]) for number in (0, 6)]
    taken = [torch.equal(layer.weight, other.weight) for layer, other in layers]
    assert taken == [True, False]  # the first hidden layer, not the last layer
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(new.head[2::2], fresh.head[2::2], strict=True))
    assert "0 of 3 classes taken over" in caplog.text
    assert "1 of 3 hidden layers taken over: their widths are [8, 6, 4]" in caplog.text


def test_other_images_than_those_of_the_first_run_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = network(["blue", "red"])
    uri = saved(old, tmp_path / "old.ckpt", resize="crop")
    new = started(uri, ["blue", "red"], size=64)
    assert torch.equal(new.mean, old.mean)  # its normalisation, not that of the architecture's weights
    assert "data.image_size was 32, is 64; data.resize was crop, is squash. The same" in caplog.text
    caplog.clear()
    started(uri, ["blue", "red"], mean=(0.1, 0.2, 0.3))
    assert "model.mean was [0.5, 0.5, 0.5], is [0.1, 0.2, 0.3]" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet18"}, f"has the backbone resnet18, and this run has {NAME}"),
        ({"classes": ["a"] * 2}, "two classes have the same name"),
        ({"classes": ["a", "b", "c"]}, r"head in .* 2.weight is \(1, 8\), expected \(3, 8\)"),
        ({"hidden": [9]}, r"head in .* is \(8, 96\), expected \(9, 96\)"),
        ({"hidden": [65_536] * 64}, "head in .* is missing"),
        ({"format": 99}, "describes its network in format 99"),
        ({"state": {"net.head.0.bias": torch.full((8,), torch.nan)}}, "not finite numbers"),
        ({"state": {"net.head.0.bias": torch.zeros(8).to_sparse()}}, "no ordinary dense tensor"),
        ({"state": {"net.head.0.bias": torch.zeros(1).expand(10**9)}}, r"is \(1000000000,\)"),
        ({"state": {"net.backbone.conv1.0.weight": torch.zeros(1)}}, "do not fit the backbone"),
    ],
)
def test_checkpoints_that_cannot_be_used_are_explained(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    uri = saved(network(["blue", "red"]), tmp_path / "old.ckpt", **changes)
    with pytest.raises(JobError, match=message):
        started(uri, ["blue", "red"])


def test_the_image_size_that_position_embeddings_need_is_named(tmp_path: Path) -> None:
    config = ModelConfig(backbone="vit_b_32", weights="none", hidden=[])
    old = build_classifier(config, "none", classes=["a", "b"], image_size=64, device_type="cpu")
    warm_start = read_warm_start(saved(old, tmp_path / "old.ckpt"), "vit_b_32", "auto")
    with pytest.raises(JobError, match=r"pos_embedding .*use --data\.image_size=64"):
        build_from(warm_start, config, classes=["a", "b"], image_size=96, resize="squash", device_type="cpu")


def test_a_run_that_resumes_with_another_source_is_refused() -> None:
    saved = InitialWeights("gs://b/runs/1/checkpoints/epoch=001-step=00000004.ckpt", "0" * 64)
    for same in ("gs://b/runs/1", "gs://b/runs/1/", "gs://b/runs/1/checkpoints/last", saved.uri):
        require_same_start(saved, same)
    for other in ("gs://b/runs/11", "gs://b/runs", saved.uri.replace("001", "002")):
        with pytest.raises(CheckpointError, match="started from gs://b/runs/1/checkpoints"):
            require_same_start(saved, other)
    with pytest.raises(CheckpointError, match="did not start from another run's weights"):
        require_same_start(None, saved.uri)
    with pytest.raises(ConfigError, match="is in the --run_dir of this run"):
        require_other_run("./runs/1/checkpoints/best", "runs/1")


def test_a_run_resumes_where_its_source_has_credentials() -> None:
    for given in (
        "https://host.example/runs/1/checkpoints/a.ckpt?sig=hunter2hunter2",
        "s3://AK:hunter2@b/runs/1/x.ckpt",
    ):
        plain = redact.remember(given)
        saved = InitialWeights(redact.saved_form(plain), "0" * 64)
        assert saved.uri != plain
        require_same_start(saved, plain)
        with pytest.raises(CheckpointError, match="would have no effect"):
            require_same_start(saved, plain.replace("runs/1", "runs/2"))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(network(["a", "b"]).state_dict(), tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of job"):
        read_warm_start(initial_checkpoint(str(tmp_path / "plain.ckpt")), NAME, "auto")
    for uri in (tmp_path / "plain.pth", tmp_path):
        with pytest.raises(CheckpointError, match=r"--init_from: no checkpoint in .* are given by --model.weights"):
            initial_checkpoint(str(uri))


def fit(tmp_path: Path, name: str, classes: list[str], **changes: object) -> Outcome:
    data = write_files(tmp_path / f"data-{name}", picture_files(classes, 10))
    fixed = {"run_dir": tmp_path / name, "data__cache_dir": tmp_path / "cache", "data__num_workers": 0}
    return run_here("fit", *options(TINY, data__root=data, model__milestones="[]", **fixed, **changes))


def test_a_run_starts_from_another_and_resumes_without_it(tmp_path: Path) -> None:
    first = fit(tmp_path, "first", ["blue", "red"], trainer__max_epochs=2, model__ema=0.9)
    assert first.returncode == 0, first.output
    source = checkpoint.resolve(str(tmp_path / "first"))
    start = {"init_from": tmp_path / "first", "model__lr": 1e-12, "model__weights": "gs://none/w.pth"}
    second = fit(tmp_path, "second", list(COLOURS), trainer__max_epochs=1, **start)
    assert second.returncode == 0, second.output
    assert "head: 2 of 3 classes taken over; new: green" in second.output
    assert "--model.weights gs://none/w.pth is not used" in second.output
    one, other = (checkpoint.load(checkpoint.resolve(str(tmp_path / name))) for name in ("first", "second"))
    frozen = [name for name in one["state_dict"] if name.endswith(("weight", "bias")) and "head.2" not in name]
    assert all(  # the averaged weights, with which the first run predicts
        torch.allclose(one["state_dict"][name], other["state_dict"][name], atol=1e-6) for name in frozen
    )
    expected = {"uri": source, "sha256": checkpoint.sha256(source)}
    assert json.loads((tmp_path / "second/report.json").read_text())["initial_weights"] == expected
    assert f"init_from: {tmp_path}/first" in (tmp_path / "second/config.yaml").read_text()
    assert expected["sha256"][:12] in (tmp_path / "second/report.html").read_text()

    shutil.rmtree(tmp_path / "first")
    settings: dict[str, object] = {"model__lr": 1e-12, "model__weights": "none"}
    for more in ({"trainer__max_epochs": 2, "init_from": tmp_path / "first"}, {"trainer__max_epochs": 3}):
        resumed = fit(tmp_path, "second", list(COLOURS), **settings, **more)
        assert resumed.returncode == 0, resumed.output
        assert "resuming after step" in resumed.output
        assert "taken over" not in resumed.output
        assert json.loads((tmp_path / "second/report.json").read_text())["initial_weights"] == expected

    refused = fit(tmp_path, "second", list(COLOURS), **settings, init_from=tmp_path / "third")
    assert refused.returncode == 2
    assert re.search(r"--init_from .*third would have no effect: .* started from .*first", refused.output)
    assert run_here("validate", tmp_path / "second", "--data.cache_dir", tmp_path / "cache").returncode == 0


def test_a_missing_source_is_a_mistake_that_leaves_nothing(tmp_path: Path) -> None:
    refused = fit(tmp_path, "second", ["blue", "red"], init_from=tmp_path / "none")
    assert refused.returncode == 2
    assert "--init_from: no checkpoint in" in refused.output
    assert not (tmp_path / "second/checkpoints").exists()
