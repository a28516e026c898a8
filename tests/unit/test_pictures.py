"""Pictures in TensorBoard, read back by its own readers."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from support import COLOURS, cells_of, fit_here, picture_files, write_files
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.pr_curve.pr_curves_plugin import PrCurvesPlugin
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
from torchvision.transforms import v2

from job.data.datamodule import ImageDataModule
from job.data.dataset import Batch
from job.model.evaluation import Calibration, Evaluation, SamplePrediction, ScoreHistograms
from job.monitoring.drawing import canvas, charts, curves
from job.monitoring.drawing.canvas import GREEN, RED
from job.monitoring.drawing.class_labels import class_labels
from job.monitoring.drawing.image_grid import FRAME, GAP, TITLE, join_labels, prediction_caption
from job.monitoring.drawing.thumbnails import SIZE, ValidationThumbnails
from job.monitoring.settings import MonitoringSettings
from job.monitoring.tensorboard import pictures
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.monitoring.tensorboard.pictures import Pictures, first_images

CONTEXT = RequestContext()


class Reader:
    """What TensorBoard's plugins find in a folder of event files."""

    def __init__(self, folder: Path) -> None:
        multiplexer = EventMultiplexer(tensor_size_guidance={"images": 10, "pr_curves": 10})
        multiplexer.AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        self.provider = MultiplexerDataProvider(multiplexer, str(folder))
        plugins: dict[str, Any] = {}
        self.context = TBContext(
            data_provider=self.provider, multiplexer=multiplexer, logdir=str(folder), plugin_name_to_instance=plugins
        )
        plugins["scalars"] = ScalarsPlugin(self.context)

    def images(self) -> dict[str, list[tuple[int, Image.Image, int]]]:
        """(step, image, bytes) by tag."""
        found: dict[str, list[tuple[int, Image.Image, int]]] = {}
        read = self.provider.read_blob_sequences(CONTEXT, experiment_id="", plugin_name="images", downsample=100)
        for tag, points in read.get(".", {}).items():
            for point in points:
                content = self.provider.read_blob(CONTEXT, blob_key=point.values[2].blob_key)
                found.setdefault(tag, []).append((point.step, Image.open(io.BytesIO(content)), len(content)))
        return found

    def pr_curves(self) -> dict[str, dict[str, Any]]:
        """The last PR curve by tag, as the plugin answers the browser."""
        plugin = PrCurvesPlugin(self.context)
        tags = plugin.tags_impl(CONTEXT, "").get(".", {})
        return {tag: plugin.pr_curves_impl(CONTEXT, "", ["."], tag)["."][-1] for tag in tags}


def evaluation_of(classes: int, *, seed: int = 0, bins: int = 200) -> Evaluation:
    """An evaluation in which most predictions are right."""
    random = np.random.default_rng(seed)
    cells = random.poisson(0.2, (classes, classes)) + np.diag(random.poisson(40, classes))
    counts = random.integers(0, 100, 15)
    positives, negatives = (
        np.stack([np.histogram(random.normal(mean, 2, 100), bins, (-9, 9))[0] for _ in range(classes)])
        for mean in (2, -2)
    )
    lowest = 1 / (1 + np.exp(-np.linspace(-9, 9, bins, endpoint=False)))
    scores = ScoreHistograms(positives, negatives, lowest)
    right = SamplePrediction(0, (0,), (0,), 0.9, 0.1)
    wrong = SamplePrediction(1, (0,), (1,), 0.55, 3.0)
    return Evaluation(
        {},
        cells_of(cells),
        Calibration(counts, counts * (np.arange(15) + 0.5) / 15, (counts * np.arange(15) / 15).astype(np.int64)),
        scores if classes <= 60 else scores.pooled(),
        worst=(wrong,),
        examples=(right, wrong),
    )


