"""Damaged files of a run_dir end in a message or are replaced; ``JOB_TEST_MUTANTS`` sets the number per file."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from mutants import mutant
from support import fit_here

import job
from job import checkpoint
from job.config import run_config as config
from job.config import saved_config
from job.errors import JobError
from job.monitoring import accounting
from job.monitoring.report.files import EarlierReport
from job.monitoring.report.page import render
from job.resilience import attempts
from job.resilience.lease_file import parse

MUTANTS = int(os.environ.get("JOB_TEST_MUTANTS", "150"))
NEW_RUN = '{"format":1,"step":4,"configuration":"0","failed":1,"lost":0,"last_error":"no memory"}'


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fit_here(tmp_path_factory.mktemp("mutants"), trainer__max_epochs=2)
    (folder / "attempts.json").write_text(NEW_RUN)
    return folder


def look_at_checkpoints(run_dir: str) -> None:
    for each in (checkpoint.newest_verified, checkpoint.resolve, checkpoint.manifests, checkpoint.uncommitted):
        with contextlib.suppress(JobError):
            each(run_dir)
    for manifest in checkpoint.manifests(run_dir):
        assert "/" not in manifest.file
        checkpoint.confusion_cells(run_dir, manifest)


def look_at_state(run_dir: str) -> None:
    """With a matching manifest, since an attacker can change both."""
    newest = max(Path(run_dir, "checkpoints").glob("*.ckpt"))
    manifest = newest.with_name(f"{newest.name}.json")
    content, fields = newest.read_bytes(), msgspec.json.decode(manifest.read_bytes())
    fields |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_bytes(msgspec.json.encode(fields))
    job.load(str(newest), "cpu")


def look_at_confusion(run_dir: str) -> None:
    for manifest in checkpoint.manifests(run_dir):
        assert manifest.confusion is not None
        checkpoint.confusion_cells(run_dir, manifest)


def look_at_lease(run_dir: str) -> None:
    parse(run_dir, Path(run_dir, "lease.json").read_bytes())


def look_at_report(run_dir: str) -> None:
    """As a fit that resumes does, which shows it again."""
    if (content := EarlierReport(run_dir).content) is not None:
        assert "<script" not in render(content, {})


READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "manifest": ("checkpoints/*.ckpt.json", look_at_checkpoints),
    "state": ("checkpoints/*.ckpt", look_at_state),
    "confusion": ("checkpoints/*.safetensors", look_at_confusion),
    "accounting": ("accounting.json", accounting.read),
    "attempts": ("attempts.json", attempts.read),
    "report": ("report.json", look_at_report),
    "config, validate": ("config.yaml", saved_config.read_saved_config),
    "config, fit": ("config.yaml", lambda run_dir: config.save_config(run_dir, "data: {}\n")),
    "lease": ("lease.json", look_at_lease),
}


HEALED = ("accounting", "attempts", "report", "config, fit", "lease")
"""Files without which a run goes on."""


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_one_message(name: str, run_dir: Path) -> None:
    pattern, read = READERS[name]
    if name == "lease":
        (run_dir / "lease.json").write_text(
            '{"start":"a","process":{"host":"h","boot":"b","namespace":"n","pid":1,"start_time":"2"},"seconds":30.0,'
            '"beat":1,"format":1}'
        )
    path = max(run_dir.glob(pattern))
    before = {each: each.read_bytes() for each in run_dir.rglob("*") if each.is_file()}
    if name == "lease":
        assert parse("lease.json", before[path]) is not None
    read(str(run_dir))
    dice, outcomes = random.Random(0), {"taken": 0, "refused": 0}
    logging.disable()
    try:
        for _ in range(MUTANTS):
            path.write_bytes(mutant(before[path], dice))
            try:
                read(str(run_dir))
                outcomes["taken"] += 1
            except JobError as error:
                outcomes["refused"] += 1
                assert len(str(error)) < 20_000
            finally:
                for each in [*run_dir.glob("*"), *run_dir.glob("checkpoints/*")]:
                    if each.is_file() and each not in before:
                        each.unlink()
                for each in {*(run_dir.glob("checkpoints/*")), path, run_dir / "config.yaml"}:
                    if each.is_file():
                        each.write_bytes(before[each])
    finally:
        logging.disable(logging.NOTSET)
    if name not in HEALED:
        assert outcomes["refused"], outcomes
