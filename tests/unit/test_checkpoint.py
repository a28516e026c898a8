from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from job import checkpoint, storage
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.manifest import kept_metrics
from job.checkpoint.retention import Retention
from job.checkpoint.settings import CheckpointSettings
from job.checkpoint.state import MANIFEST_KEY, require_lightning_version
from job.checkpoint.store import Manifest
from job.cli.checkpoints import main as checkpoints
from job.errors import CheckpointError, LeaseError, StorageError
from job.process import temporary


def state(step: int, value: float | None = None, epoch: int = 0, mode: str = "max") -> dict[str, Any]:
    facts = {"epoch": epoch, "batch": 1, "global_step": step, "monitor": "val/accuracy", "mode": mode}
    metrics = {} if value is None else {"val/accuracy": value}
    return {
        "state_dict": {"w": torch.full((1000,), float(step))},
        "classifier": {"backbone": "resnet18"},
        MANIFEST_KEY: {**facts, "metrics": kept_metrics(metrics, "val/accuracy")},
    }


def save(run_dir: str, *states: dict[str, Any]) -> BackgroundCheckpointIO:
    io = BackgroundCheckpointIO(upload_seconds=5)
    for one in states:
        facts = one[MANIFEST_KEY]
        name = f"epoch={facts['epoch']:03d}-step={facts['global_step']:08d}.ckpt"
        io.save_checkpoint(one, storage.join(run_dir, "checkpoints", name))
    io.wait()
    return io


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def test_best_and_last_are_chosen_by_the_manifests(run_dir: str) -> None:
    save(run_dir, state(10, 0.9), state(20, 0.7), state(25))
    assert checkpoint.resolve(run_dir).endswith("step=00000010.ckpt")
    assert checkpoint.resolve(f"{run_dir}/checkpoints/best").endswith("step=00000010.ckpt")
    assert checkpoint.resolve(f"{run_dir}/checkpoints/last").endswith("step=00000025.ckpt")
    low = [Manifest("f", 1, "", 0, 0, s, "val/loss", "min", {"val/loss": v}) for s, v in ((1, 0.3), (2, 0.2))]
    assert [m.global_step for m in checkpoint.ranked(low)] == [2, 1]
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.resolve(run_dir + "/elsewhere")


def test_a_snapshot_is_not_changed_by_later_training(run_dir: str) -> None:
    """Training continues while the copy is written; its buffers are reused."""
    one = state(10)
    io = BackgroundCheckpointIO(upload_seconds=5)
    for step in (10, 20):
        one["state_dict"]["w"].fill_(step)
        one[MANIFEST_KEY]["global_step"] = step
        io.save_checkpoint(one, f"{run_dir}/checkpoints/epoch=000-step={step:08d}.ckpt")
        one["state_dict"]["w"].fill_(-1)
    io.wait()
    for manifest in checkpoint.manifests(run_dir):
        loaded = checkpoint.load(f"{run_dir}/checkpoints/{manifest.file}")
        assert loaded["state_dict"]["w"].unique().tolist() == [manifest.global_step]