def twice(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same images as training and validation part."""
    return {f"{part}/{key}": content for part in ("train", "val") for key, content in files.items()}


class Run:
    """The parts of a trainer and its data that the callback reads."""

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str] | None = None,
        images: int = 16,
        files: dict[str, bytes] | None = None,
    ) -> None:
        files = files or picture_files(["blue", "red"], 4)
        root = write_files(folder / "data", {f"{part}/{key}": files[key] for part in ("train", "val") for key in files})
        self.data = ImageDataModule(root=str(root), cache_dir=str(folder / "cache"), image_size=32, global_batch_size=8)
        self.data.setup("fit")
        if classes is not None:
            self.data = cast("ImageDataModule", Renamed(self.data, classes))
        self.folder = folder / "run" / "tensorboard"
        self.logger = BucketTensorBoardLogger(str(self.folder))
        self.callback = Pictures(MonitoringSettings(images=images), self.logger, ValidationThumbnails())
        self.module = SimpleNamespace(evaluation=None)
        self.trainer = SimpleNamespace(is_global_zero=True, global_step=0, datamodule=self.data)

    def call(self, hook: str, *args: Any) -> None:
        getattr(self.callback, hook)(self.trainer, self.module, *args)

    def validate(self, evaluation: Evaluation, step: int) -> None:
        self.module.evaluation, self.trainer.global_step = evaluation, step
        self.call("on_validation_end")

    def settle(self) -> None:
        """Wait for what is being drawn."""
        if self.callback._thread is not None:
            self.callback._thread.join()

    def end(self) -> Reader:
        self.call("on_fit_end")
        self.logger.finalize("success")
        return Reader(self.folder)


class Renamed:
    """Data with other names of classes."""

    def __init__(self, data: ImageDataModule, classes: Sequence[str]) -> None:
        self._data, self.classes = data, tuple(classes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


def frame(image: Image.Image, place: int) -> npt.NDArray[np.float64]:
    """Mean colour of the left side of a tile's frame."""
    left = GAP + place * (SIZE + 2 * FRAME + GAP)
    return np.asarray(image.convert("RGB"))[TITLE + 30 : TITLE + 130, left + 1 : left + 3].mean((0, 1))


def inside(image: Image.Image, place: int) -> npt.NDArray[np.float64]:
    """Mean colour of a tile's image."""
    left = GAP + FRAME + place * (SIZE + 2 * FRAME + GAP)
    rows = slice(TITLE + FRAME + 20, TITLE + FRAME + SIZE - 20)
    return np.asarray(image.convert("RGB"))[rows, left + 20 : left + SIZE - 20].mean((0, 1))


def steps(found: dict[str, list[tuple[int, Image.Image, int]]], tag: str) -> list[int]:
    return [step for step, _, _ in found.get(tag, [])]


KINDS = ("val/confusion_matrix", "val/reliability_diagram", "val/roc_curves", "val/examples", "val/worst_errors")


@pytest.mark.parametrize("features", ["never", "always"])
def test_a_fit_shows_its_first_batch_and_its_last_evaluation(tmp_path: Path, features: str) -> None:
    run_dir = fit_here(tmp_path, trainer__max_epochs=1, features__use=features)
    reader = Reader(run_dir / "tensorboard")
    found = reader.images()
    ((step, image, _),) = found["train/augmented_batch"]
    assert (step, image.format) == (0, "JPEG")
    colours = {tuple((inside(image, place) > 120).tolist()) for place in range(3)}
    assert colours <= {(False, False, True), (True, False, False)}, "pictures are blue or red"
    assert steps(found, "val/confusion_matrix") == [1]  # that of the scalars: a run that resumes at step 2 keeps it
    layout = CustomScalarsPlugin(reader.context).layout_impl(CONTEXT, "")
    assert json.loads(layout)["category"][0]["chart"][0]["title"] == "loss"


def test_every_kind_of_picture_is_read_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.validate(evaluation_of(2), 10)
    found = run.end().images()
    assert {tag: steps(found, tag) for tag in found} == {kind: [9] for kind in KINDS}
    assert {image.format for points in found.values() for _, image, _ in points} == {"JPEG", "PNG"}


def test_frames_are_green_for_a_right_prediction_and_red_for_a_wrong_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.validate(evaluation_of(2), 10)
    found = run.end().images()
    ((_, image, _),) = found["val/examples"]
    assert np.abs(frame(image, 0) - GREEN).max() < 25
    assert np.abs(frame(image, 1) - RED).max() < 25
    assert np.abs(inside(image, 0) - COLOURS["blue"]).max() < 30
    ((_, image, _),) = found["val/worst_errors"]
    assert np.abs(frame(image, 0) - RED).max() < 25


def test_several_labels_are_right_if_all_are(tmp_path: Path) -> None:
    names = ["cat", "dog", "fox"]
    cells = np.array([[[5, 1], [2, 3]]] * 3)
    predictions = (SamplePrediction(0, (0, 2), (2, 0), 0.8, 0.1), SamplePrediction(1, (), (1,), 0.6, 2.0))
    run = Run(tmp_path, names)
    run.validate(Evaluation({}, cells, examples=predictions), 10)
    found = run.end().images()
    assert set(found) == {"val/confusion_matrix", "val/examples"}
    ((_, image, _),) = found["val/examples"]
    assert np.abs(frame(image, 0) - GREEN).max() < 25
    assert np.abs(frame(image, 1) - RED).max() < 25


def test_captions_name_classes_and_are_short() -> None:
    assert prediction_caption(["cat"], ["dog"], 0.934) == ("93% dog", "true: cat")
    assert prediction_caption([], ["a", "b", "c", "d", "e"], 0.5) == ("50% a, b, c + 2", "true: none")
    assert join_labels(["\x1b[31mred\nnext", "x" * 1000]) == "\\x1b[31mred\\x0anext, " + "x" * 39 + "…" + "x" * 20


def test_labels_of_hostile_names_are_short_safe_and_differ() -> None:
    names = ["<script>alert(1)</script>", "a\u202eb\x00\n", "y" * 10**6, "y" * 10**6 + "z", "y" * 59 + "…", "猫", "é"]
    labels = class_labels(names)
    assert len(set(labels)) == len(names)
    assert all(len(label) <= 61 and label.isprintable() for label in labels)
    assert labels[0] == names[0]  # TensorBoard escapes it; TensorBoard's tags may be anything


def test_names_that_the_font_lacks_are_drawn_by_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "FONT", "no such font")
    canvas.font_of.cache_clear()
    canvas._drawable.cache_clear()
    try:
        assert canvas.drawable("Café 猫 <b>") == "Cafe ? <b>"
    finally:
        monkeypatch.undo()
        canvas.font_of.cache_clear()
        canvas._drawable.cache_clear()


