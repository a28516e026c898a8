"""Outages of buckets and full disks: the run continues if possible, and no committed state is lost."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aiohttp import web
from harness import SETTINGS, STEPS, Job, fit_options
from proxy import FaultyProxy
from support import TINY, assert_same_weights, options, picture_files, run, scalars, tar_of

from job import checkpoint

pytestmark = pytest.mark.integration


def test_a_temporary_outage_only_delays_the_run(
    run_dir: str, uninterrupted: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    proxy.answer_503_for(8, match="uploadType")  # every write, from the first on
    job = Job(tmp_path / "log", *fit_options(run_dir), processes=2)
    assert job.wait() == 0, job.output
    assert_same_weights(run_dir, uninterrupted)
    assert scalars(run_dir)["train/loss"] == scalars(uninterrupted)["train/loss"]


def test_a_permanent_outage_keeps_the_state_on_the_disk(run_dir: str, tmp_path: Path, proxy: FaultyProxy) -> None:
    """The run fails and its message names the folder of the state."""
    arguments = fit_options(run_dir, checkpoint__upload_seconds=2, checkpoint__every_n_steps=1)
    states: list[str] = []

    def fault(request: web.Request) -> web.StreamResponse | None:
        """Refuse all writes from the tenth checkpoint's state on, in the second epoch."""
        if "uploadType" not in request.path_qs:
            return None
        if (request.content_length or 0) > 10**5:
            states.append(request.path_qs)
        return web.Response(status=503) if len(states) >= 10 else None

    proxy.fault = fault
    job = Job(tmp_path / "log", *arguments, module="impatient", TMPDIR=str(tmp_path))
    assert job.wait() == 75, job.output
    assert "Traceback" not in job.output
    match = re.search(r"The state is kept in (\S+)\.", job.output)
    assert match is not None, job.output
    assert "state_dict" in torch.load(match.group(1), weights_only=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    yield folder
    # A loader process may hold a file open for a moment after the end of its parent.
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_no_space_for_the_copy_of_an_archive(full_disk: Path, tmp_path: Path) -> None:
    """The copy of an archive that cannot be read in parts is required."""
    (tmp_path / "c.tar.gz").write_bytes(tar_of(picture_files(["blue", "red"], 60), "w:gz"))
    arguments = options(TINY, data__root=tmp_path / "c.tar.gz", data__cache_dir=full_disk, run_dir=tmp_path / "run")
    result = run("fit", *arguments)
    assert result.returncode == 2
    assert "would be left on the disk" in result.stderr
    assert "--data.cache_dir" in result.stderr
    assert "Traceback" not in result.stderr
    assert not [entry for entry in full_disk.glob("archives/**/*") if entry.is_file() and entry.stat().st_size > 0]


def test_a_full_disk_disables_only_the_cache(full_disk: Path, run_dir: str, uninterrupted: str) -> None:
    result = run(
        "fit", *options(SETTINGS, data__root="gs://faults/colours", data__cache_dir=full_disk, run_dir=run_dir)
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("images are read without a cache") == 1
    assert len(scalars(run_dir)["train/loss"]) == len(STEPS)


def test_no_space_to_stage_a_checkpoint(full_disk: Path, colours: Path, tmp_path: Path) -> None:
    result = run("fit", *options(TINY, data__root=colours, run_dir=tmp_path / "run"), TMPDIR=str(full_disk))
    assert result.returncode != 0
    assert "set TMPDIR to a larger disk" in result.stderr
    assert "Traceback" not in result.stderr
    assert checkpoint.manifests(str(tmp_path / "run")) == []
