"""Calibration: planted temperatures are recovered, predictions stay, and hostile checkpoints are refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from support import COLOURS, TINY, options, picture, picture_files, run_here, write_files
from test_export import model_of, require_all_formats_equal

from job import checkpoint
from job.checkpoint.state import CALIBRATOR_KEY
from job.errors import CheckpointError, ConfigError
from job.export.network import ProbabilityNetwork, TrainedModel
from job.model.calibrator import Calibrator, read_calibrator
from job.model.calibrator_fit import LEAST_SAMPLES, fit_platt, fit_temperature
from job.model.logit_sample import MOST_LOGITS, LogitSample
from job.model.selective import risk_coverage
from job.predict.predictor import Predictor, load

Array = npt.NDArray[Any]


def planted(count: int, classes: int, temperature: float, seed: int = 0) -> tuple[Array, Array]:
    """Logits that are too large by ``temperature``, and labels drawn by the true probabilities."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(count, classes)) * 2
    noise = rng.gumbel(size=(count, classes))
    labels = (true + noise).argmax(axis=1)  # a draw from the softmax of the true logits
    logits = (true * temperature).astype(np.float32)
    return (logits[:, 1:] - logits[:, :1] if classes == 2 else logits), labels


@pytest.mark.parametrize(("classes", "temperature"), [(2, 3.0), (2, 0.5), (10, 2.5), (100, 0.7)])
def test_a_planted_temperature_is_recovered(classes: int, temperature: float) -> None:
    logits, labels = planted(20_000, classes, temperature)
    fit = fit_temperature(logits, labels)
    assert fit.calibrator is not None
    assert fit.calibrator.temperature == pytest.approx(temperature, rel=0.03)
    assert fit.before is not None
    assert fit.after is not None
    assert fit.after.error < 0.015 < 0.05 < fit.before.error
    assert fit_temperature(logits, labels).calibrator == fit.calibrator


def test_planted_scales_and_offsets_are_recovered_and_rare_classes_stay() -> None:
    rng = np.random.default_rng(1)
    true = rng.normal(size=(20_000, 6)) * 2 - 1
    true[:, 5] = -12.0
    labels = (rng.random(true.shape) < 1 / (1 + np.exp(-true))).astype(np.uint8)
    scale, offset = rng.uniform(0.4, 2, 6), rng.uniform(-1, 1, 6)
    fit = fit_platt(((true - offset) / scale).astype(np.float32), labels)
    assert fit.calibrator is not None
    assert fit.calibrator.scale[:5] == pytest.approx(scale[:5], rel=0.08)
    assert fit.calibrator.offset[:5] == pytest.approx(offset[:5], abs=0.1)
    assert (fit.calibrator.scale[5], fit.calibrator.offset[5], fit.calibrator.calibrated_classes) == (1.0, 0.0, 5)
    assert fit.before is not None
    assert fit.after is not None
    assert fit.after.error < 0.01 < fit.before.error


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("few", "too few"),
        ("right", "are right"),
        ("wrong", "are wrong"),
        ("nan", "not finite"),
        ("random", "does not"),
        ("calibrated", "does not lower"),
    ],
)
def test_without_use_probabilities_stay_as_they_are_for_a_reason(change: str, reason: str) -> None:
    logits, labels = planted(200, 5, 1.0 if change == "calibrated" else 3.0, seed=1)
    if change == "few":
        logits, labels = logits[: LEAST_SAMPLES - 1], labels[: LEAST_SAMPLES - 1]
    elif change == "right":
        labels = logits.argmax(axis=1)
    elif change == "wrong":
        labels = logits.argmin(axis=1)
    elif change == "nan":
        logits[7, 2] = math.nan
    elif change == "random":
        labels = np.random.default_rng(3).permutation(labels)
    fit = fit_temperature(logits, labels)
    assert re.search(reason, fit.reason)
    assert fit.after is None
    if change in ("few", "nan"):
        assert fit.calibrator is None
        return
    assert fit.calibrator is not None
    assert fit.calibrator.is_identity
    assert torch.equal(fit.calibrator.apply(torch.from_numpy(logits)), torch.from_numpy(logits))
    confidences = torch.from_numpy(logits).double().softmax(dim=1).amax(dim=1).numpy()
    curve, expected = fit.calibrator.risk_coverage, risk_coverage(confidences, logits.argmax(axis=1) == labels)
    assert curve is not None
    assert (curve.accepted, curve.correct) == (expected.accepted, expected.correct)
    assert curve.thresholds == pytest.approx(expected.thresholds)


