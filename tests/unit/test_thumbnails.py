"""Thumbnails: recognisable, bounded in bytes, and never a reason to fail."""

from __future__ import annotations

import io
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import COLOURS, fit_here, picture, picture_files, write_files

from job.data.datamodule import ImageDataModule
from job.errors import StorageOutage
from job.monitoring.drawing import thumbnails
from job.monitoring.drawing.thumbnails import Thumbnails
from job.monitoring.report.files import read_report


def data_of(folder: Path, **options: Any) -> ImageDataModule:
    data = ImageDataModule(root=str(folder), cache_dir=str(folder.parent / "cache"), **options)
    data.setup("fit")
    return data


@pytest.fixture
def data(tmp_path: Path) -> ImageDataModule:
    """Two classes; the last validation sample is no image."""
    files = {
        f"{part}/{key}": content
        for part in ("train", "val")
        for key, content in picture_files(["blue", "red"], 3).items()
    }
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    files |= {"val/blue/noise.png": buffer.getvalue(), "val/red/zzz.jpg": b"no image"}
    return data_of(write_files(tmp_path / "data", files))


def opened(content: bytes | None) -> Image.Image:
    assert content is not None
    return Image.open(io.BytesIO(content))


def test_shows_the_image_of_the_sample(data: ImageDataModule) -> None:
    made = Thumbnails(data, "val")
    for sample, label in enumerate(data.parts["val"].labels[:-1].tolist()):
        if "noise" in data.parts["val"].keys[sample]:
            continue
        image = opened(made.jpeg(sample))
        assert (image.format, image.size) == ("JPEG", (160, 160))
        colour = np.asarray(image).mean((0, 1))
        expected = COLOURS[data.classes[label]]
        assert np.abs(colour - expected).max() < 25


def test_a_thumbnail_of_pure_noise_stays_within_8_kb(data: ImageDataModule) -> None:
    (sample,) = (number for number, key in enumerate(data.parts["val"].keys) if "noise" in key)
    content = Thumbnails(data, "val").jpeg(sample)
    assert content is not None
    assert 1000 < len(content) <= 8192


def test_what_cannot_be_read_has_none(data: ImageDataModule) -> None:
    made = Thumbnails(data, "val")
    size = len(data.parts["val"])
    assert made.jpegs([size - 1, size, -1]) == {size - 1: None, size: None, -1: None}
    assert made.jpeg(0) is not None


def test_the_limit_on_pixels_holds_here_too(tmp_path: Path) -> None:
    small = picture((9, 9, 9), 0, (50, 40), "PNG")
    files = {f"{part}/{name}/1.png": small for part in ("train", "val") for name in "ab"}
    data = data_of(write_files(tmp_path / "data", files), max_image_pixels=1999)
    assert Thumbnails(data, "val").jpeg(0) is None


def test_keeps_the_last_ones_and_no_more(data: ImageDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "MOST_KEPT", 2)
    made = Thumbnails(data, "val")
    first = made.jpegs([0, 1, 2])
    fetched: list[int] = []
    start = made._fetcher.start
    monkeypatch.setattr(made._fetcher, "start", lambda samples: fetched.extend(samples.tolist()) or start(samples))
    assert made.jpegs([2, 1, 0]) == first
    assert fetched == [0]


def test_an_outage_costs_one_wait_and_no_error(data: ImageDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "FETCH_SECONDS", 0.1)
    made, waits = Thumbnails(data, "val"), []

    class Never(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            waits.append(timeout)
            return super().result(timeout)

    monkeypatch.setattr(made._fetcher, "start", lambda samples: Never())
    assert [made.jpeg(0), made.jpeg(1), made.jpeg(2)] == [None] * 3
    assert waits == [0.1]
    monkeypatch.undo()
    made._paused_until = 0.0
    assert made.jpeg(0) is not None


def test_an_error_of_the_bucket_is_no_error_here(data: ImageDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Thumbnails(data, "val")
    failed: Future[Any] = Future()
    failed.set_exception(StorageOutage("503"))
    monkeypatch.setattr(made._fetcher, "start", lambda samples: failed)
    assert made.jpeg(0) is None


def test_a_fit_fetches_each_image_once_for_tensorboard_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    original = Thumbnails._fetched
    monkeypatch.setattr(
        Thumbnails, "_fetched", lambda self, samples: fetched.extend(samples) or original(self, samples)
    )
    run_dir = fit_here(tmp_path, trainer__max_epochs=1, data__cache_dir=tmp_path / "cache")
    report = read_report(str(run_dir))
    assert report.evaluation is not None
    worst = {each.sample for each in report.evaluation.worst_errors}
    assert worst
    assert (run_dir / "report.html").read_text().count("data:image/jpeg") == len(worst)
    assert worst <= set(fetched)
    assert len(fetched) == len(set(fetched))
