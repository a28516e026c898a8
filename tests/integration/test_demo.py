"""The README's first command, and the tutorial's experiment on its own archive."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from support import REPOSITORY, options, run_well

from job import storage
from job.demo.gcs_server import create_bucket
from job.demo.weights import efficientnet_lite0

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's bucket, as a folder, after the demo."""
    folder = tmp_path_factory.mktemp("demo")
    result = run_well("demo", "--folder", folder)
    assert "job predict gs://demo/runs/digits " in result.stdout
    return folder / "buckets" / "demo"


@pytest.mark.xdist_group("demo")
def test_the_demo_learns_by_transfer(demo: Path) -> None:
    """At least 95 % after the demo's epochs."""
    report = json.loads((demo / "runs" / "digits" / "report.json").read_text())
    assert report["world_size"] == 2
    assert report["metrics"]["val/accuracy"] >= 0.95


@pytest.mark.xdist_group("demo")
def test_the_demo_without_pretrained_weights_is_far_less_accurate(demo: Path, tmp_path: Path) -> None:
    """After the first epoch, in which the backbone is frozen."""
    report = json.loads((demo / "runs" / "digits" / "report.json").read_text())
    first = report["history"][0]
    assert first["epoch"] == 1
    transfer = first["metrics"]["val/accuracy"]
    settings = {
        "data.root": demo / "digits",
        "run_dir": tmp_path / "scratch",
        "model.weights": "none",
        "trainer.max_epochs": 1,
    }
    run_well("fit", "--config", REPOSITORY / "job/recipes/demo.yaml", *options(settings), processes=2)
    scratch = json.loads((tmp_path / "scratch" / "report.json").read_text())["metrics"]["val/accuracy"]
    print(f"validation accuracy: transfer {transfer:.4f}, from scratch {scratch:.4f}")
    assert scratch < transfer - 0.3


def archive() -> Path | None:
    """The tutorial's archive: ``$JOB_TEST_CATS_AND_DOGS``, or ``shared/data`` beside the checkout."""
    beside = REPOSITORY.parent / "shared" / "data" / "cats_and_dogs_filtered.zip"
    path = Path(os.environ.get("JOB_TEST_CATS_AND_DOGS", beside))
    return path if path.exists() else None


@pytest.mark.dataset
@pytest.mark.skipif(archive() is None, reason="needs cats_and_dogs_filtered.zip: $JOB_TEST_CATS_AND_DOGS")
def test_the_tutorials_experiment(gcs: str, tmp_path: Path) -> None:
    """Its archive in a bucket, frozen EfficientNet-Lite0, 2 processes: at least 97 %."""
    root = "gs://cats-and-dogs"
    create_bucket(root)
    path = archive()
    assert path is not None
    storage.upload(path, f"{root}/cats_and_dogs_filtered.zip")
    storage.write_bytes(f"{root}/weights.safetensors", efficientnet_lite0())
    settings = {
        "data.root": f"{root}/cats_and_dogs_filtered.zip",
        "data.cache_dir": tmp_path / "cache",
        "model.weights": f"{root}/weights.safetensors",
        "run_dir": f"{root}/run",
    }
    run_well("fit", "--config", REPOSITORY / "job/recipes/demo_photos.yaml", *options(settings), processes=2)
    report = json.loads(storage.read_bytes(f"{root}/run/report.json"))
    print(report["metrics"], report["seconds"])
    assert report["images"] == {"train": 2000, "val": 1000}
    assert report["classes"] == ["cats", "dogs"]
    assert report["metrics"]["val/accuracy"] >= 0.97

    sample = tmp_path / "sample"
    with zipfile.ZipFile(path) as photos:
        for name in ("cats", "dogs"):
            (sample / name).mkdir(parents=True)
            inside = f"cats_and_dogs_filtered/validation/{name}/"
            for photo in sorted(n for n in photos.namelist() if n.startswith(inside) and n.endswith(".jpg"))[:25]:
                (sample / name / Path(photo).name).write_bytes(photos.read(photo))
    run_well("predict", "--ckpt", f"{root}/run", "--input", sample, "--output", tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    right = torch.tensor([line["label"] == Path(line["uri"]).parent.name for line in lines])
    assert len(right) == 50
    assert right.float().mean() >= 0.94
    assert {line["label"] for line in lines} == {"cats", "dogs"}