@pytest.mark.parametrize("damage", ["truncated", "halved", "flipped", "no manifest", "manifest cut", "gone"])
def test_a_damaged_newest_checkpoint_falls_back_to_an_older_one(
    damage: str, run_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(run_dir, state(10), state(20))
    newest = Path(run_dir) / "checkpoints" / "epoch=000-step=00000020.ckpt"
    manifest = Path(str(newest) + ".json")
    content = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(content[:-1])
    elif damage == "halved":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        newest.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest cut":
        manifest.write_bytes(manifest.read_bytes()[:50])
    else:
        newest.unlink()
    verified = checkpoint.newest_verified(run_dir)
    assert verified is not None
    assert verified.global_step == 10
    if damage != "no manifest":  # that one was never finished: nothing went wrong
        assert "step=00000020" in caplog.text
    if damage in ("truncated", "halved", "flipped"):
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.load(str(newest))


def test_only_damaged_checkpoints_are_an_error(run_dir: str) -> None:
    assert checkpoint.newest_verified(run_dir) is None
    save(run_dir, state(10))
    (Path(run_dir) / "checkpoints" / "epoch=000-step=00000010.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoint.newest_verified(run_dir)


def test_a_failed_upload_is_raised_and_the_state_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("in the way")
    io = BackgroundCheckpointIO(upload_seconds=1)
    io.save_checkpoint(state(10), f"{tmp_path}/file/checkpoints/epoch=000-step=00000010.ckpt")
    with pytest.raises(StorageError, match="could not be saved") as excinfo:
        io.wait()
    kept = Path(str(excinfo.value).rpartition("kept in ")[2].rstrip("."))
    assert torch.load(kept, weights_only=True)["state_dict"]["w"][0] == 10
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    io.wait()  # raised once
    temporary.remove_all()
    temporary.delete_stale()
    assert kept.exists()


def test_nothing_is_written_without_the_lease(run_dir: str) -> None:
    """Neither the state nor, if the lease is lost during the upload, its manifest."""
    for allowed in (0, 1):
        calls: list[int] = []

        def check(allowed: int = allowed, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) > allowed:
                raise LeaseError("lost")

        io = BackgroundCheckpointIO(upload_seconds=5, before_write=check)
        io.save_checkpoint(state(10), f"{run_dir}/checkpoints/epoch=000-step=00000010.ckpt")
        with pytest.raises(LeaseError, match="lost"):
            io.wait()
        assert storage.exists(f"{run_dir}/checkpoints/epoch=000-step=00000010.ckpt") == bool(allowed)
        assert checkpoint.manifests(run_dir) == []


def test_nothing_is_deleted_without_the_lease(run_dir: str) -> None:
    save(run_dir, state(10), state(20), state(30))
    lost = lambda: (_ for _ in ()).throw(LeaseError("lost"))  # noqa: E731
    with pytest.raises(LeaseError, match="lost"):
        Retention(CheckpointSettings(keep_last=1, keep_best=0), run_dir, before_write=lost).remove_superseded()
    assert len(checkpoint.manifests(run_dir)) == 3


def test_an_unexpected_error_in_the_upload_thread_is_raised(run_dir: str) -> None:
    io = BackgroundCheckpointIO(upload_seconds=1, after_commit=lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    io.save_checkpoint(state(10), f"{run_dir}/checkpoints/epoch=000-step=00000010.ckpt")
    with pytest.raises(ZeroDivisionError):
        io.wait()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 2, "keep_best": 1}, [1, 5, 6]),
        ({"keep_last": 1, "keep_best": 2}, [1, 3, 6]),
        ({"keep_last": 1, "keep_best": 0, "keep_every_n_epochs": 2}, [2, 4, 6]),
    ],
)
def test_retention(options: dict[str, int], kept: list[int], run_dir: str) -> None:
    states = [state(10 * e, v, epoch=e) for e, v in enumerate((0.9, 0.2, 0.8, 0.3, 0.4, 0.5), start=1)]
    for one in states:
        one[MANIFEST_KEY]["batch"] = 0
    save(run_dir, *states)
    Retention(CheckpointSettings(**options), run_dir).remove_superseded()  # type: ignore[arg-type]
    assert [m.epoch for m in checkpoint.manifests(run_dir)] == kept
    assert checkpoint.uncommitted(run_dir) == []


def test_checkpoints_ls_verify_and_gc(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    save(run_dir, state(10, 0.5), state(20))
    checkpoints("ls", run_dir)
    assert "step=00000020" in capsys.readouterr().out
    checkpoints("verify", run_dir)
    storage.write_bytes(f"{run_dir}/checkpoints/epoch=000-step=00000099.ckpt", b"half")
    checkpoints("gc", run_dir)
    assert "1 leftover(s)" in capsys.readouterr().out
    assert len(checkpoint.manifests(run_dir)) == 2
    storage.write_bytes(f"{run_dir}/checkpoints/epoch=000-step=00000010.ckpt", b"other")
    with pytest.raises(CheckpointError, match="1 of 2 checkpoints are damaged"):
        checkpoints("verify", run_dir)


@pytest.mark.parametrize("version", ["2.0.0rc1", "1.9.5", "x", "2" * 200, None])
def test_a_checkpoint_that_lightning_would_migrate_is_refused(version: str | None) -> None:
    require_lightning_version("a.ckpt", {"pytorch-lightning_version": "2.0.0"})
    with pytest.raises(CheckpointError, match="pytorch-lightning_version"):
        require_lightning_version("a.ckpt", {"pytorch-lightning_version": version})


def test_a_set_that_training_changes_is_saved_as_it_was(tmp_path: Path) -> None:
    io = BackgroundCheckpointIO(upload_seconds=5)
    seen = set(range(300_000))
    uri = str(tmp_path / "checkpoints" / "epoch=000-step=00000001.ckpt")
    io.save_checkpoint({**state(1), "callbacks": {"Seen": {"seen": seen}}}, uri)
    seen.clear()
    io.wait()
    assert checkpoint.load(uri)["callbacks"]["Seen"]["seen"] == set(range(300_000))
