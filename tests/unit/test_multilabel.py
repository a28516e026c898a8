"""Multi-label data, and the multi-label task."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, multilabel_confusion_matrix
from support import index_parts, tar_of, write_files

from job.checkpoint import confusion
from job.data.index.build import build, split
from job.data.index.file import SCHEMA, SEVERAL_LABELS_SCHEMA, load_index_info, verify_parts
from job.data.index.index import Index
from job.errors import CheckpointError, DataError
from job.model.config import ModelConfig
from job.model.evaluation import Evaluation
from job.model.metrics import EvaluationMetrics
from job.model.multilabel import MultilabelTask, positive_weights
from job.model.multilabel_metrics import MultilabelMetrics
from job.model.scores import BinnedScores, CollectedScores
from job.model.spec import decode_spec

LISTS: list[list[str]] = [["red"], ["red", "blue"], [], ["green", "blue", "red"], ["blue"], ["red"], ["green"], ["red"]]


def table(folder: Path, labels: list[Any], name: str = "data.jsonl", **more: list[Any]) -> Path:
    """Write a table of JSON lines with these labels; its images do not exist."""
    columns = {"uri": [f"{number:04d}.jpg" for number in range(len(labels))], "label": labels, **more}
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    write_files(folder, {name: "".join(json.dumps(line) + "\n" for line in lines).encode()})
    return folder / name


def index_of(folder: Path, labels: list[Any]) -> Index:
    return index_parts(table(folder, labels))["train"]


def test_an_index_holds_several_labels_only_where_the_data_does(tmp_path: Path) -> None:
    index = index_of(tmp_path / "several", [*LISTS, "green"])
    assert index.has_several_labels
    assert index.classes == ("blue", "green", "red")
    samples, labels = index.label_lists()
    assert samples.tolist() == [0, 1, 1, 3, 3, 3, 4, 5, 6, 7, 8]
    assert labels.tolist() == [2, 0, 2, 0, 1, 2, 0, 2, 1, 2, 1]
    assert index.multi_hot_of(np.array([3, 2, 1, 1])).tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 1], [1, 0, 1]]
    assert index.class_counts().tolist() == [3, 3, 5]
    assert index.rarest_labels().tolist() == [2, 0, -1, 0, 0, 2, 1, 2, 1]
    assert set(index.labels.tolist()) == {-1}
    verify_parts(Path(index.folder), load_index_info(index.folder), "")

    one = index_of(tmp_path / "one", [["red"], "blue", ["red"]])
    assert not one.has_several_labels
    assert one.labels.tolist() == [1, 0, 1]
    assert one.class_counts().tolist() == [1, 2]
    assert "several_labels" not in (Path(one.folder) / "index.json").read_text()
    assert pa.ipc.open_file(str(Path(one.folder) / "train.arrow")).schema == SCHEMA


@pytest.mark.parametrize("labels", [[[], ["a"], ["a", "b"]], [["a"], ["b"], ["a"]], ["a", "b", "a"], [[], [], []]])
def test_labels_of_images_to_predict_are_not_used(labels: list[Any], tmp_path: Path) -> None:
    build({"all": [str(table(tmp_path, labels))]}, tmp_path, str(tmp_path / "cache"), "images")
    index = Index(tmp_path, "all")
    assert (len(index), index.classes, index.has_several_labels) == (3, (), False)
    assert index.labels.tolist() == [-1, -1, -1]


def test_one_label_that_an_image_has_or_not_is_enough(tmp_path: Path) -> None:
    index = index_of(tmp_path, [["defect"], [], [], ["defect"]])
    assert index.multi_hot_of(np.arange(4)).tolist() == [[1], [0], [0], [1]]


def test_a_saved_index_keeps_the_labels(tmp_path: Path) -> None:
    data = table(tmp_path / "data", LISTS)
    first = index_parts(data)["train"]
    saved = tmp_path / "saved"
    saved.mkdir()
    build({"root": [str(data)]}, saved, "", "parts")
    reloaded = index_parts(saved / "index.json")["train"]
    assert [each.tolist() for each in reloaded.label_lists()] == [each.tolist() for each in first.label_lists()]
    assert reloaded.fingerprint() == first.fingerprint()
    changed = index_of(tmp_path / "changed", [["red", "green"], *LISTS[1:]])
    assert changed.fingerprint() != first.fingerprint()


def test_an_image_named_twice_and_mixed_sources_agree(tmp_path: Path) -> None:
    several, one = table(tmp_path / "several", [["red", "red", "blue"], []]), table(tmp_path / "one", ["blue", "red"])
    (tmp_path / "index").mkdir()
    build({"train": [str(one), str(several)]}, tmp_path / "index", "", "classes")
    index = Index(tmp_path / "index", "train")
    assert index.multi_hot_of(np.arange(4)).tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[3]], "labels: 3 to 3"),
        ([[-1]], "labels: -1 to -1"),
        ([[1, 0]], "rising order"),
        ([[1, 1]], "rising order"),
        ([[None]], "a value is missing"),
        ([None], "a value is missing"),
    ],
)
def test_damaged_labels_are_refused(labels: list[Any], message: str, tmp_path: Path) -> None:
    index = index_of(tmp_path, LISTS[:2])
    columns = {name: [value] for name, value in zip(SCHEMA.names, ["a.jpg", 0, -1, -1, 0, -1], strict=True)}
    path = Path(index.folder) / "train.arrow"
    rows = pa.table({**columns, "labels": labels}, schema=SEVERAL_LABELS_SCHEMA)
    with pa.ipc.new_file(str(path), rows.schema) as writer:
        writer.write_table(rows)
    info = load_index_info(index.folder)
    part = msgspec.structs.replace(
        info.parts["train"], rows=1, bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    with pytest.raises(DataError, match=message):
        verify_parts(Path(index.folder), msgspec.structs.replace(info, parts={"train": part}), "")


@pytest.mark.parametrize("file_format", ["parquet", "tar"])
def test_lists_of_labels_in_other_formats(file_format: str, tmp_path: Path) -> None:
    if file_format == "parquet":
        rows = pa.table({"uri": [f"{n}.jpg" for n in range(len(LISTS))], "label": LISTS})
        pq.write_table(rows, tmp_path / "data.parquet")
    else:
        labels = {f"{n}.json": json.dumps({"labels": each}).encode() for n, each in enumerate(LISTS)}
        files = {**labels, **{f"{n}.jpg": b"x" for n in range(len(LISTS))}}
        (tmp_path / "data.tar").write_bytes(tar_of(dict(sorted(files.items()))))
    index = index_parts(tmp_path / f"data.{file_format}")["train"]
    expected = [[int(name in labels) for name in ("blue", "green", "red")] for labels in LISTS]
    assert index.multi_hot_of(np.arange(len(LISTS))).tolist() == expected


def test_a_null_in_place_of_a_list_is_no_empty_list(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["0.jpg", "1.jpg"], "label": [["red", "blue"], None]}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"row 1 \(from 0\) has no label"):
        index_parts(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["red"], None], "has no label"),
        ([["red", ""], ["blue"]], "holds an empty one"),
        ([["red", None], ["blue"]], "holds an empty one"),
        ([[["red"]], ["blue"]], "row 0"),
        ([["a" * 2000], ["b"]], "2,000 characters"),
        ([[], []], "no image of .* has a label"),
    ],
)
def test_lists_of_labels_that_mean_nothing_are_refused(labels: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        index_of(tmp_path, labels)


def test_each_label_is_in_both_parts_of_a_split(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    chances = [0.5, 0.2, 0.05, 0.01]
    labels = [[f"c{c}" for c, chance in enumerate(chances) if random.random() < chance] for _ in range(1000)]
    folder = tmp_path / "index"
    folder.mkdir()
    build({"root": [str(table(tmp_path, [*labels, ["alone", "c0"]]))]}, folder, "", "parts")
    whole = Index(folder, "train")
    counts, keys = whole.class_counts(), list(whole.keys)
    split(folder, 0.2, seed=1)
    train, val = Index(folder, "train"), Index(folder, "val")
    assert sorted([*train.keys, *val.keys]) == sorted(keys)
    alone = whole.classes.index("alone")
    assert (train.class_counts()[alone], val.class_counts()[alone]) == (1, 0)
    for label in range(1, 5):
        assert val.class_counts()[label] == pytest.approx(0.2 * counts[label], rel=0.1, abs=1)
    without = 1001 - len(np.unique(whole.label_lists()[0]))
    assert len(val) - len(np.unique(val.label_lists()[0])) == round(0.2 * without)


def test_the_split_follows_from_the_keys(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    parts = []
    for uris in ([f"{n}.jpg" for n in range(60)], [f"{n}.jpg" for n in reversed(range(60))]):
        labels = [["even", "all"] if int(uri.split(".")[0]) % 2 == 0 else ["all"] for uri in uris]
        folder.mkdir(exist_ok=True)
        build({"root": [str(table(tmp_path, labels, uri=uris))]}, folder, "", "parts", force_listing=True)
        split(folder, 0.2, seed=3)
        parts.append(sorted(Index(folder, "val").keys))
    assert parts[0] == parts[1]


def batch(labels: torch.Tensor, images: torch.Tensor | None = None) -> dict[str, Any]:
    """A batch of multi-hot labels, or of single ones."""
    of = {"labels": labels} if labels.ndim == 2 else {"label": labels}
    more = {} if images is None else {"image": images}
    return {**of, "mask": torch.ones(len(labels), dtype=torch.bool), "sample": torch.arange(len(labels)), **more}


def task(index: Index | None = None, classes: int = 3, **options: Any) -> MultilabelTask:
    def train_index() -> Index:
        assert index is not None
        return index

    return MultilabelTask(ModelConfig(task="multilabel", **options), classes, train_index)


def test_the_loss_is_torchs_mean_over_the_classes() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.randint(0, 2, (5, 3), dtype=torch.uint8)
    expected = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(dim=1)
    assert torch.equal(task().training_losses(batch(labels), lambda _: logits), expected)  # type: ignore[arg-type]
    assert torch.equal(task().evaluate(batch(labels), logits)["losses"], expected)  # type: ignore[arg-type]
    smoothed = labels.float() * 0.9 + 0.05
    expected = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").mean(dim=1)
    losses = task(label_smoothing=0.1).training_losses(batch(labels), lambda _: logits)  # type: ignore[arg-type]
    assert torch.allclose(losses, expected)
    single = torch.tensor([0, 2, 1, 1, 0])
    expected = task().training_losses(batch(F.one_hot(single, 3)), lambda _: logits)  # type: ignore[arg-type]
    assert torch.equal(task().training_losses(batch(single), lambda _: logits), expected)  # type: ignore[arg-type]


def test_mixed_images_have_mixed_labels() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.uint8)
    images = torch.stack([torch.full((3, 4, 4), 100, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)])
    shares: list[torch.Tensor] = []

    def forward(mixed: Any) -> torch.Tensor:
        shares.append(mixed["image"][:, 0, 0, 0] / 100)
        return torch.zeros(2, 3)

    losses = task(mixup=1.0).training_losses(batch(labels, images), forward)  # type: ignore[arg-type]
    share = shares[0]
    assert 0 < float(share[0]) < 1
    expected = F.binary_cross_entropy_with_logits(
        torch.zeros(2, 3), share[:, None] * torch.tensor([1.0, 1.0, 0.0]), reduction="none"
    )
    assert torch.allclose(losses, expected.mean(dim=1))


def test_balanced_weights_are_bounded_positive_weights(tmp_path: Path) -> None:
    index = index_of(tmp_path, [["rare", "common"], *[["common"]] * 299, [], ["half"], *[["half", "common"]] * 149])
    weights = positive_weights(index, 3)
    assert index.classes == ("common", "half", "rare")
    assert weights.tolist() == pytest.approx([0.01, 301 / 150, 100.0])
    logits, labels = torch.randn(4, 3), torch.randint(0, 2, (4, 3), dtype=torch.uint8)
    expected = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none", pos_weight=weights)
    losses = task(index, class_weights="balanced").training_losses(batch(labels), lambda _: logits)  # type: ignore[arg-type]
    assert torch.equal(losses, expected.mean(dim=1))


def scored(samples: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities with ties, and labels; the last class has no positive sample."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(samples, classes, generator=generator) < 0.3).to(torch.uint8)
    labels[:, -1] = 0
    logits = torch.randn(samples, classes, generator=generator) + 1.5 * labels
    return (logits * 8).round().div(8).sigmoid(), labels


@pytest.mark.parametrize("samples", [200, 60_000])
def test_metrics_agree_with_scikit_learn(samples: int) -> None:
    probabilities, labels = scored(200, 4)
    losses, mask = torch.rand(200), torch.rand(200) > 0.2
    metrics = MultilabelMetrics("abcd", samples=samples)
    for part in torch.arange(200).chunk(4):
        metrics.update(losses[part], probabilities[part], labels[part], mask[part], part)
    evaluation = metrics.compute()
    values, confusion = evaluation.metrics, evaluation.confusion
    scores, true = probabilities[mask].numpy(), labels[mask].numpy()
    precisions = [average_precision_score(true[:, c], scores[:, c]) for c in range(3)]
    assert values["mAP"] == pytest.approx(np.mean(precisions), abs=2e-3)
    assert values["average_precision_of/b"] == pytest.approx(precisions[1], abs=2e-3)
    assert "average_precision_of/d" not in values
    predicted = scores >= 0.5
    assert values["micro_f1"] == pytest.approx(f1_score(true, predicted, average="micro"))
    assert values["macro_f1"] == pytest.approx(f1_score(true[:, :3], predicted[:, :3], average="macro"))
    assert values["loss"] == pytest.approx(losses[mask].mean().item())
    assert confusion.tolist() == multilabel_confusion_matrix(true, predicted).tolist()

    metrics.choose_thresholds()
    chosen = metrics.compute().metrics
    assert metrics.thresholds[3] == 0.5
    for c, threshold in enumerate(metrics.thresholds[:3]):
        best = max(f1_score(true[:, c], scores[:, c] >= score) for score in np.unique(scores[:, c]))
        assert f1_score(true[:, c], scores[:, c] >= threshold) == pytest.approx(best)
    assert chosen["macro_f1"] > values["macro_f1"]
    metrics.reset()
    metrics.update(losses, probabilities, labels, torch.zeros(200, dtype=torch.bool), torch.arange(200))
    assert metrics.compute().metrics == {}


def test_binned_scores_are_within_their_bound() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(20_000, 3, generator=generator) < 0.1).to(torch.uint8)
    probabilities = (torch.randn(20_000, 3, generator=generator) * 2 + 2 * labels).sigmoid()
    exact, binned = CollectedScores(3, sync_on_compute=False), BinnedScores(3, sync_on_compute=False)
    for metric in (exact, binned):
        metric.update(probabilities, labels)
    for one, other in zip(exact.rankings(), binned.rankings(), strict=True):
        size = other.positives + other.negatives
        bound = float((other.positives * size / size.cumsum()).sum() / other.positives.sum())
        assert abs(one.average_precision() - other.average_precision()) <= bound
        assert bound < 0.02
        assert abs(one.average_precision() - other.average_precision()) < 1e-3
        assert len(other.positives) < 2048


def test_metrics_do_not_depend_on_the_order_of_samples() -> None:
    probabilities, labels = scored(300, 3)
    results = []
    for order in (torch.arange(300), torch.randperm(300)):
        metrics = MultilabelMetrics("abc")
        for part in order.chunk(7):
            mask = torch.ones_like(part).bool()
            metrics.update(torch.ones(len(part)), probabilities[part], labels[part], mask, part)
        metrics.choose_thresholds()
        results.append((metrics.compute().metrics, metrics.thresholds))
    assert results[0] == results[1]


def test_no_positive_sample_leaves_metrics_out() -> None:
    metrics = MultilabelMetrics("ab")
    labels, mask = torch.zeros(3, 2, dtype=torch.uint8), torch.ones(3).bool()
    metrics.update(torch.ones(3), torch.full((3, 2), 0.1), labels, mask, torch.arange(3))
    metrics.choose_thresholds()
    assert set(metrics.compute().metrics) == {"loss", "ece"}
    assert metrics.thresholds == [0.5, 0.5]


def test_many_classes_have_no_per_class_metrics() -> None:
    probabilities, labels = scored(50, 120)
    metrics = MultilabelMetrics([f"c{n}" for n in range(120)])
    metrics.update(torch.ones(50), probabilities, labels, torch.ones(50).bool(), torch.arange(50))
    evaluation = metrics.compute()
    values, confusion = evaluation.metrics, evaluation.confusion
    assert set(values) == {"loss", "mAP", "micro_f1", "macro_f1", "ece"}
    assert confusion.shape == (120, 2, 2)
    assert set(values) < set(MultilabelMetrics("ab").names)


def test_macro_f1_of_one_label_is_that_of_the_classes_with_samples() -> None:
    metrics = EvaluationMetrics("abc")
    labels = torch.tensor([0, 0, 1, 1])
    probabilities = F.one_hot(torch.tensor([0, 2, 1, 1]), 3).float()
    metrics.update(torch.ones(4), probabilities, labels, torch.ones(4).bool(), torch.arange(4))
    assert metrics.compute().metrics["f1"] == pytest.approx((2 / 3 + 1) / 2)


DESCRIPTION: dict[str, Any] = {
    "format": 2,
    "backbone": "resnet18",
    "classes": ["a", "b"],
    "hidden": [],
    "image_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "task": "multilabel",
}


@pytest.mark.parametrize("thresholds", [[0.5], [0.5, 0.5, 0.5], [0.5, 1.5], [0.5, math.nan], ["x", 0.5], 0.5, None])
def test_thresholds_are_checked(thresholds: Any) -> None:
    decode_spec({**DESCRIPTION, "thresholds": [0.25, 1.0]}, "it")
    with pytest.raises(CheckpointError, match="invalid description"):
        decode_spec({**DESCRIPTION, "thresholds": thresholds}, "it")


def test_only_a_multilabel_network_has_thresholds() -> None:
    with pytest.raises(CheckpointError, match="one per class of a multilabel network"):
        decode_spec({**DESCRIPTION, "task": "classification", "thresholds": [0.5, 0.5]}, "it")
    assert decode_spec(DESCRIPTION, "it").thresholds == []
    old = {name: value for name, value in DESCRIPTION.items() if name not in ("task", "format")}
    assert decode_spec(old, "it").task == "classification"


def test_a_damaged_confusion_file_is_refused(tmp_path: Path) -> None:
    counts = np.array([[[5, 1], [2, 3]], [[0, 0], [1, 10]]])
    content = confusion.encode(counts)
    path = tmp_path / "counts"
    path.write_bytes(content)
    restored = confusion.read(str(path), confusion.describe(content, 2))
    assert restored.tolist() == counts.tolist()
    assert confusion.as_json(restored, 2) == {
        "true_negatives": [5, 0],
        "false_positives": [1, 0],
        "false_negatives": [2, 1],
        "true_positives": [3, 10],
    }
    assert confusion.as_json(np.zeros((20_000, 2, 2), np.int64), 20_000, "uri") == {"file": "uri", "classes": 20_000}
    for wrong, classes in ((counts, 3), (-counts, 2)):
        content = confusion.encode(wrong)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="counts"):
            confusion.read(str(path), confusion.describe(content, classes))


def multilabel_evaluation(rank: int, world_size: int, samples: int) -> Evaluation:
    """Result of a rank that evaluates its share of each batch of 20."""
    probabilities, labels = scored(300, 4)
    losses = F.binary_cross_entropy(probabilities, labels.float(), reduction="none").mean(dim=1)
    mask = torch.rand(300, generator=torch.Generator().manual_seed(1)) > 0.1
    metrics = MultilabelMetrics("abcd", samples=samples, synchronise=world_size > 1)
    for part in torch.arange(300).split(20):
        share = part[rank::world_size]
        metrics.update(losses[share], probabilities[share], labels[share], mask[share], share)
    metrics.choose_thresholds()
    return metrics.compute()


@pytest.mark.parametrize("samples", [300, 60_000])
def test_selected_samples_and_calibration_of_several_labels(samples: int) -> None:
    evaluation = multilabel_evaluation(0, 1, samples)
    probabilities, labels = scored(300, 4)
    losses = F.binary_cross_entropy(probabilities, labels.float(), reduction="none").mean(dim=1)
    mask = torch.rand(300, generator=torch.Generator().manual_seed(1)) > 0.1
    counted = mask.nonzero()[:, 0]
    order = counted[losses[counted].argsort(descending=True, stable=True)].tolist()
    worst = [each.sample for each in evaluation.worst]
    assert worst == [sample for sample in order[:64] if sample in worst]
    assert len(worst) > 32
    metrics = MultilabelMetrics("abcd", samples=samples, synchronise=False)
    metrics.update(losses, probabilities, labels, mask, torch.arange(300))
    metrics.choose_thresholds()
    predicted = probabilities >= torch.tensor(metrics.thresholds)
    for each in (*evaluation.worst, *evaluation.examples):
        assert set(each.labels) == set(labels[each.sample].nonzero()[:, 0].tolist())
        assert set(each.predicted) == set(predicted[each.sample].nonzero()[:, 0].tolist())
        assert (set(each.labels) != set(each.predicted)) == (each in evaluation.worst) or each.sample not in order[:64]
    confidence = torch.maximum(probabilities, 1 - probabilities)[mask].double().flatten().numpy()
    correct = ((probabilities >= 0.5) == (labels > 0))[mask].flatten().numpy()
    bins = np.minimum((confidence * 15).astype(int), 14)
    inside = [bins == number for number in range(15) if (bins == number).any()]
    ece = sum(abs(confidence[rows].mean() - correct[rows].mean()) * rows.mean() for rows in inside)
    assert evaluation.metrics["ece"] == pytest.approx(ece, abs=1e-6)


def one_of_two(rank: int, folder: str, samples: int) -> None:
    torch.set_num_threads(1)  # the process is forked
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    evaluation = multilabel_evaluation(rank, 2, samples)
    Path(folder, str(rank)).write_bytes(pickle.dumps(evaluation))
    dist.destroy_process_group()


@pytest.mark.parametrize("samples", [300, 60_000])
def test_two_ranks_evaluate_several_labels_as_one(samples: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one_of_two, args=(rank, str(tmp_path), samples)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    one = multilabel_evaluation(0, 1, samples)
    for rank in range(2):
        other: Evaluation = pickle.loads((tmp_path / str(rank)).read_bytes())  # noqa: S301
        assert other.metrics == pytest.approx(one.metrics)
        assert (other.worst, other.examples) == (one.worst, one.examples)
        assert other.confusion.tolist() == one.confusion.tolist()
        assert one.scores is not None
        assert other.scores is not None
        assert other.scores.positives.tolist() == one.scores.positives.tolist()
