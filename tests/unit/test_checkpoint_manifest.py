"""Manifests and state files are untrusted data, validated where they are read."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import TINY, cells_of, options, picture_files, run_here, write_files
from test_checkpoint import save, state

from job import checkpoint, storage
from job.checkpoint import confusion
from job.checkpoint.confusion import ConfusionMatrix
from job.checkpoint.manifest import Manifest, decode_manifest, encode_manifest
from job.checkpoint.retention import Retention
from job.checkpoint.settings import CheckpointSettings
from job.errors import CheckpointError, NewerFormatError


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def edit(run_dir: str, step: int, **changes: Any) -> Path:
    """Change fields of a manifest on the disk."""
    path = Path(run_dir) / "checkpoints" / f"epoch=000-step={step:08d}.ckpt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "../../../x.ckpt"},
        {"file": "epoch=000-step=00000020.ckpt"},
        {"file": "/etc/passwd"},
        {"global_step": -1},
        {"global_step": 2**70},
        {"bytes": "1"},
        {"sha256": "0"},
        {"mode": "up"},
        {"metrics": {"val/accuracy": "1"}},
        {"confusion": {"bytes": 1, "sha256": "0", "classes": 2}},
        {"metrics": [1]},
    ],
)
def test_a_manifest_with_a_bad_field_is_reported_and_kept(
    changes: dict[str, Any], run_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(run_dir, state(10, 0.9), state(20, 0.5))
    outside = Path(run_dir).parent / "x.ckpt"
    outside.write_bytes(b"precious")
    path = edit(run_dir, 10, **changes)
    Retention(CheckpointSettings(keep_last=1, keep_best=0), run_dir).remove_superseded()
    assert path.exists()
    assert outside.read_bytes() == b"precious"
    assert path.name in caplog.text
    assert checkpoint.resolve(run_dir).endswith("step=00000020.ckpt")


def test_a_copied_checkpoint_is_not_ranked(run_dir: str) -> None:
    save(run_dir, state(10, 0.9), state(20, 0.5))
    folder = Path(run_dir) / "checkpoints"
    for suffix in ("", ".json"):
        shutil.copy(folder / f"epoch=000-step=00000010.ckpt{suffix}", folder / f"best.ckpt{suffix}")
    checkpoint.remove(str(folder / "epoch=000-step=00000010.ckpt"))
    assert checkpoint.resolve(run_dir).endswith("step=00000020.ckpt")
    assert checkpoint.load(str(folder / "best.ckpt"))["state_dict"]["w"][0] == 10  # by its own name it can be had


@pytest.mark.parametrize("changes", [{"format": 3}, {"new_field": 1}, {"format": 9, "file": ["of", "another", "kind"]}])
def test_a_newer_format_is_refused_by_name(changes: dict[str, Any], run_dir: str) -> None:
    save(run_dir, state(10, 0.9), state(20, 0.5))
    edit(run_dir, 20, **changes)
    for use in (checkpoint.newest_verified, checkpoint.resolve, checkpoint.manifests):
        with pytest.raises(NewerFormatError, match="written by a newer version of job"):
            use(run_dir)


def test_a_run_without_a_readable_manifest_is_an_error(run_dir: str) -> None:
    save(run_dir, state(10), state(20))
    for path in Path(run_dir).glob("checkpoints/*.json"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        checkpoint.newest_verified(run_dir)
    for path in Path(run_dir).glob("checkpoints/*.json"):
        path.unlink()
    assert checkpoint.newest_verified(run_dir) is None  # nothing was ever committed


def test_a_damaged_manifest_is_not_overwritten(run_dir: str) -> None:
    save(run_dir, state(10), state(20))
    path = Path(run_dir) / "checkpoints" / "epoch=000-step=00000020.ckpt.json"
    path.write_bytes(b"{")
    save(run_dir, state(20))
    assert path.read_bytes() == b"{"
    assert checkpoint.manifests(run_dir)[-1].file == "epoch=000-step=00000020-2.ckpt"
    newest = checkpoint.newest_verified(run_dir)
    assert newest is not None
    assert newest.global_step == 20


def test_manifests_of_format_1_are_read(run_dir: str) -> None:
    save(run_dir, state(10, 0.9))
    path = edit(run_dir, 10, confusion_matrix=[[4, 0], [1, 3]])
    fields = json.loads(path.read_text())
    for name in ("format", "validation", "confusion"):
        del fields[name]
    path.write_text(json.dumps(fields))
    (manifest,) = checkpoint.manifests(run_dir)
    assert (manifest.global_step, manifest.value, manifest.format) == (10, 0.9, 2)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=40), st.integers(0, 10**6), st.integers(0, 60))
def test_mutated_manifests_raise_only_checkpoint_errors(patch: bytes, position: int, removed: int) -> None:
    intact = encode_manifest(
        Manifest("epoch=001-step=00000004.ckpt", 9, "0" * 64, 1, 0, 4, "val/loss", "min", {"val/loss": 0.5})
    )
    start = position % len(intact)
    content = intact[:start] + patch + intact[start + removed :]
    try:
        manifest = decode_manifest("m.json", content)
    except CheckpointError as error:
        assert "m.json" in str(error)
    else:
        assert manifest.file.startswith("epoch=")
        assert "/" not in manifest.file
        assert 0 <= manifest.global_step < 2**53


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"format": ' * 99_000, b"\xff\xfe", b"null", b"{}", b""])
def test_json_that_is_not_a_manifest(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"m\.json is damaged"):
        decode_manifest("m.json", content)


def test_metrics_that_are_not_finite_are_null_and_never_rank(run_dir: str) -> None:
    save(run_dir, state(10, 0.5), state(20, float("nan")), state(30, float("inf")))
    text = (Path(run_dir) / "checkpoints" / "epoch=000-step=00000020.ckpt.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {"val/accuracy": None}
    assert checkpoint.resolve(run_dir).endswith("step=00000010.ckpt")


def test_confusion_matrices_lie_beside_their_checkpoint(run_dir: str) -> None:
    matrix = ConfusionMatrix(np.array([[3, 5, 7], [999, 0, 2]]), 1000)
    save(run_dir, {**state(10, 0.5), "confusion": matrix}, {**state(20, 0.6), "confusion": matrix})
    (first, second) = checkpoint.manifests(run_dir)
    assert checkpoint.confusion_cells(run_dir, first).tolist() == [[3, 5, 7], [999, 0, 2]]  # type: ignore[union-attr]
    assert "confusion" not in checkpoint.load(f"{run_dir}/checkpoints/{first.file}")
    assert max(p.stat().st_size for p in Path(run_dir).glob("checkpoints/*.json")) < 2000
    path = Path(checkpoint.confusion_uri(run_dir, second))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.confusion_cells(run_dir, second)
    checkpoint.remove(f"{run_dir}/checkpoints/{second.file}")
    assert not path.exists()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_confusion_files_that_agree_with_their_manifest_may_hold_anything(data: st.DataObject) -> None:
    intact = confusion.encode(cells_of([[4, 1], [0, 3]]))
    content = bytearray(intact)
    for position in data.draw(st.lists(st.integers(0, len(intact) - 1), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    uri = "memory://confusion/file"
    storage.write_bytes(uri, bytes(content))
    try:
        cells = confusion.read(uri, confusion.describe(bytes(content), 2))
    except CheckpointError:
        return
    assert cells.shape[1] == 3
    assert not cells.size or (cells.min() >= 0 and cells[:, :2].max() < 2)


def test_few_classes_are_reported_whole_and_many_by_cell() -> None:
    small = confusion.as_json(cells_of([[4, 1], [0, 3]]), 2)
    assert small["counts"] == [[4, 1], [0, 3]]
    many = confusion.as_json(cells_of(np.eye(5000, dtype=np.int64)), 5000, "uri")
    assert many["true_predicted_count"][7] == [7, 7, 1]
    assert len(msgspec.json.encode(many)) < 200_000


def mutated(value: Any, dice: random.Random) -> Any:
    """A copy of a tree of dicts and lists with one entry replaced, removed or added somewhere."""
    other = dice.choice([None, -1, 10**12, 2**70, 1.5, float("nan"), "x", [], {}, [1], torch.zeros(3), True])
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        if dice.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        position = dice.randrange(len(value))
        return [*value[:position], mutated(value[position], dice), *value[position + 1 :]]
    return other


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run that has one epoch and one checkpoint within the next."""
    folder = tmp_path_factory.mktemp("trained")
    write_files(folder / "data", picture_files(["blue", "red"], 6))
    settings = options(
        TINY, data__root=folder / "data", run_dir=folder / "run", data__cache_dir=folder / "cache",
        features__use="never", data__num_workers=0, model__milestones="[9]", trainer__max_epochs=2,
    )  # fmt: skip
    assert run_here("fit", *settings, "--trainer.max_epochs=1").returncode == 0
    return settings


MUTANTS = 25


@pytest.mark.parametrize("seed", range(MUTANTS))
def test_a_state_that_agrees_with_its_manifest_may_hold_anything(seed: int, trained: list[str], tmp_path: Path) -> None:
    """With one mutated entry and a matching manifest, training resumes or ends with a message, never a traceback."""
    dice = random.Random(seed)
    source = Path(next(o for o in trained if "--run_dir=" in o).split("=", 1)[1])
    shutil.copytree(source, tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    content = torch.load(file, weights_only=True)
    key = dice.choice([k for k in content if k not in ("state_dict", "classifier")] * 3 + list(content))
    content[key] = mutated(content[key], dice)
    torch.save(content, file)
    manifest = json.loads(Path(f"{file}.json").read_text())

    manifest |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    Path(f"{file}.json").write_text(json.dumps(manifest))
    end = run_here("fit", *trained, f"--run_dir={tmp_path}/run")  # raises what would be a traceback
    assert end.returncode in (0, 2), (key, content[key], end.output)
