"""Millions of samples: listed, indexed and opened within bounded memory (``pytest -s`` shows the figures)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, environment

pytestmark = pytest.mark.integration

SAMPLES = 3_000_000
PREAMBLE = """
import json, sys, threading, time
from pathlib import Path
sys.path.insert(0, "tests")
import generated  # noqa: F401
from job.data.index.build import build, split
from job.data.dataset import ImageDataset, Preprocessing
from job.data.index.index import Index
from job.data.sampler import ResumableBatchSampler

def memory(kind):
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind + ":")) / 1024

folder, before, began = Path(sys.argv[1]), memory("Anonymous"), time.monotonic()
"""
INDEX = """
peak, done = before, threading.Event()

def watch():
    global peak
    while not done.wait(0.1):
        peak = max(peak, memory("Anonymous"))

threading.Thread(target=watch, daemon=True).start()
build({"root": ["generated://1000x3000"]}, folder, "", "parts")
listed = time.monotonic() - began
split(folder, 0.01, seed=0)
done.set()
print(json.dumps({"listed": listed, "seconds": time.monotonic() - began, "peak": peak}))
"""
START = """
index = Index(folder, "train")
sampler = ResumableBatchSampler(len(index), 1024, rank=3, world_size=8, seed=0, shuffle=True)
batch = ImageDataset(index, sampler, Preprocessing(8))[sampler.batch(0, 5)]
figures = {"samples": len(index), "seconds": time.monotonic() - began, "own": memory("Anonymous") - before}
print(json.dumps({**figures, "labels": sorted(set(batch["label"].tolist())), "bad": batch["bad"][0].line}))
"""


def measured(code: str, folder: Path) -> dict[str, object]:
    """Run code in a new process; return the JSON that it prints."""
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, folder],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    figures: dict[str, object] = json.loads(result.stdout)
    return figures


def test_millions_of_samples(tmp_path: Path) -> None:
    indexed = measured(INDEX, tmp_path)
    assert indexed["peak"] < 600, indexed  # MB of its own: what is mapped from files can be dropped
    size = sum(path.stat().st_size for path in tmp_path.glob("*.arrow"))
    assert size / SAMPLES <= 100
    started = measured(START, tmp_path)
    assert started["samples"] == SAMPLES * 99 // 100
    assert started["own"] < 40, started  # MB, for a rank that has made its first batch
    assert len(started["labels"]) > 100  # of 1000 classes, in 128 samples of a shuffled sampler
    assert started["bad"].startswith("generated://1000x3000/n")
    print(indexed, started, f"{size / SAMPLES:.1f} bytes a sample")
