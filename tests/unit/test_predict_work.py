"""Which rank computes which part of a folder of predictions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support import COLOURS, picture, write_files

from job import storage
from job.data.index.build import build
from job.errors import ConfigError, DataError
from job.predict import work
from job.predict.summary import Totals
from job.predict.work import next_part, prepare


def parts_computed(alive: list[int], world_size: int, parts: int, seconds: dict[int, int]) -> int:
    """Parts that are computed until there are all, those that several ranks compute counted as often."""
    missing, computing, computed, now = set(range(parts)), dict[int, tuple[int, int]](), 0, 0
    while missing:
        for rank in alive:
            if rank in computing and computing[rank][1] <= now:
                missing.discard(computing.pop(rank)[0])
        for rank in alive:
            if rank not in computing and missing:
                computing[rank] = next_part(sorted(missing), rank, world_size), now + seconds.get(rank, 10)
                computed += 1
        now += 1
    return computed


@pytest.mark.parametrize(
    ("alive", "world_size", "seconds", "twice"),
    [
        ([0, 1, 2, 3], 4, {}, 0),
        ([0, 1, 2, 3], 4, {3: 30}, 20),
        ([0, 1, 2, 3], 64, {0: 9, 1: 10, 2: 11, 3: 12}, 50),
        ([5], 64, {}, 0),
    ],
    ids=["all alike", "one slow", "few of many", "alone"],
)
def test_ranks_rarely_compute_the_same_part(
    alive: list[int], world_size: int, seconds: dict[int, int], twice: int
) -> None:
    random.seed(0)
    assert parts_computed(alive, world_size, 512, seconds) <= 512 + twice


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_files(tmp_path / "images", {f"{n}.jpg": picture(COLOURS["red"], n) for n in range(20)})


def test_a_rank_lists_the_images_itself_where_rank_0_does_not_come(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(work, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(work, "POLL_SECONDS", 0.1)
    listings = []

    def list_images(folder: Path) -> None:
        listings.append(folder)
        build({"all": [str(images)]}, folder, str(tmp_path), "images")

    output, request = str(tmp_path / "out"), {"format": "jsonl", "precision": "bf16"}
    mine, index = prepare(output, request, list_images, 4, tmp_path / "cache")
    assert (mine.samples, mine.index, index.name) == (20, "index-3", "index-3")

    monkeypatch.setenv("RANK", "0")  # comes late
    theirs, index = prepare(output, request, list_images, 4, tmp_path / "cache")
    assert (theirs, index.name, len(listings)) == (mine, "index-3", 1)

    other: dict[str, Any] = {"format": "jsonl", "precision": "fp32"}
    adopted, _ = prepare(output, other, list_images, 4, tmp_path / "cache", adopted=("precision",))
    assert adopted.precision == "bf16"
    with pytest.raises(ConfigError, match="precision was bf16, is fp32"):
        prepare(output, other, list_images, 4, tmp_path / "cache")


def test_of_two_lists_the_first_counts(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, request = str(tmp_path / "out"), {"format": "jsonl"}

    def list_slowly(folder: Path) -> None:
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setattr(work, "PATIENCE_SECONDS", 0.0)
        prepare(output, request, list_images, 4, tmp_path / "cache")
        monkeypatch.setenv("RANK", "0")
        list_images(folder)

    def list_images(folder: Path) -> None:
        build({"all": [str(images)]}, folder, str(tmp_path), "images")

    monkeypatch.setenv("WORLD_SIZE", "4")
    chosen, _ = prepare(output, request, list_slowly, 4, tmp_path / "cache")
    assert chosen.index == "index-2"
    assert storage.exists(f"{output}/index-2/index.json")


@pytest.mark.parametrize(("part", "rows"), [(0, 1), (0, 3), (1, 0), (1, 2)])
def test_a_part_without_one_row_per_image_is_refused(part: int, rows: int, tmp_path: Path) -> None:
    plan = work.Work({"format": "jsonl"}, samples=3, samples_per_part=2)
    line = '{"uri": "a.png", "error": "is empty"}\n'
    for number in range(2):
        (tmp_path / plan.name_of(number)).write_text(line * len(plan.samples_of(number)))
    assert Totals.of_folder(str(tmp_path), plan, "jsonl").images == 3
    (tmp_path / plan.name_of(part)).write_text(line * rows)
    with pytest.raises(DataError, match=rf"part-0000{part}-of-00002\.jsonl does not hold {2 - part} rows"):
        Totals.of_folder(str(tmp_path), plan, "jsonl")
