"""Signals: the state is saved, and the resumed run is bit-equal to the uninterrupted one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from aiohttp import web
from harness import STEPS, Job, fault_environment, fit_options, sabotage
from proxy import FaultyProxy
from support import assert_same_weights, run_well, scalars

from job import checkpoint
from job.monitoring import accounting

pytestmark = pytest.mark.integration


def assert_nothing_lost(run_dir: str, uninterrupted: str, starts: int) -> None:
    assert_same_weights(run_dir, uninterrupted)
    one, other = scalars(uninterrupted), scalars(run_dir)
    assert [step for step, _ in other["train/loss"]] == STEPS
    for tag in ("train/loss", "val/loss", "val/accuracy", "train/grad_norm", "lr/head"):
        assert other[tag] == one[tag], tag
    records = accounting.read(run_dir)
    assert len(records) == starts
    assert records[-1].last_step == len(STEPS)


@pytest.mark.parametrize(
    ("rank", "target", "phase"),
    [
        (0, "rank", "training"),
        (1, "rank", "training"),
        (0, "launcher", "training"),
        (1, "rank", "validation"),
    ],
)
@pytest.mark.parametrize("name", ["SIGTERM"])
def test_a_signal_to_any_rank_saves_and_stops_all(
    rank: int, target: str, phase: str, name: str, run_dir: str, uninterrupted: str, tmp_path: Path
) -> None:
    seed = f"{name} {rank} {target} {phase}"
    step = random.Random(seed).randint(1, len(STEPS) - 3)
    print(f"signal at step {step}, by seed {seed!r}")
    plot = sabotage(tmp_path / "marker", step=step, rank=rank, name=name, target=target, phase=phase)
    arguments = fit_options(run_dir, trainer__callbacks=plot)
    first = Job(tmp_path / "log", *arguments, processes=2, fresh=target == "launcher")
    assert first.wait() != 0
    assert "stopped on request after step" in first.output
    newest = checkpoint.newest_verified(run_dir)
    assert newest is not None
    assert newest.global_step >= step
    assert f"stopped on request after step {newest.global_step}," in first.output
    second = Job(tmp_path / "log2", *arguments, processes=2)
    assert second.wait() == 0, second.output
    assert f"resuming after step {newest.global_step}," in second.output
    assert_nothing_lost(run_dir, uninterrupted, starts=2)
    assert accounting.read(run_dir)[0].recomputed == 0


def test_a_signal_during_an_upload(run_dir: str, uninterrupted: str, tmp_path: Path, proxy: FaultyProxy) -> None:
    """Uploads take 3 s each: the upload of step 10 is in progress at the signal of step 12."""
    proxy.delay = lambda request: (
        3.0 if "uploadType" in request.path_qs and (request.content_length or 0) > 10**5 else 0
    )
    plot = sabotage(tmp_path / "marker", step=12, rank=1)
    arguments = fit_options(run_dir, trainer__callbacks=plot, checkpoint__every_n_steps=10)
    first = Job(tmp_path / "log", *arguments, processes=2)
    assert first.wait() != 0
    assert "stopped on request after step" in first.output
    assert [m.global_step for m in checkpoint.manifests(run_dir)][-1] >= 12
    second = Job(tmp_path / "log2", *arguments, processes=2)
    assert second.wait() == 0, second.output
    assert_nothing_lost(run_dir, uninterrupted, starts=2)


def test_one_process_alone_exits_with_the_documented_code(run_dir: str, tmp_path: Path) -> None:
    plot = sabotage(tmp_path / "marker", step=3, name="SIGUSR1")
    job = Job(tmp_path / "log", *fit_options(run_dir, trainer__callbacks=plot), fresh=True)
    assert job.wait() == 143, job.output
    assert "Traceback" not in job.output
    run_well(*fit_options(run_dir, trainer__callbacks=plot), PYTHONPATH=fault_environment()["PYTHONPATH"])


def test_a_rank_that_cannot_save_exits_when_the_grace_period_ends(
    run_dir: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    """The bucket is unavailable after the signal: the grace period is kept, and so is the last committed checkpoint."""
    marker = tmp_path / "marker"

    def gone(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=503) if marker.exists() and "uploadType" in request.path_qs else None

    proxy.fault = gone
    plot = sabotage(marker, step=14)
    job = Job(tmp_path / "log", *fit_options(run_dir, trainer__callbacks=plot, grace=5))
    assert job.wait() == 143, job.output
    assert "could not stop cleanly within 5 s" in job.output
    newest = checkpoint.newest_verified(run_dir)
    assert newest is not None
    assert newest.global_step <= 10
    proxy.fault = lambda request: None
    second = run_well(*fit_options(run_dir))
    assert f"resuming after step {newest.global_step}," in second.stderr
