"""The callback that gives advice, in real fits; repeated images, in real data sets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image
from support import TINY, index_of, options, picture_files, run_here, write_files, zip_of

from job.data.repeated_images import find_repeated_images
from job.monitoring.advice.callback import Advisor

PLACEHOLDER = picture_files(["blue"], 1)["blue/000.jpg"]


def with_placeholders(count: int, share: int = 25) -> dict[str, bytes]:
    """Pictures of two classes, ``count`` of which are the same file."""
    files = picture_files(["blue", "red"], share)
    return {**files, **{f"{('blue', 'red')[n % 2]}/gone-{n:03d}.jpg": PLACEHOLDER for n in range(count)}}


@pytest.mark.parametrize("archive", [False, True])
def test_files_of_the_same_content_are_found(archive: bool, tmp_path: Path) -> None:
    if archive:
        (tmp_path / "images.zip").write_bytes(zip_of(with_placeholders(40)))
    else:
        write_files(tmp_path / "images", with_placeholders(30))
    index = index_of(tmp_path / ("images.zip" if archive else "images"), layout="classes")
    found = find_repeated_images(index, str(tmp_path / "cache"))
    assert found is not None
    # A member of a .zip is as long as its header, too, with the name: those of the two classes differ.
    assert found.count in (range(15, 30) if archive else range(30, 40))
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


def test_advice_is_logged_once_and_reported(tmp_path: Path) -> None:
    """At a learning rate of almost nothing the loss stays that of guessing, in each of the validations."""
    images = write_files(tmp_path / "images", with_placeholders(30, 8))
    more = {"model__lr": 1e-30, "model__milestones": "[99]", "trainer__max_epochs": 6}
    done = run_here("fit", *options(TINY, data__root=images, run_dir=tmp_path / "run", **more))
    assert done.returncode == 0, done.output
    for text in ("The validation loss hardly falls", "training images are the same file"):
        assert done.output.count(text) == 2, done.output  # the warning, and the summary at the end
    advice = json.loads((tmp_path / "run/report.json").read_text())["advice"]
    assert [each["kind"] for each in advice] == ["learning_rate", "repeated_images"]
    assert "raise --lr (it is 1e-30)" in advice[0]["suggestion"]
    assert "gone-" in advice[1]["message"]


def test_an_error_of_advice_is_logged_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> NoReturn:
        raise ZeroDivisionError("of a rate")

    advisor = Advisor(fails)
    data = SimpleNamespace(classes=("a", "b"))
    trainer = SimpleNamespace(is_global_zero=True, state=SimpleNamespace(fn="fit"), datamodule=data)
    for _ in range(2):
        advisor.on_validation_end(trainer, SimpleNamespace(evaluation=object()))  # type: ignore[arg-type]
    assert caplog.text.count("there is no advice on this run: ZeroDivisionError: of a rate") == 1


def test_other_ranks_and_commands_say_nothing() -> None:
    advisor = Advisor(lambda: pytest.fail("asked"))
    for trainer in (
        SimpleNamespace(is_global_zero=False, state=SimpleNamespace(fn="fit")),
        SimpleNamespace(is_global_zero=True, state=SimpleNamespace(fn="validate")),
    ):
        advisor.on_validation_end(trainer, SimpleNamespace(evaluation=None))  # type: ignore[arg-type]
    assert advisor.advice == []
