"""A sweep on two ranks, and one that is stopped."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support import FROZEN, environment, options, picture_files, run_here, run_well, start, write_files

from job.errors import EXIT_PREEMPTED

SETTINGS: dict[str, object] = {
    **FROZEN,
    "data.global_batch_size": 8,
    "lr": "0.003,0.03",
    "weight_decay": "0",
    "hidden": "none,8",
    "label_smoothing": "0",
    "dropout": "0,0.2",
    "folds": 3,
    "epochs": 3,
}


def result_of(run_dir: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run_dir / "sweep" / "sweep.json").read_bytes())
    return result


def scores_of(result: dict[str, Any]) -> dict[tuple[float, str, float], list[float]]:
    """Scores of the folds and loss of each trial, by its settings."""
    trials = result["trials"]
    return {(each["lr"], str(each["hidden"]), each["dropout"]): [*each["folds"], each["loss"]] for each in trials}


def test_two_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", picture_files(["blue", "red"], 20))
    settings = options(SETTINGS, data__root=images, data__cache_dir=tmp_path / "cache")
    run_well("sweep", *settings, "--run_dir", tmp_path / "two", processes=2)
    one = run_here("sweep", *settings, "--run_dir", tmp_path / "one")
    assert one.returncode == 0, one.output
    first, second = (scores_of(result_of(tmp_path / name)) for name in ("one", "two"))
    assert len(first) == 8
    assert first.keys() == second.keys()
    for settings_of_trial, scores in first.items():
        assert second[settings_of_trial] == pytest.approx(
            scores, rel=1e-5
        )  # blocks of other sizes are rounded otherwise


def test_a_stopped_sweep_keeps_its_features(tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", picture_files(["blue", "red"], 20))
    settings = options(SETTINGS, data__root=images, data__cache_dir=tmp_path / "cache", run_dir=tmp_path / "run")
    log = tmp_path / "log"
    with log.open("w") as file:
        process = start("sweep", *settings, "--epochs=100000", stdout=file, stderr=file, variables=environment())
        while "sweep: 8 trials" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == EXIT_PREEMPTED, log.read_text()
    again = run_here("sweep", *settings)
    assert again.returncode == 0, again.output
    assert "chunks of train" in log.read_text()
    assert "chunks of train" not in again.output