def test_several_labels_without_use() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    assert "no class has" in fit_platt(logits, np.zeros((200, 3), np.uint8)).reason
    assert "too few" in fit_platt(logits[:9], np.zeros((9, 3), np.uint8)).reason
    logits[0, 0] = math.inf
    assert "not finite" in fit_platt(logits, np.ones((200, 3), np.uint8)).reason


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.7, 20.0])
@pytest.mark.parametrize("width", [1, 3, 1000])
def test_a_temperature_changes_no_prediction(temperature: float, width: int) -> None:
    logits = torch.randn(500, width, generator=torch.Generator().manual_seed(0)) * 5
    calibrated = Calibrator("temperature", 100, temperature=temperature).apply(logits)
    if width == 1:
        assert torch.equal(calibrated > 0, logits > 0)
    assert torch.equal(calibrated.argmax(dim=1), logits.argmax(dim=1))


def test_thresholds_of_several_labels_decide_the_same_after_calibration() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 4, generator=generator) * 8
    thresholds = [0.5, 0.0, 1.0, 0.0123]
    calibrator = Calibrator("platt", 100, scale=[2.0, 0.3, 0.1, 1.0], offset=[-1.0, 3.0, 1.0, 0.0])
    before = logits.sigmoid() >= torch.tensor(thresholds)
    after = calibrator.apply(logits).sigmoid() >= torch.tensor(calibrator.calibrated_thresholds(thresholds))
    assert torch.equal(before, after)


GOOD: dict[str, Any] = msgspec.to_builtins(Calibrator("temperature", 60, temperature=2.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": math.nan},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": 1e30},
        {"temperature": math.inf},
        {"temperature": "2"},
        {"temperature": torch.tensor(2.0)},
        {"method": "code"},
        {"method": "platt"},
        {"method": "platt", "scale": [1.0], "offset": [0.0]},
        {"method": "platt", "scale": [1.0] * 3, "offset": [math.nan] * 3},
        {"scale": [1.0]},
        {"samples": -1},
        {"unknown": 1},
        {"format": 99},
        {"risk_coverage": {"thresholds": [0.5], "accepted": [0], "correct": [0]}},
        {"risk_coverage": {"thresholds": [math.nan], "accepted": [1], "correct": [0]}},
        {"risk_coverage": {"thresholds": [0.5] * 1000, "accepted": [1] * 1000, "correct": [0] * 1000}},
    ],
)
def test_a_hostile_calibration_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"gs://b/x\.ckpt.*--calibrated=false"):
        read_calibrator({CALIBRATOR_KEY: {**GOOD, **changes}}, "gs://b/x.ckpt", 3, "classification")


@pytest.mark.parametrize("entry", ["text", 7, [1], {1: 2}])
def test_a_calibration_of_another_kind_is_refused(entry: object) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        read_calibrator({CALIBRATOR_KEY: entry}, "x.ckpt", 3, "classification")


def test_a_calibration_is_optional_and_belongs_to_its_task() -> None:
    assert read_calibrator({}, "x", 3, "classification") is None
    assert read_calibrator({CALIBRATOR_KEY: GOOD}, "x", 3, "classification") == Calibrator(
        "temperature", 60, temperature=2.0
    )
    with pytest.raises(CheckpointError, match="multilabel"):
        read_calibrator({CALIBRATOR_KEY: GOOD}, "x", 3, "multilabel")