@pytest.mark.parametrize("classes", [50, 1000])
def test_many_classes_and_64_images_of_noise_stay_within_2_mb(tmp_path: Path, classes: int) -> None:
    random = np.random.default_rng(0)
    files = {}
    for number in range(64):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (160, 160, 3), np.uint8)).save(buffer, "PNG")
        files[f"{'ab'[number % 2]}/{number}.png"] = buffer.getvalue()
    run = Run(tmp_path, [f"class {number} of many, with a long name " * 3 for number in range(classes)], 64, files)
    examples = tuple(SamplePrediction(n, (n % 50,), ((n + 1) % 50,), 0.5, 1.0) for n in range(64))
    run.validate(dataclasses.replace(evaluation_of(classes), examples=examples, worst=examples), 10)
    found = run.end().images()
    assert set(found) == set(KINDS)
    for tag, ((_, image, size),) in found.items():
        assert size <= (pictures.GRID_BYTES if image.format == "JPEG" else charts.MOST_BYTES), tag
    assert sum(path.stat().st_size for path in run.folder.iterdir()) < 1_200_000


def test_a_large_confusion_matrix_shows_the_classes_that_are_confused() -> None:
    cells = np.eye(60, dtype=np.int64) * 10
    cells[58, 59] = 5
    drawn: list[list[int]] = []

    class Names(list[str]):
        def __getitem__(self, number: Any) -> Any:
            drawn[-1].append(number)
            return str(number)

    drawn.append([])
    charts.confusion_matrix(cells_of(cells), Names([""] * 60))
    assert len(drawn[0]) == 50
    assert drawn[0][-2:] == [58, 59]


def test_a_confusion_matrix_is_blue_where_right_and_red_where_wrong() -> None:
    figure = charts.confusion_matrix(cells_of([[10, 0], [10, 0]]), ["a", "b"])
    pixels = np.asarray(Image.open(io.BytesIO(figure.content)).convert("RGB")).astype(int)
    blue, red = (np.abs(pixels - colour).sum(2) < 20 for colour in (canvas.BLUE, RED))
    assert blue.sum() > 500
    assert red.sum() > 500
    assert np.nonzero(blue)[0].mean() < np.nonzero(red)[0].mean(), "the first row is right, the second is wrong"


