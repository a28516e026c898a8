"""An audit on two ranks finds what one process finds."""

from __future__ import annotations

from pathlib import Path

from support import FROZEN, options, picture_files, run_here, run_well, write_files

SETTINGS = {**FROZEN, "data.global_batch_size": 8}


def test_two_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    files = picture_files(["blue", "red"], 100)  # several portions of the inspection per rank
    files["red/copy.jpg"] = files["red/000.jpg"]
    files["blue/flipped.jpg"] = picture_files(["red"], 1, seed=77)["red/000.jpg"]
    files["blue/broken.jpg"] = b"\xff\xd8\xff no image"
    images = write_files(tmp_path / "images", files)
    settings = options(SETTINGS, data__root=images, data__cache_dir=tmp_path / "cache")
    two = run_well("audit", *settings, "--run_dir", tmp_path / "two", processes=2)
    assert two.stdout.count("images are suspect") == 1
    one = run_here("audit", *settings, "--run_dir", tmp_path / "one")
    assert one.returncode == 0, one.output
    first, second = ((tmp_path / name / "audit" / "audit.jsonl").read_text() for name in ("one", "two"))
    assert first == second
    kinds = {line.split('"')[3] for line in first.splitlines()}
    assert {"unreadable", "label_error"} <= kinds
    assert kinds & {"leakage", "exact_duplicate"}  # as the split into parts has it
