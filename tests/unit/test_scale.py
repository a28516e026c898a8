"""1,000 classes in 1,000 shards, indexed and trained on within seconds; ``benchmarks/scale.py`` has the full size."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import REPOSITORY, TINY, options, run_here

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import generated_shards
from generated_shards import Counts

from job import storage
from job.check.data import scan
from job.data.datamodule import ImageDataModule
from job.data.index.file import load_index_info
from job.data.index.index import Index

CLASSES = 1_000
SHARDS = 1_000


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The filesystem of shards is known, and counts its requests in this folder."""
    generated_shards.register()
    monkeypatch.setitem(generated_shards.fsspec.config.conf, "shards", {"counts": str(tmp_path / "counts")})
    return tmp_path / "counts"


def test_generated_shards_are_tar_files_of_images(counts: Path) -> None:
    uri = "shards://train/7-classes/50-images/4-shards"
    entries = storage.list_files(uri)
    assert [entry.key for entry in entries] == [f"{number:04d}.tar" for number in range(4)]
    whole = storage.read_bytes(f"{uri}/0001.tar")
    assert len(whole) == entries[1].size
    reader = storage.Reader(f"{uri}/0001.tar")
    for start in (0, 511, 1536, 100_000, len(whole) - 5000):
        assert reader.read("", start, 4000) == whole[start : start + 4000]
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        members = {member.name: archive.extractfile(member) for member in archive}
    assert len(members) == 26  # images 12 to 24 and their labels
    for name, file in members.items():
        assert file is not None
        if name.endswith(".jpg"):
            image = Image.open(file)
            image.load()
            assert image.size == generated_shards.PIXELS
        else:
            assert 0 <= int(file.read()) < 7
    total = Counts.total(counts)
    assert total["reads"] == 6
    assert total["bytes"] == len(whole) + 5 * 4000


def test_a_step_of_a_thousand_classes_from_a_thousand_shards(counts: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    data = {
        "data.train": f"shards://train/{CLASSES}-classes/2000-images/{SHARDS}-shards/{{0000..{SHARDS - 1:04d}}}.tar",
        "data.val": f"shards://val/{CLASSES}-classes/1000-images/10-shards",
        "data.cache_gb": 0,
    }
    limits = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 1, "trainer.limit_val_batches": 2}
    result = run_here("fit", *options(TINY, **data, **limits), f"--run_dir={run_dir}")
    assert result.returncode == 0, result.output
    (folder,) = (run_dir / "index").iterdir()
    info, train = load_index_info(folder), Index(folder, "train")
    assert len(info.classes) == CLASSES
    assert len({source.uri for source in train.sources}) == SHARDS + 10 + 1  # and the folder of the last ten
    assert np.array_equal(train.class_counts(), np.full(CLASSES, 2))
    (manifest,) = (run_dir / "checkpoints").glob("*.ckpt.json")
    assert manifest.stat().st_size <= 2048
    report = json.loads((run_dir / "report.json").read_text())
    assert report["status"] == "finished"
    assert Counts.total(counts)["lookups"] >= SHARDS


def test_a_check_of_many_large_shards_reports_what_it_has_found(
    counts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing that would take minutes ends with a part of the first shards, not without an answer."""
    monkeypatch.setitem(generated_shards.fsspec.config.conf, "shards", {"latency": 0.02, "counts": str(counts)})
    images = ImageDataModule(
        train=f"shards://train/10-classes/1281167-images/{SHARDS}-shards/{{0000..{SHARDS - 1:04d}}}.tar",
        val="shards://val/10-classes/2000-images/4-shards",
        cache_dir=str(tmp_path / "cache"),
    )
    (finding,) = scan(images, str(tmp_path / "run"), tmp_path / "index", seconds=3.0)
    assert finding.status == "warn"
    assert "the listing was ended after 3 s, and had found 10 classes" in finding.message
    assert 64 <= len(images.parts["train"]) < 1_281_167
    assert len(images.parts["val"]) >= 64