def test_pr_curves_of_the_plugin_are_those_of_the_samples(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, 500)
    scores = np.clip(random.normal(0.35 + 0.3 * labels, 0.2), 0, 0.999)
    edges = np.linspace(0, 1, 1001)
    positives, negatives = (np.histogram(scores[labels == label], edges)[0] for label in (1, 0))
    histograms = ScoreHistograms(np.stack([positives, negatives]), np.stack([negatives, positives]), edges[:-1])
    run = Run(tmp_path, ["yes/no", "<b>other</b>"])
    run.validate(Evaluation({}, cells_of(np.eye(2)), scores=histograms), 10)
    found = run.end().pr_curves()
    assert set(found) == {"pr_curves/yes/no", "pr_curves/<b>other</b>"}
    curve = found["pr_curves/yes/no"]
    assert curve["step"] == 9
    for threshold, recall, precision in zip(curve["thresholds"], curve["recall"], curve["precision"], strict=True):
        predicted = np.floor(scores * 1000) >= round(threshold * 1000)
        assert recall == pytest.approx(labels[predicted].sum() / labels.sum(), abs=1e-6)
        assert precision == pytest.approx(labels[predicted].mean() if predicted.any() else 0, abs=1e-6)


def test_areas_under_roc_curves_are_shares_of_ordered_pairs() -> None:
    random = np.random.default_rng(2)
    labels = random.integers(0, 2, 500)
    bins = np.clip(random.normal(40 + 20 * labels, 15), 0, 99).astype(int)
    positives, negatives = (np.bincount(bins[labels == label], minlength=100) for label in (1, 0))
    never = np.zeros_like(positives)
    histograms = ScoreHistograms(np.stack([positives, never]), np.stack([negatives, negatives]), np.arange(100) / 100)
    found = curves.curves_of_classes(histograms)
    assert list(found) == [0]
    area = np.mean(np.sign(bins[labels == 1][:, None] - bins[labels == 0][None]) / 2 + 0.5)  # Mann-Whitney
    assert found[0].auroc == pytest.approx(area)


def test_more_than_50_classes_have_one_curve(tmp_path: Path) -> None:
    scores = evaluation_of(60).scores
    assert scores is not None
    run = Run(tmp_path, [f"{n}" for n in range(60)])
    run.validate(Evaluation({}, cells_of(np.eye(60)), scores=scores.pooled()), 10)
    (curve,) = run.end().pr_curves().values()
    assert curve["true_positives"][0] == scores.positives.sum()


def test_the_layout_shows_training_and_validation_in_one_chart(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.call("on_train_start")
    for tag in ("train/loss", "val/loss", "val/loss_of/x", "val/accuracy", "train/accuracy", "val/accuracy_of/cat"):
        run.logger.log_metrics({tag: 1.0}, 0)
    reader = run.end()
    plugin = CustomScalarsPlugin(reader.context)
    (category,) = (c for c in json.loads(plugin.layout_impl(CONTEXT, ""))["category"] if c["title"] == "Quality")
    found = {
        chart["title"]: {
            tag
            for expression in chart["multiline"]["tag"]
            for tag in plugin.scalars_impl(CONTEXT, ".", expression, "")["tag_to_events"]
        }
        for chart in category["chart"]
    }
    assert found["loss"] == {"train/loss", "val/loss"}
    assert found["accuracy"] == {"train/accuracy", "val/accuracy"}
    assert found["accuracy per class"] == {"val/accuracy_of/cat"}


def test_every_chart_of_the_layout_has_scalars_of_a_fit(tmp_path: Path) -> None:
    run_dir = fit_here(tmp_path, trainer__max_epochs=1)
    reader = Reader(run_dir / "tensorboard")
    plugin = CustomScalarsPlugin(reader.context)
    charts_of_fit = [c for each in json.loads(plugin.layout_impl(CONTEXT, ""))["category"] for c in each["chart"]]
    empty = {
        chart["title"]
        for chart in charts_of_fit
        if not any(plugin.scalars_impl(CONTEXT, ".", tag, "")["tag_to_events"] for tag in chart["multiline"]["tag"])
    }
    assert empty <= {"use"}, "the machine is sampled once per second at most"


def test_draws_the_first_and_the_last_validation_and_few_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "LARGEST_SHARE", 1e-5)  # a machine may stand still for some seconds
    run = Run(tmp_path)
    for step in range(1, 8):
        run.validate(evaluation_of(2), step)
        run.settle()
    assert steps(run.end().images(), "val/examples") == [0, 6]


