"""What depends on the number of classes or of checkpoints: bytes of files and of memory, and files that are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from support import TINY, options, picture_files, run_here, write_files
from test_checkpoint import save, state

from job import checkpoint, storage
from job.checkpoint import manifest_reader
from job.checkpoint.manifest import Manifest, encode_manifest, kept_metrics
from job.checkpoint.retention import Retention
from job.checkpoint.settings import CheckpointSettings
from job.checkpoint.state import MANIFEST_KEY
from job.model.metrics import EvaluationMetrics, TaskMetrics
from job.model.multilabel_metrics import MultilabelMetrics
from job.model.scores import BINS, BinnedScores, bins_of

MEBIBYTE = 1 << 20
MANIFEST_BYTES = 2000


def state_bytes(metrics: TaskMetrics) -> int:
    """Size of what metrics hold between two batches."""
    total = 0
    for metric in metrics._metrics:
        for name in metric._defaults:
            value = getattr(metric, name)
            for tensor in value if isinstance(value, list) else [value]:
                total += tensor.untyped_storage().nbytes()
    return total


@pytest.mark.parametrize("classes", [1000, 10_000, 21_000])
def test_memory_of_metrics_does_not_grow_with_samples_times_classes(classes: int) -> None:
    metrics = EvaluationMetrics([f"c{n}" for n in range(classes)], samples=50_000, synchronise=False)
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(64, classes, generator=generator).softmax(dim=1)
    labels = torch.randint(0, classes, (64,), generator=generator)
    for _ in range(30):
        metrics.counts.update(probabilities, labels, labels.roll(1))
        metrics.scores.update(probabilities, labels)
    assert state_bytes(metrics) < 66 * MEBIBYTE
    evaluation = metrics.compute()
    assert evaluation.confusion.nbytes <= 24 * 64
    assert evaluation.confusion[:, 2].sum() == 30 * 64


def test_cells_of_the_confusion_matrix_are_merged_while_samples_come() -> None:
    metrics = EvaluationMetrics("abc", synchronise=False)
    labels = torch.tensor([0, 1, 2, 2]).repeat(1000)
    for _ in range(50):
        metrics.counts.update(torch.rand(4000, 3), labels, labels.roll(1))
    assert sum(len(part) for part in metrics.counts.cells) < 40_000
    cells, _ = metrics.counts.compute()
    assert cells.tolist() == [[0, 2, 50_000], [1, 0, 50_000], [2, 1, 50_000], [2, 2, 50_000]]


@pytest.mark.parametrize(("classes", "factor"), [(1000, 1), (4096, 1), (4097, 2), (21_000, 8), (10**6, 16)])
def test_bins_are_fewer_where_there_are_many_classes(classes: int, factor: int) -> None:
    assert bins_of(classes) == BINS // factor


@pytest.mark.parametrize("classes", [120, 5000])
def test_the_error_bound_of_binned_scores_holds(classes: int) -> None:
    """Half of the samples have rounded scores, so that many are in the same bin, but not equal."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (400,), generator=generator)
    logits = torch.randn(400, classes, generator=generator) * 0.3
    logits[torch.arange(400), labels] += 0.3
    logits[:200] = logits[:200].mul(4).round().div(4) + 1e-4 * torch.rand(200, classes, generator=generator)
    probabilities = logits.softmax(dim=1)
    scores = BinnedScores(classes, sync_on_compute=False)
    scores.update(probabilities, labels)
    for number, ranking in zip(range(3), scores.rankings(), strict=False):
        own, chances = labels.numpy() == number, probabilities[:, number].numpy()
        error = abs(ranking.auroc() - roc_auc_score(own, chances))
        assert error <= ranking.auroc_error() + 1e-9
        precision_error = abs(ranking.average_precision() - average_precision_score(own, chances))
        assert precision_error <= ranking.average_precision_error() + 1e-9
        assert 0 < ranking.auroc_error() < 0.5


