"""Predictions of images that have labels: accuracy, confusion matrix, and the metrics of ``validate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix
from support import COLOURS, TINY, fit_here, options, picture, picture_files, run_here, write_files

CLASSES = ["blue", "green", "red"]
SAME = ("accuracy", "f1", "auroc", "ece", "loss", "accuracy_of/blue", "accuracy_of/green", "accuracy_of/red")


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pictures, five of which lie in the folder of another colour."""
    wrong = {f"green/9{n}.jpg": picture(COLOURS["red"], 9000 + n) for n in range(5)}
    return write_files(tmp_path_factory.mktemp("data") / "val", {**picture_files(CLASSES, 15, seed=5000), **wrong})


@pytest.fixture(scope="module")
def run_dir(val: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train = write_files(folder / "train", picture_files(CLASSES, 60))
    changes: dict[str, Any] = {"model__lr": 0.005, "model__milestones": "[0,0]", "data__train": train, "data__val": val}
    result = run_here("fit", *options(TINY, run_dir=folder / "run", **changes))
    assert result.returncode == 0, result.output
    result = run_here("validate", folder / "run")
    assert result.returncode == 0, result.output
    return folder / "run"


def validated(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "validate.json").read_text())
    return content


@pytest.mark.parametrize("output", ["p.jsonl", "p.parquet", "parquet", "jsonl"])
def test_the_metrics_are_those_of_validate(output: str, run_dir: Path, val: Path, tmp_path: Path) -> None:
    target = tmp_path / output
    form = ["--format", output] if "." not in output else []
    plain = ("--precision", "fp32", "--calibrated", "false")
    result = run_here("predict", run_dir, val, "--output", target, *plain, *form)
    assert result.returncode == 0, result.output
    file = target / "evaluation.json" if "." not in output else tmp_path / "p.evaluation.json"
    evaluation, expected = json.loads(file.read_text()), validated(run_dir)
    assert evaluation["images"] == 50
    for name in SAME:
        assert evaluation["metrics"][name] == pytest.approx(expected["metrics"][f"val/{name}"], abs=1e-6), name
    assert 0.4 < evaluation["metrics"]["accuracy"] < 1
    assert evaluation["confusion_matrix"] == expected["confusion_matrix"]
    assert f"{evaluation['metrics']['accuracy']:.4f}" in result.output
    assert len(evaluation["worst_errors"]) == min(12, 50 - round(50 * evaluation["metrics"]["accuracy"]))
    assert all(each["uri"].startswith(f"{val}/{each['labels'][0]}/") for each in evaluation["worst_errors"])


def test_rows_hold_the_true_label_and_scikit_learn_agrees(run_dir: Path, val: Path, tmp_path: Path) -> None:
    plain = ("--precision", "fp32", "--calibrated", "false")
    result = run_here("predict", run_dir, val, "--output", tmp_path / "p.parquet", *plain)
    assert result.returncode == 0, result.output
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert all(row["true_label"] == Path(row["uri"]).parent.name for row in rows)
    assert {(row["true_labels"] is None, row["calibrated"]) for row in rows} == {(True, False)}
    true, predicted = ([row[name] for row in rows] for name in ("true_label", "label"))
    evaluation = json.loads((tmp_path / "p.evaluation.json").read_text())
    assert evaluation["confusion_matrix"]["counts"] == confusion_matrix(true, predicted, labels=CLASSES).tolist()
    assert evaluation["metrics"]["accuracy"] == pytest.approx(accuracy_score(true, predicted))


