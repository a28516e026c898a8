"""Predictions of many images: files, folders of parts, kills and restarts with other numbers of processes."""

from __future__ import annotations

import json
import random
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support import COLOURS, environment, fit_here, picture, run, run_here, run_well, start, write_files

from job import checkpoint, storage

IMAGES = 480


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_here(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 pictures in no class folder, two of which cannot be read."""
    files = {f"{n:03d}.jpg": picture(COLOURS["blue" if n % 3 else "red"], n) for n in range(IMAGES)}
    return write_files(tmp_path_factory.mktemp("images"), {**files, "007.jpg": b"", "100.jpg": b"no image"})


def of_rank(rank: int, world_size: int) -> dict[str, str]:
    """Environment of a rank that has no launcher, as the pods of an Indexed Job."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def rows_of(folder: object) -> list[dict[str, Any]]:
    """The rows of all parts, in their order."""
    rows: list[dict[str, Any]] = []
    for key in sorted(entry.key for entry in storage.list_files(str(folder))):
        if key.startswith("part-"):
            uri = f"{folder}/{key}"
            if key.endswith(".jsonl"):
                rows += [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
            else:
                with storage.open_for_reading(uri) as file:
                    rows += pq.read_table(file).to_pylist()
    return rows


def test_both_formats_hold_the_same_rows(trained: Path, images: Path, tmp_path: Path) -> None:
    for suffix in ("jsonl", "parquet"):
        result = run_here("predict", trained, images, "--output", tmp_path / f"p.{suffix}", "--max_bad_samples", 2)
        assert result.returncode == 0, result.output
        assert f"{IMAGES - 2} predictions in" in result.output
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [line["uri"] for line in lines] == [str(path) for path in sorted(images.iterdir())]
    assert {line["model"] for line in lines if "error" not in line} == {
        checkpoint.sha256(checkpoint.resolve(str(trained)))[:16]
    }
    for line, row in zip(lines, rows, strict=True):
        assert row["uri"] == line["uri"]
        assert row["error"] == line.get("error")
        if row["error"] is None:
            assert (row["label"], row["model"], row["labels"]) == (line["label"], line["model"], None)
            assert dict(zip(row["classes"], row["probabilities"], strict=True)) == pytest.approx(line["probabilities"])
            assert row["probability"] == pytest.approx(max(row["probabilities"]))
    assert {Path(line["uri"]).name: line["error"] for line in lines if "error" in line} == {
        "007.jpg": "is empty (0 bytes)",
        "100.jpg": "is no image of a known format (8 bytes)",
    }


def test_too_many_unreadable_images_are_an_error_after_all_are_predicted(
    trained: Path, images: Path, tmp_path: Path
) -> None:
    for output in (tmp_path / "p.jsonl", tmp_path / "parts"):
        result = run_here("predict", trained, images, "--output", output, "--max_bad_samples", 1)
        assert result.returncode == 2
        assert "2 unreadable image(s), 1 allowed" in result.output
        assert f"{images}/007.jpg is empty" in result.output
    assert len(rows_of(tmp_path / "parts")) == len((tmp_path / "p.jsonl").read_text().splitlines()) == IMAGES


def test_top_k_keeps_the_most_probable_classes(trained: Path, colours: Path, tmp_path: Path) -> None:
    result = run_here("predict", trained, colours, "--output", tmp_path / "p.jsonl", "--top_k", 1)
    assert result.returncode == 0, result.output
    for line in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines()):
        assert list(line["probabilities"]) == [line["label"]]


def test_a_folder_is_continued_and_not_mixed(trained: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "parts"
    command = ["predict", trained, images, "--output", output, "--batch_size", 10, "--max_bad_samples", 2]
    assert run_here(*command).returncode == 0
    parts = sorted(output.glob("part-*.parquet"))
    assert [path.name for path in parts] == [f"part-{n:05d}-of-00008.parquet" for n in range(8)]
    expected = rows_of(output)
    assert len(expected) == IMAGES
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["images"], summary["unreadable"], sum(summary["labels"].values())) == (IMAGES, 2, IMAGES - 2)

    parts[3].unlink()
    written = {path: path.stat().st_mtime_ns for path in parts if path.exists()}
    repeated = run_here(*command)
    assert repeated.returncode == 0, repeated.output
    assert {path: path.stat().st_mtime_ns for path in parts if path in written} == written
    assert rows_of(output) == expected

    for option in (["--tta", "hflip"], ["--format", "jsonl"], ["--top_k", 1]):
        refused = run_here(*command, *option)
        assert refused.returncode == 2
        assert f"holds other predictions: {option[0].removeprefix('--')} was" in refused.output
    (output / "predictions.json").write_text("{}")
    damaged = run_here(*command)
    assert damaged.returncode == 2
    assert "predictions.json is damaged" in damaged.output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("p.csv", "are written as .jsonl or .parquet, or into a folder"),
        ("p.jsonl", "several processes cannot write one file"),
        (None, "several processes need a folder"),
    ],
)
def test_outputs_that_cannot_work(
    output: str | None, message: str, trained: Path, images: Path, tmp_path: Path
) -> None:
    chosen = [] if output is None else ["--output", tmp_path / output]
    result = run("predict", trained, images, *chosen, **of_rank(0, 2))
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.integration
def test_kills_and_other_numbers_of_processes_lose_and_double_nothing(trained: Path, images: Path, gcs: str) -> None:
    """Five processes, then one, three, two, …, each of which is killed, 20 in all; then two that may end.

    Between the rounds all but ten parts are removed, so that no round is the one that ends by itself.
    """
    output, seeded = f"{gcs}/killed-predictions-{uuid.uuid4().hex}", random.Random(0)
    command = ("predict", trained, images, "--output", output, "--batch_size", 1, "--max_bad_samples", 2)

    def ranks(world_size: int) -> list[Any]:
        return [
            start(
                *command,
                stdout=log,
                stderr=log,
                variables=environment(**of_rank(rank, world_size)),
            )
            for rank in range(world_size)
        ]

    def parts() -> list[str]:
        return [entry.key for entry in storage.list_files(output) if entry.key.startswith("part-")]

    storage.write_bytes(f"{output}/.listed", b"")
    with tempfile.TemporaryFile("w+") as log:
        world_sizes = (5, 1, 3, 2, 1, 3, 2, 1, 1, 1)
        assert sum(world_sizes) == 20
        for world_size in world_sizes:
            before, processes = len(parts()), ranks(world_size)
            deadline = time.monotonic() + 300
            while len(parts()) == before:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            for process in seeded.sample(processes, len(processes)):
                time.sleep(seeded.uniform(0, 0.05))
                assert process.poll() is None
                process.kill()
            for process in processes:
                process.wait()
            for key in seeded.sample(written := sorted(parts()), max(len(written) - 10, 0)):
                storage.remove(f"{output}/{key}")
        for process in ranks(2):
            assert process.wait(300) == 0, log.seek(0) or log.read()
    rows = rows_of(output)
    assert [row["uri"] for row in rows] == [str(path) for path in sorted(images.iterdir())]
    assert sum(row["error"] is not None for row in rows) == 2


@pytest.mark.integration
def test_ranks_finish_the_parts_of_one_that_never_starts(trained: Path, images: Path, tmp_path: Path) -> None:
    command = ("predict", trained, images, "--output", tmp_path / "parts", "--max_bad_samples", 2)
    result = run(*command, **of_rank(0, 4))
    assert result.returncode == 0, result.stderr
    assert len(rows_of(tmp_path / "parts")) == IMAGES


@pytest.mark.integration
def test_the_launcher_starts_ranks_that_predict_each_image_once(trained: Path, gcs_colours: str, gcs: str) -> None:
    run_well("predict", trained, gcs_colours, "--output", f"{gcs}/launched", "--format", "jsonl", processes=2)
    uris = [row["uri"] for row in rows_of(f"{gcs}/launched")]
    assert len(uris) == len(set(uris)) == 40