@pytest.mark.parametrize(
    ("classes", "samples", "is_exact"), [(100, 50_000, True), (101, 50, False), (2, 50_001, False)]
)
def test_metrics_say_whether_they_are_exact(classes: int, samples: int, *, is_exact: bool) -> None:
    names = [f"c{n}" for n in range(classes)]
    labels = torch.arange(50) % classes
    for metrics, metric, truth in (
        (EvaluationMetrics(names, samples=samples, synchronise=False), "auroc", labels),
        (
            MultilabelMetrics(names, samples=samples, synchronise=False),
            "mAP",
            torch.nn.functional.one_hot(labels, classes).to(torch.uint8),
        ),
    ):
        probabilities = torch.rand(50, classes, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
        metrics.update(torch.rand(50), probabilities, truth, torch.ones(50).bool(), torch.arange(50))
        assert set(metrics.compute().errors) == (set() if is_exact else {metric})


@pytest.mark.parametrize("name", ["accuracy_of", "average_precision_of"])
@pytest.mark.parametrize(("classes", "length"), [(50, 200), (1000, 20), (5, 9)])
def test_manifests_are_small_whatever_the_classes(name: str, classes: int, length: int) -> None:
    per_class = {f"val/{name}/{number:0{length}}": 1 / (number + 3) for number in range(classes)}
    whole = {f"val/{metric}": 1 / 3 for metric in ("loss", "accuracy", "top5_accuracy", "f1", "auroc", "ece")}
    monitor = list(per_class)[2]
    kept = kept_metrics({**whole, **per_class}, monitor)
    assert set(whole) | {monitor} <= set(kept)
    assert (set(kept) == set(whole) | set(per_class)) == (classes == 5)
    file = "epoch=001-step=00000004.ckpt"
    manifest = Manifest(file, 10**11, "0" * 64, 1, 0, 4, monitor, "max", kept, validation="50,000 samples, " + "0" * 64)
    assert len(encode_manifest(manifest)) < MANIFEST_BYTES


def test_a_run_of_1000_classes_has_small_files(tmp_path: Path) -> None:
    (content,) = picture_files(["blue"], 1).values()
    lines, files = ["uri,label,split"], {}
    for number in range(1000):
        for part in ("train", "val"):
            name = f"{part}-{number:04d}.png"
            files[name] = content
            lines.append(f"{tmp_path}/pictures/{name},class-{number:04d},{part}")
    write_files(tmp_path / "pictures", files)
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    changes: dict[str, Any] = {"data__global_batch_size": 500, "trainer__max_epochs": 2, "checkpoint__keep_last": 2}
    result = run_here("fit", *options(TINY, data__root=tmp_path / "m.csv", run_dir=tmp_path / "run", **changes))
    assert result.returncode == 0, result.output
    assert len(result.output) < 20_000
    manifests = list((tmp_path / "run" / "checkpoints").glob("*.ckpt.json"))
    assert len(manifests) == 2
    for path in manifests:
        assert path.stat().st_size < MANIFEST_BYTES
        assert Path(str(path).removesuffix(".json") + ".confusion.safetensors").stat().st_size < 24 * 1000 + 200
    assert (tmp_path / "run" / "report.json").stat().st_size < 500_000
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["evaluation"]["metric_errors"] == {"auroc": 0.5}  # all images are equal
    assert "from histograms, exact to ±" in (tmp_path / "run" / "report.html").read_text()


def run_of(folder: Path, checkpoints: int) -> str:
    """A run with this many checkpoints, of which the manifests alone have content."""
    path = folder / "run" / "checkpoints"
    path.mkdir(parents=True)
    for number in range(checkpoints):
        file = f"epoch={number:03d}-step={number:08d}.ckpt"
        (path / file).touch()
        metrics: dict[str, float | None] = {"val/accuracy": number / checkpoints}
        manifest = Manifest(file, 0, "0" * 64, number, 0, number, "val/accuracy", "max", metrics)
        (path / f"{file}.json").write_bytes(encode_manifest(manifest))
    return str(folder / "run")


class Reads:
    """Counts the files that are read, and listings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.listings = 0
        read_bytes, list_files = storage.read_bytes, storage.list_files

        def read(uri: str) -> bytes:
            self.names.append(storage.basename(uri))
            return read_bytes(uri)

        def listed(uri: str) -> list[storage.Entry]:
            self.listings += 1
            return list_files(uri)

        monkeypatch.setattr(storage, "read_bytes", read)
        monkeypatch.setattr(storage, "list_files", listed)


def test_a_commit_reads_no_manifest_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = run_of(tmp_path, 1000)
    retention = Retention(CheckpointSettings(keep_every_n_epochs=1), run_dir)
    reads = Reads(monkeypatch)
    retention.remove_superseded()
    assert len(reads.names) == 1000
    reads.names, reads.listings = [], 0
    new = state(1000, 0.5, epoch=1000)
    new[MANIFEST_KEY] |= {"batch": 0}
    save(run_dir, new)
    retention.remove_superseded()
    assert reads.names == ["epoch=1000-step=00001000.ckpt.json"]
    assert reads.listings == 2  # for the names that are in use, and of retention
    assert len(checkpoint.manifests(run_dir)) == 1001
    assert checkpoint.resolve(run_dir).endswith("step=00000999.ckpt")


def test_a_manifest_that_changes_or_goes_is_noticed(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, 3)
    assert [each.global_step for each in checkpoint.manifests(run_dir)] == [0, 1, 2]
    folder = Path(run_dir) / "checkpoints"
    path = folder / "epoch=001-step=00000001.ckpt.json"
    path.write_bytes(path.read_bytes().replace(b"0.3333333333333333", b"0.99"))
    assert checkpoint.resolve(run_dir).endswith("step=00000001.ckpt")
    path.write_text("{}")
    assert [each.global_step for each in checkpoint.manifests(run_dir)] == [0, 2]
    (folder / "epoch=002-step=00000002.ckpt").unlink()
    assert [each.global_step for each in checkpoint.manifests(run_dir)] == [0]
    path.unlink()
    assert checkpoint.scan(run_dir).damaged != []


def test_a_manifest_without_a_version_is_read_each_time(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, 1)
    folder = storage.join(run_dir, checkpoint.FOLDER)
    (entry,) = (entry for entry in storage.list_files(folder) if entry.key.endswith(".json"))
    reader = manifest_reader.ManifestReader()
    (first,) = reader.read(folder, [entry._replace(version=0)])
    path = Path(folder) / entry.key
    path.write_bytes(path.read_bytes().replace(b'"epoch": 0', b'"epoch": 7'))
    (second,) = reader.read(folder, [entry._replace(version=0)])
    assert isinstance(first, Manifest)
    assert isinstance(second, Manifest)
    assert (first.epoch, second.epoch) == (0, 7)


def test_retention_removes_what_is_superseded_and_nothing_else(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, 50)
    Retention(CheckpointSettings(keep_last=2, keep_best=1, keep_every_n_epochs=10), run_dir).remove_superseded()
    kept = [each.epoch for each in checkpoint.manifests(run_dir)]
    assert kept == [0, 10, 20, 30, 40, 48, 49]
