"""The callback that gives advice, in real fits; repeated images, in real data sets."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import Callback
from support import TINY, index_of, options, picture_files, run_here, write_files, zip_of

from job.data.datamodule import ImageDataModule
from job.data.repeated_images import find_repeated_images
from job.model.module import TransferLearningModel
from job.monitoring.advisor import Advisor
from job.monitoring.history import ValidationRecord

PLACEHOLDER = picture_files(["blue"], 1)["blue/000.jpg"]


def with_placeholders(count: int, share: int = 25) -> dict[str, bytes]:
    """Pictures of two classes, ``count`` of which are the same file."""
    files = picture_files(["blue", "red"], share)
    return {**files, **{f"red/gone-{number:03d}.jpg": PLACEHOLDER for number in range(count)}}


@pytest.mark.parametrize("archive", [False, True])
def test_files_of_the_same_content_are_found(archive: bool, tmp_path: Path) -> None:
    if archive:
        (tmp_path / "images.zip").write_bytes(zip_of(with_placeholders(30)))
    else:
        write_files(tmp_path / "images", with_placeholders(30))
    index = index_of(tmp_path / ("images.zip" if archive else "images"), layout="classes")
    found = find_repeated_images(index, str(tmp_path / "cache"))
    assert found is not None
    assert 25 <= found.count <= 35
    assert found.size == len(PLACEHOLDER)
    assert any("gone-" in uri for uri in found.examples)


def test_files_of_the_same_size_and_a_few_copies_are_no_placeholders(tmp_path: Path) -> None:
    def bitmap(seed: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(buffer, "BMP")
        return buffer.getvalue()

    equally_large = {f"{name}/{n}.bmp": bitmap(100 * c + n) for c, name in enumerate("ab") for n in range(30)}
    for name, files in {"bitmaps": equally_large, "copies": with_placeholders(10)}.items():
        index = index_of(write_files(tmp_path / name, files), layout="classes")
        assert find_repeated_images(index, str(tmp_path / "cache")) is None


class Recorded(Callback):
    """A record per validation, with a loss that rises."""

    def __init__(self) -> None:
        self.records: list[ValidationRecord] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        metrics = {"val/loss": 0.1 if epoch == 1 else 0.1 + 0.05 * epoch, "val/accuracy": 0.9}
        self.records.append(ValidationRecord(epoch, trainer.global_step, metrics, {"head": 1e-3}))


def test_each_kind_is_logged_once_and_stays_in_the_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ImageDataModule(
        str(write_files(tmp_path / "images", with_placeholders(30, 8))),
        global_batch_size=16,
        image_size=32,
        num_workers=1,
        cache_dir=str(tmp_path / "cache"),
    )
    model = TransferLearningModel(backbone="timm/test_resnet", weights="none", hidden=[8], milestones=[], lr=1e-30)
    recorded = Recorded()
    advisor = Advisor(lambda: recorded.records)
    trainer = pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[recorded, advisor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=tmp_path / "run",
    )
    with caplog.at_level(logging.WARNING, "job.monitoring.advisor"):
        trainer.fit(model, datamodule=data)
        (search,) = (advisor._search,)
        assert search is not None
        search.join()
        advisor.on_validation_end(trainer, model)
    assert {"rising_loss", "repeated_images"} <= {each.kind for each in advisor.advice}
    lines = [record.getMessage() for record in caplog.records if record.name == "job.monitoring.advisor"]
    rising = [line for line in lines if "Validation loss has risen since epoch 1" in line]
    assert len(rising) == 1
    assert "--early_stopping 5" in rising[0]
    assert sum("training images are the same file" in line for line in lines) == 1


def test_advice_is_logged_and_reported(tmp_path: Path) -> None:
    """At a learning rate of almost nothing the loss stays that of guessing."""
    colours = write_files(tmp_path / "colours", picture_files(["blue", "red"], 10))
    changes = {"model__lr": 1e-30, "model__milestones": "[9]", "trainer__max_epochs": 5}
    outcome = run_here("fit", *options(TINY, data__root=colours, run_dir=tmp_path / "run", **changes))
    assert outcome.returncode == 0, outcome.output
    assert outcome.output.count("The validation loss hardly falls") == 2  # the warning, and the summary at the end
    advice = json.loads((tmp_path / "run/report.json").read_text())["advice"]
    assert [each["kind"] for each in advice] == ["learning_rate"]
    assert "raise --lr (it is 1e-30)" in advice[0]["suggestion"]


def test_other_ranks_and_commands_say_nothing() -> None:
    advisor = Advisor(lambda: pytest.fail("asked"))
    for trainer in (
        SimpleNamespace(is_global_zero=False, state=SimpleNamespace(fn="fit")),
        SimpleNamespace(is_global_zero=True, state=SimpleNamespace(fn="validate")),
    ):
        advisor.on_validation_end(trainer, SimpleNamespace(evaluation=None))  # type: ignore[arg-type]
    assert advisor.advice == []