def test_calibrated_probabilities_are_those_that_validate_measures_and_few_of_them_are_rejected(
    run_dir: Path, val: Path, tmp_path: Path
) -> None:
    plain, calibrated = tmp_path / "plain.jsonl", tmp_path / "calibrated.jsonl"
    whole = ("predict", run_dir, val, "--precision", "fp32", "--output")
    for options_ in ((plain, "--calibrated=false"), (calibrated, "--reject_below=0.9")):
        result = run_here(*whole, *options_)
        assert result.returncode == 0, result.output
    before, after = ([json.loads(line) for line in each.read_text().splitlines()] for each in (plain, calibrated))
    assert [row["label"] for row in before] == [row["label"] for row in after]
    assert [row["probability"] for row in before] != [row["probability"] for row in after]
    assert {(row["calibrated"], "rejected" in row) for row in before} == {(False, False)}
    assert {row["calibrated"] for row in after} == {True}
    assert all(row["rejected"] == (row["probability"] < 0.9) for row in after)
    measured = json.loads((tmp_path / "calibrated.evaluation.json").read_text())["metrics"]
    expected = validated(run_dir)["metrics"]
    assert measured["ece"] == pytest.approx(expected["val/ece_calibrated"], abs=1e-6)
    accepted = [row for row in after if not row["rejected"]]
    assert measured["coverage"] == pytest.approx(len(accepted) / 50)
    assert f"{50 - len(accepted)} of 50 predictions are rejected" in result.output
    fit = json.loads((run_dir / "report.json").read_text())["evaluation"]["calibrator"]
    assert (fit["method"], fit["reason"], fit["samples"]) == ("temperature", "", 50)
    assert fit["after"]["error"] < fit["error_before"]
    result = run_here(*whole, tmp_path / "parts", "--target_precision=1")
    assert result.returncode == 0, result.output
    summary = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert summary["metrics"]["selective_accuracy"] == 1
    assert 0 < summary["metrics"]["coverage"] == 1 - summary["rejected"] / 50 < 1
    changed = run_here(*whole, tmp_path / "parts", "--calibrated=false")
    assert changed.returncode == 2, changed.output
    assert "calibrated was true, is None" in changed.output
    refused = run_here(*whole, tmp_path / "no.jsonl", "--target_precision=1.5")
    assert refused.returncode == 2, refused.output
    assert "--target_precision" in refused.output


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_parts_with_few_probabilities_give_what_follows_from_them(
    form: str, run_dir: Path, val: Path, tmp_path: Path
) -> None:
    target = tmp_path / "parts"
    plain = ("--precision", "fp32", "--calibrated", "false")
    command = ("predict", run_dir, val, "--output", target, *plain, "--top_k", 1, "--format", form)
    result = run_here(*command)
    assert result.returncode == 0, result.output
    evaluation, expected = json.loads((target / "evaluation.json").read_text()), validated(run_dir)
    assert evaluation["metrics"].keys() == {name for name in SAME if name not in ("auroc", "loss")}
    for name, value in evaluation["metrics"].items():
        assert value == pytest.approx(expected["metrics"][f"val/{name}"], abs=1e-6), name
    assert evaluation["confusion_matrix"] == expected["confusion_matrix"]
    summary = json.loads((target / "summary.json").read_text())
    assert summary["metrics"] == evaluation["metrics"]
    assert (summary["precision"], summary["calibrated"]) == ("fp32", False)


def test_unknown_classes_unlabelled_and_unreadable_images_are_said_and_do_not_count(
    run_dir: Path, val: Path, tmp_path: Path
) -> None:
    files = {f"val/{path.relative_to(val)}": path.read_bytes() for path in val.glob("*/*.jpg")}
    extra = picture(COLOURS["red"], 1)
    files |= {"val/purple/a.jpg": extra, "val/purple/b.jpg": extra, "val/x.jpg": extra, "val/red/broken.jpg": b""}
    data = write_files(tmp_path / "data", files)
    result = run_here(
        *("predict", run_dir, data, "--output", tmp_path / "p.jsonl", "--precision", "fp32", "--max_bad_samples", 1)
    )
    assert result.returncode == 0, result.output
    assert "1 image(s) without a label do not count" in result.output
    assert "2 image(s) of 1 class(es) that the network does not know do not count: purple (2)" in result.output
    evaluation = json.loads((tmp_path / "p.evaluation.json").read_text())
    assert evaluation["metrics"]["accuracy"] == pytest.approx(validated(run_dir)["metrics"]["val/accuracy"])
    assert (evaluation["images"], evaluation["unlabelled"]) == (50, 1)
    assert evaluation["images_of_unknown_classes"] == {"purple": 2}
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert sorted(row["true_label"] for row in rows if "true_label" in row) == sorted(
        [*CLASSES * 15, *["green"] * 5, "purple", "purple", "red"]
    )


