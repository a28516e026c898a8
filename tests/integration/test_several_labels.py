"""Images with several labels: from a table of JSON lines to predictions of several classes."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import COLOURS, TINY, assert_same_weights, options, picture_files, run_here, scalars, write_files

import job

CLASSES = ("blue", "green", "red")
COMBINATIONS = [chosen for size in range(4) for chosen in itertools.combinations(CLASSES, size)]


def mixed_picture(colours: tuple[str, ...], seed: int) -> bytes:
    """A noisy picture with a stripe of each colour on grey."""
    stripes = [COLOURS[name] if name in colours else (120, 120, 120) for name in CLASSES]
    pixels = np.repeat(np.repeat(np.array(stripes, float)[None], 32, axis=0), 12, axis=1)
    pixels = (pixels + np.random.default_rng(seed).normal(0, 15, pixels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of each subset of three colours."""
    folder = tmp_path_factory.mktemp("several")
    lines = []
    for number, colours in enumerate(COMBINATIONS * 12):
        write_files(folder, {f"{number:03d}.png": mixed_picture(colours, number)})
        lines.append(json.dumps({"uri": f"{number:03d}.png", "label": list(colours)}))
    write_files(folder, {"table.jsonl": "\n".join(lines).encode()})
    return folder / "table.jsonl"


FIT: dict[str, Any] = {
    **TINY,
    "model.task": "multilabel",
    "model.milestones": "[0,0]",
    "model.lr": 0.005,
    "trainer.max_epochs": 12,
    "seed_everything": 1,
}


@pytest.fixture(scope="module")
def run_dir(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    result = run_here("fit", *options(FIT, data__root=table, run_dir=folder))
    assert result.returncode == 0, result.output
    assert "mAP" in result.output
    return folder


def test_several_labels_are_learned_and_predicted(run_dir: Path, table: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    assert report["metrics"]["val/mAP"] > 0.9
    assert report["metrics"]["val/macro_f1"] > 0.9
    assert report["checkpoints"]["best"]["value"] == max(value for _, value in scalars(str(run_dir))["val/mAP"])
    counts = report["confusion_matrix"]
    assert [sum(column) for column in zip(*(counts[name] for name in counts if name != "file"), strict=True)] == [
        report["images"]["val"]
    ] * 3
    predictor = job.load(str(run_dir))
    assert all(0 < threshold < 1 for threshold in predictor.thresholds)
    predictions = predictor.predict([mixed_picture(colours, 1000 + n) for n, colours in enumerate(COMBINATIONS)])
    labels = [prediction.as_json()["labels"] for prediction in predictions]
    assert sum(tuple(each) == colours for each, colours in zip(labels, COMBINATIONS, strict=True)) >= 6, labels

    output = run_dir / "predictions.jsonl"
    result = run_here("predict", run_dir, table.parent, "--output", output)
    assert result.returncode == 0, result.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 96
    assert all(set(line) == {"uri", "labels", "probabilities", "model", "calibrated"} for line in lines)
    expected = {json.loads(line)["uri"]: json.loads(line)["label"] for line in table.read_text().splitlines()}
    right = sum(line["labels"] == expected[Path(line["uri"]).name] for line in lines)
    assert right > 80
    for option in ("--target_precision=0.9", "--reject_below=0.9"):
        refused = run_here("predict", run_dir, table.parent, "--output", output, option)
        assert refused.returncode == 2, refused.output
        assert "rejection is for one label per image" in refused.output


def test_validate_reproduces_the_metrics(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    result = run_here("validate", run_dir)
    assert result.returncode == 0, result.output
    repeated = json.loads((run_dir / "validate.json").read_text())
    for name in ("val/mAP", "val/micro_f1", "val/macro_f1", "val/average_precision_of/red"):
        assert repeated["metrics"][name] == pytest.approx(report["metrics"][name])
    assert repeated["confusion_matrix"].items() <= report["confusion_matrix"].items()


def test_a_resumed_run_is_bit_equal(table: Path, tmp_path: Path) -> None:
    everything = {
        "model.milestones": "[1,2]",
        "model.mixup": 0.2,
        "model.label_smoothing": 0.1,
        "model.class_weights": "balanced",
        "model.ema": 0.9,
        "features.use": "never",
        "trainer.max_epochs": 3,
    }
    for name, epochs in (("whole", [3]), ("parts", [1, 3])):
        for count in epochs:
            settings = {**everything, "trainer.max_epochs": count, "data.root": table, "run_dir": tmp_path / name}
            result = run_here("fit", *options({**FIT, **settings}))
            assert result.returncode == 0, result.output
    assert_same_weights(str(tmp_path / "whole"), str(tmp_path / "parts"))
    whole, parts = (job.load(str(tmp_path / name)) for name in ("whole", "parts"))
    assert whole.thresholds == parts.thresholds


def test_the_head_trains_from_cached_features(table: Path, tmp_path: Path) -> None:
    for name in ("always", "never"):
        settings = {"model.milestones": "[3]", "features.use": name, "trainer.max_epochs": 3}
        result = run_here("fit", *options({**FIT, **settings}, data__root=table, run_dir=tmp_path / name))
        assert result.returncode == 0, result.output
    assert_same_weights(str(tmp_path / "always"), str(tmp_path / "never"))


def test_several_labels_need_the_option(table: Path, tmp_path: Path) -> None:
    result = run_here("fit", *options(TINY, data__root=table, run_dir=tmp_path / "run"))
    assert result.returncode == 2
    assert "--model.task=multilabel" in result.output


def test_one_label_per_image_can_be_learned_as_several(tmp_path: Path) -> None:
    colours = write_files(tmp_path / "colours", picture_files(["blue", "red"], 10))
    more = {"trainer.max_epochs": 1, "data.root": colours, "run_dir": tmp_path / "run"}
    result = run_here("fit", *options({**FIT, **more}))
    assert result.returncode == 0, result.output
    assert job.load(str(tmp_path / "run")).net.num_logits == 2
    result = run_here("fit", *options({**TINY, **more}))
    assert result.returncode != 0
    assert "task was 'multilabel', is 'classification'" in result.output


@pytest.mark.parametrize("use", ["always", "never"])
def test_classes_of_a_long_tail_are_drawn_equally_often(use: str, tmp_path: Path) -> None:
    files = {
        **picture_files(["blue"], 40),
        **picture_files(["red"], 6, seed=100),
        **picture_files(["green"], 6, seed=9),
    }
    more = {
        "data.root": write_files(tmp_path / "colours", files),
        "data.sampling": "balanced",
        "features.use": use,
        "model.milestones": "[2]",
    }
    for name, epochs in (("whole", [3]), ("parts", [1, 2, 3])):
        for count in epochs:
            settings = {**TINY, **more, "trainer.max_epochs": count, "run_dir": tmp_path / name}
            result = run_here("fit", *options(settings))
            assert result.returncode == 0, result.output
    assert_same_weights(str(tmp_path / "whole"), str(tmp_path / "parts"))
    if use == "never":
        other = {**TINY, **more, "data.sampling": "shuffle", "trainer.max_epochs": 4, "run_dir": tmp_path / "whole"}
        result = run_here("fit", *options(other))
        assert result.returncode != 0
        assert "balanced sampling, is" in result.output