def test_draws_again_once_20_times_the_cost_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, now = Run(tmp_path), [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(pictures, "time", clock)
    draw = run.callback._draw_evaluation

    def slow(*args: Any) -> None:
        draw(*args)
        now[0] += 2.0

    monkeypatch.setattr(run.callback, "_draw_evaluation", slow)
    for step, at in ((1, 1000.0), (2, 1041.0), (3, 1043.0), (4, 1060.0)):
        now[0] = at
        run.validate(evaluation_of(2), step)
        run.settle()
    now[0] = 1061.0
    assert steps(run.end().images(), "val/examples") == [0, 2, 3]


def test_training_does_not_wait_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, going_on, drawn = Run(tmp_path), threading.Event(), list[bool]()
    monkeypatch.setattr(run.callback, "_draw_evaluation", lambda *args: drawn.append(going_on.wait(240)))
    for step in range(1, 4):
        run.validate(evaluation_of(2), step)
    assert not drawn
    going_on.set()
    run.end()


def test_an_end_that_waits_in_vain_leaves_pictures_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, going_on, drawn = Run(tmp_path), threading.Event(), charts.confusion_matrix
    monkeypatch.setattr(pictures, "END_SECONDS", 0.1)
    monkeypatch.setattr(charts, "confusion_matrix", lambda *args: going_on.wait(240) and drawn(*args))
    run.validate(evaluation_of(2), 1)
    reader = run.end()
    going_on.set()
    run.settle()
    assert "left out" in caplog.text
    assert reader.images() == {}
    assert not run.folder.exists(), "no event file is opened after the end"


def test_an_error_is_a_warning_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    monkeypatch.setattr(charts, "confusion_matrix", lambda *args: 1 / 0)
    for step in (1, 2):
        run.validate(evaluation_of(2), step)
        run.settle()
    run.end()
    assert [record.levelname for record in caplog.records if "pictures" in record.message] == ["WARNING"]


def test_a_sample_that_cannot_be_read_has_an_empty_tile(tmp_path: Path) -> None:
    run = Run(tmp_path, files={"a/1.jpg": b"no image", **picture_files(["blue"], 2)})
    run.validate(dataclasses.replace(evaluation_of(2), examples=(SamplePrediction(0, (0,), (0,), 1.0, 0.0),)), 5)
    ((_, image, _),) = run.end().images()["val/examples"]
    assert inside(image, 0).min() > 200


@pytest.mark.parametrize("change", [{"is_global_zero": False}, {"global_step": 7}])
def test_only_the_first_step_of_rank_0_draws_the_batch(tmp_path: Path, change: dict[str, Any]) -> None:
    run = Run(tmp_path)
    vars(run.trainer).update(change)
    run.call("on_train_batch_start", first_batch(run.data), 0)
    run.settle()
    assert run.end().images() == {}


def test_no_images_but_charts_where_none_are_wanted(tmp_path: Path) -> None:
    run = Run(tmp_path, images=0)
    run.call("on_train_batch_start", first_batch(run.data), 0)
    run.validate(evaluation_of(2), 1)
    assert set(run.end().images()) == {"val/confusion_matrix", "val/reliability_diagram", "val/roc_curves"}


def first_batch(data: ImageDataModule) -> Batch:
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("augment", [None, v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()])])
def test_a_batch_of_features_is_shown_as_the_images_that_it_stands_for(tmp_path: Path, augment: Any) -> None:
    root = write_files(
        tmp_path, {f"{p}/{k}": c for p in ("train", "val") for k, c in picture_files(["blue", "red"], 5).items()}
    )
    views = 3 if augment else None
    data = ImageDataModule(
        root=str(root),
        cache_dir=f"{tmp_path}/cache",
        image_size=32,
        augment=augment,
        augment_views=views,
        num_workers=0,
    )
    data.setup("fit")
    batch = first_batch(data)
    features = cast("Batch", {name: value for name, value in batch.items() if name != "image"})
    features["features"] = torch.zeros(len(batch["sample"]), 4)
    before = torch.get_rng_state()
    shown, expected = first_images(data, features, 6)(), first_images(data, batch, 6)()
    assert torch.equal(shown["image"], expected["image"])
    assert torch.equal(shown["label"], batch["label"][:6])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shown_batch_is_a_copy(tmp_path: Path) -> None:
    run = Run(tmp_path)
    batch = first_batch(run.data)
    load, first = first_images(run.data, batch, 2), batch["image"][:2].clone()
    batch["image"].zero_()
    assert torch.equal(load()["image"], first)