def test_labels_of_a_table_and_none(run_dir: Path, val: Path, tmp_path: Path) -> None:
    lines = [f"{path},{path.parent.name}" for path in sorted(val.glob("*/*.jpg"))]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["image,kind", *lines, f"{val}/red/000.jpg,"]))
    command = ("predict", run_dir, table, "--output", tmp_path / "p.jsonl", "--precision", "fp32")
    result = run_here(*command, "--columns", "label=kind")
    assert result.returncode == 0, result.output
    evaluation = json.loads((tmp_path / "p.evaluation.json").read_text())
    assert evaluation["metrics"]["accuracy"] == pytest.approx(validated(run_dir)["metrics"]["val/accuracy"])
    assert evaluation["unlabelled"] == 1
    (tmp_path / "p.evaluation.json").unlink()
    result = run_here(*command, "--columns", "label=kind", "--labels", "none")
    assert result.returncode == 0, result.output
    assert "true_label" not in (tmp_path / "p.jsonl").read_text()
    assert not (tmp_path / "p.evaluation.json").exists()


def test_folders_of_other_names_are_no_labels(run_dir: Path, val: Path, tmp_path: Path) -> None:
    data = write_files(tmp_path / "data", {f"{n}/{n}.jpg": picture(COLOURS["red"], n) for n in range(3)})
    result = run_here("predict", run_dir, data, "--output", tmp_path / "p.jsonl")
    assert result.returncode == 0, result.output
    assert "do not count" not in result.output
    assert not (tmp_path / "p.evaluation.json").exists()


def test_several_labels_per_image_for_a_network_that_predicts_one(run_dir: Path, val: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"uri": f"{val}/red/00{n}.jpg", "label": ["red", "blue"][:n]}) for n in range(3)]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    result = run_here("predict", run_dir, tmp_path / "table.jsonl", "--output", tmp_path / "p.jsonl")
    assert result.returncode == 0, result.output
    assert "the network predicts one: no accuracy" in result.output
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["true_labels"] for row in rows] == [[], ["red"], ["blue", "red"]]


def test_precision_belongs_to_the_folder(run_dir: Path, val: Path, tmp_path: Path) -> None:
    target = tmp_path / "parts"
    for precision in ("bf16", "auto"):
        result = run_here("predict", run_dir, val, "--output", target, "--precision", precision, "--batch_size", 9)
        assert result.returncode == 0, result.output
        next(target.glob("part-00003-*")).unlink()
    refused = run_here("predict", run_dir, val, "--output", target, "--precision", "fp32")
    assert refused.returncode == 2
    assert "holds other predictions: precision was bf16, is fp32" in refused.output


def test_bf16_differs_from_fp32_by_rounding_alone(run_dir: Path, val: Path, tmp_path: Path) -> None:
    probabilities = {}
    for precision in ("bf16", "fp32"):
        target = tmp_path / f"{precision}.parquet"
        result = run_here("predict", run_dir, val, "--output", target, "--precision", precision)
        assert result.returncode == 0, result.output
        assert f"precision {precision}" in result.output
        probabilities[precision] = pa.concat_arrays(pq.read_table(target)["probabilities"].chunks).flatten().to_numpy()
    difference = abs(probabilities["bf16"] - probabilities["fp32"]).max()
    assert 0 < difference < 0.02


def test_two_classes_share_a_logit(tmp_path: Path) -> None:
    run_dir = fit_here(tmp_path, trainer__max_epochs=1)
    result = run_here("validate", run_dir)
    assert result.returncode == 0, result.output
    index = tmp_path / "images"
    for path in (tmp_path / "colours").glob("*/*.jpg"):
        write_files(index, {str(path.relative_to(tmp_path / "colours")): path.read_bytes()})
    result = run_here("predict", run_dir, index, "--output", tmp_path / "p.jsonl", "--precision", "fp32")
    assert result.returncode == 0, result.output
    evaluation = json.loads((tmp_path / "p.evaluation.json").read_text())
    assert sum(map(sum, evaluation["confusion_matrix"]["counts"])) == 20