def test_the_threshold_of_a_precision_accepts_the_most_predictions_that_reach_it() -> None:
    confidences = np.linspace(0, 1, 1000)
    correct = confidences > 0.4
    curve = risk_coverage(confidences, correct)
    assert len(curve.thresholds) <= 256
    point = curve.at(0.9)
    assert point is not None
    accepted = confidences >= point.threshold
    assert point.precision == pytest.approx(correct[accepted].mean())
    assert point.precision >= 0.9
    assert point.coverage == pytest.approx(600 / 0.9 / 1000, abs=0.01)
    assert risk_coverage(np.array([0.9, 0.9]), np.array([True, False])).at(0.5) is None  # too few
    assert risk_coverage(confidences, np.zeros(1000, bool)).at(0.5) is None


def test_the_sample_of_logits_is_bounded_and_does_not_depend_on_batches() -> None:
    width, count = 4096, 3000
    logits, labels, samples = torch.randn(count, width), torch.arange(count) % width, torch.arange(count)
    sampled = []
    for batch in (100, 1500):
        kept = LogitSample(sync_on_compute=False)
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            kept.update(logits[part], labels[part], samples[part])
        sampled.append(kept.sorted())
    (one, one_labels), (other, _) = sampled
    assert one.shape == (MOST_LOGITS // width, width)
    assert torch.equal(one, other)
    assert torch.equal(one, logits[one_labels])  # labels are sample ids here
    assert (one_labels.diff() <= 5).all()  # evenly spread


@pytest.mark.parametrize(
    ("classes", "hidden", "calibrator"),
    [
        (("a", "b"), (), Calibrator("temperature", 60, temperature=2.5)),
        (("a", "b", "c"), (8,), Calibrator("temperature", 60, temperature=0.4)),
        (("a", "b", "c"), (), Calibrator("platt", 60, scale=[0.5, 2.0, 1.0], offset=[1.0, -1.0, 0.0])),
    ],
)
def test_exports_have_the_calibrated_probabilities(
    classes: tuple[str, ...], hidden: tuple[int, ...], calibrator: Calibrator, tmp_path: Path
) -> None:
    task = "multilabel" if calibrator.method == "platt" else "classification"
    plain = model_of("timm/test_resnet", 64, classes=classes, hidden=hidden, task=task)  # type: ignore[arg-type]
    network = ProbabilityNetwork(plain.net, calibrator)
    model = TrainedModel(plain.net, network, plain.description, calibrator)
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    predictor = Predictor(plain.net, "squash", calibrator=calibrator)
    assert np.abs(model.probabilities(pixels) - predictor.probabilities(pixels).numpy()).max() < 1e-6
    assert np.abs(model.probabilities(pixels) - plain.probabilities(pixels)).max() > 0.01
    require_all_formats_equal(model, tmp_path)


def fit_on(folder: Path, val: dict[str, bytes]) -> Path:
    """The run_dir of a fit that tells blue from red, with these validation images."""
    train = write_files(folder / "train", picture_files(["blue", "red"], 40))
    changes: dict[str, Any] = {"data__train": train, "data__val": write_files(folder / "val", val)}
    changes |= {"model__lr": 0.005, "model__milestones": "[0,0]", "checkpoint__every_n_steps": 1}
    result = run_here("fit", *options(TINY, run_dir=folder / "run", **changes))
    assert result.returncode == 0, result.output
    return folder / "run"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose validation images have some wrong labels, so that its confidence is too high."""
    wrong = {f"red/9{n}.jpg": picture(COLOURS["blue"], 9000 + n) for n in range(8)}
    val = {**picture_files(["blue", "red"], 30, seed=900), **wrong}
    return fit_on(tmp_path_factory.mktemp("calibrated"), val)


@pytest.fixture(scope="module")
def right_run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose validation predictions are all right, so that no temperature helps."""
    return fit_on(tmp_path_factory.mktemp("right"), picture_files(["blue", "red"], 30, seed=900))


def saved_by(run_dir: Path, which: str) -> dict[str, Any]:
    return checkpoint.load(checkpoint.resolve(f"{run_dir}/checkpoints/{which}"))


def test_a_checkpoint_holds_the_calibration_of_its_own_weights(run_dir: Path) -> None:
    uri = checkpoint.resolve(f"{run_dir}/checkpoints/best")
    calibrator = load(uri).calibrator
    assert calibrator is not None
    assert checkpoint.load(uri)[CALIBRATOR_KEY] == msgspec.to_builtins(calibrator)
    assert load(uri, calibrated="false").calibrator is None
    report = json.loads((run_dir / "report.json").read_text())
    assert report["evaluation"]["calibrator"]["temperature"] == calibrator.temperature
    assert len(report["evaluation"]["calibrator"]["selective"]) == 3
    assert "second diagram" in (run_dir / "report.html").read_text()
    assert report["metrics"]["val/ece_calibrated"] < report["metrics"]["val/ece"]
    with pytest.raises(ConfigError, match="both given"):
        load(uri, reject_below=0.5, target_precision=0.9)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        load(uri, reject_below=math.nan)


def test_weights_that_have_trained_on_have_no_calibration(run_dir: Path, tmp_path: Path) -> None:
    """Checkpoints within an epoch are of other weights than the last validation."""
    whole = yaml.safe_load((run_dir / "config.yaml").read_text())["data"]
    changes: dict[str, Any] = {"data__train": whole["train"], "data__val": whole["val"], "model__milestones": "[0,0]"}
    more = {"checkpoint__every_n_steps": 2, "checkpoint__keep_last": 30, "model__lr": 0.005}
    result = run_here("fit", *options(TINY, run_dir=tmp_path / "run", **changes, **more))
    assert result.returncode == 0, result.output
    run = str(tmp_path / "run")
    within, after = [], []
    for manifest in checkpoint.manifests(run):
        saved = checkpoint.load(f"{run}/checkpoints/{manifest.file}")
        (after if manifest.metrics else within).append(CALIBRATOR_KEY in saved)
    assert len(within) > 2
    assert not any(within)
    assert any(after)


def test_a_checkpoint_without_a_calibration_predicts_as_it_did(run_dir: Path, tmp_path: Path) -> None:
    uri = checkpoint.resolve(str(run_dir))
    saved = checkpoint.load(uri)
    old, hostile = tmp_path / "old.ckpt", tmp_path / "hostile.ckpt"
    torch.save({name: value for name, value in saved.items() if name != CALIBRATOR_KEY}, old)
    torch.save({**saved, CALIBRATOR_KEY: {**saved[CALIBRATOR_KEY], "temperature": math.nan}}, hostile)
    image = picture(COLOURS["red"], 5)
    plain = load(uri, calibrated="false").predict(image)
    assert load(str(old)).predict(image) == plain == load(str(hostile), calibrated="false").predict(image)
    with pytest.raises(CheckpointError, match="damaged"):
        load(str(hostile))
    with pytest.raises(CheckpointError, match="has no calibration"):
        load(str(old), calibrated="true")
    with pytest.raises(ConfigError, match="--reject_below"):
        load(str(old), target_precision=0.9)
    with pytest.raises(ConfigError, match="Leave --calibrated=false out"):
        load(uri, calibrated="false", target_precision=0.9)


def test_thresholds_for_a_precision_where_no_temperature_helps(right_run_dir: Path, tmp_path: Path) -> None:
    report = json.loads((right_run_dir / "report.json").read_text())
    fit = report["evaluation"]["calibrator"]
    assert (fit["method"], fit["temperature"]) == (None, None)
    assert "are right" in fit["reason"]
    assert [point["coverage"] for point in fit["selective"]] == [1.0] * 3
    page = (right_run_dir / "report.html").read_text()
    assert "Predictions are not calibrated: all validation predictions are right" in page
    assert page.count("of the predictions are accepted at a precision of") == 3
    uri = checkpoint.resolve(f"{right_run_dir}/checkpoints/best")
    predictor = load(uri, target_precision=0.95)
    assert not predictor.calibrated
    assert predictor.reject_below == pytest.approx(fit["selective"][1]["threshold"])
    assert load(uri, calibrated="false", target_precision=0.95).reject_below == predictor.reject_below
    output = tmp_path / "predictions.jsonl"
    result = run_here(
        "predict", right_run_dir, right_run_dir.parent / "val", "--output", output, "--target_precision=0.95"
    )
    assert result.returncode == 0, result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    # A batch of other size may be rounded otherwise, which concerns the image of the threshold itself.
    assert sum(row["rejected"] for row in rows) <= 1
    assert {row["calibrated"] for row in rows} == {False}
    with pytest.raises(CheckpointError, match="has no calibration"):
        load(uri, calibrated="true")
    validated = run_here("validate", right_run_dir)
    assert validated.returncode == 0, validated.output
    assert "ece_calibrated" not in validated.output


def test_few_validation_images_give_no_threshold(tmp_path: Path) -> None:
    few = fit_on(tmp_path, picture_files(["blue", "red"], 10, seed=900))
    refused = run_here("predict", few, tmp_path / "val", "--output", tmp_path / "no.jsonl", "--target_precision=0.95")
    assert refused.returncode == 2, refused.output
    assert "its validation images were too few" in refused.output


def test_only_a_fit_keeps_logits(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(*args: object) -> None:
        raise AssertionError("logits were kept")

    monkeypatch.setattr(LogitSample, "update", update)
    result = run_here("validate", run_dir)
    assert result.returncode == 0, result.output
    metrics = json.loads((run_dir / "validate.json").read_text())["metrics"]
    assert metrics["val/ece_calibrated"] < metrics["val/ece"]


def head_of(folder: Path) -> tuple[str, Array]:
    """The kind of calibration of an export of plain weights, and the weights of the head's last layer."""
    model = json.loads((folder / "export.json").read_text())["model"]
    tensors = load_file(folder / "head.safetensors")
    return model["calibration"], tensors[sorted(name for name in tensors if name.endswith("weight"))[-1]]


def test_export_and_serve_without_the_calibration(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("auto", "false"):
        arguments = (run_dir, tmp_path / value, "--format=weights", f"--calibrated={value}")
        result = run_here("export", *arguments)
        assert result.returncode == 0, result.output
    (kind, calibrated), (none, plain) = head_of(tmp_path / "auto"), head_of(tmp_path / "false")
    calibrator = load(str(run_dir)).calibrator
    assert calibrator is not None
    assert (kind, none) == ("temperature", "none")
    np.testing.assert_allclose(calibrated * calibrator.temperature, plain, rtol=1e-5)

    models = []
    monkeypatch.setattr("job.serve.server.serve", lambda load_model, settings: models.append(load_model()))
    for value in ("auto", "false"):
        result = run_here("serve", run_dir, "--device=cpu", f"--calibrated={value}")
        assert result.returncode == 0, result.output
    assert [model.calibrated for model in models] == [True, False]
    image = picture(COLOURS["red"], 5)
    assert models[1].predict(image) == load(str(run_dir), "cpu", precision="auto", calibrated="false").predict(image)


def test_export_and_serve_require_a_calibration(right_run_dir: Path, tmp_path: Path) -> None:
    for verb, *arguments in (("export", tmp_path / "export", "--format=weights"), ("serve", "--port=0")):
        result = run_here(verb, right_run_dir, *arguments, "--calibrated=true")
        assert result.returncode == 2, result.output
        assert "has no calibration; the report of its run says why" in result.output
    assert not (tmp_path / "export").exists()
