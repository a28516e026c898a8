"""What is checked of a fit before it waits for other nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from job import storage
from job.check.start import check
from job.data.datamodule import ImageDataModule
from job.errors import ConfigError, StorageError
from job.model.config import ModelConfig


def checked(data: str, run_dir: object, backbone: str = "resnet18", *, writes: bool = True) -> None:
    check(ModelConfig(backbone=backbone), ImageDataModule(root=data), str(run_dir), writes=writes)


def test_a_fit_that_can_start_leaves_nothing_behind(colours: Path, tmp_path: Path) -> None:
    checked(str(colours), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    checked(str(colours), tmp_path / "other", writes=False)
    assert not (tmp_path / "other").exists()


def test_a_wrong_backbone(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown backbone 'resnet-18'"):
        checked(str(colours), tmp_path, "resnet-18")


@pytest.mark.parametrize("data", ["/no/such/folder", "memory://no/such.zip", "/no/shard-{000..002}.tar"])
def test_data_that_are_not_there(data: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such bucket, object or folder"):
        checked(data, tmp_path)


def test_a_pattern_is_not_listed(tmp_path: Path) -> None:
    checked("/no/such/*.tar", tmp_path)


@pytest.mark.parametrize(("method", "accepted"), [("rm_file", True), ("pipe_file", False)])
def test_rights_to_run_dir(method: str, accepted: bool, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training does without the right to delete, and not without that to write."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(MemoryFileSystem, method, refuse)
    if accepted:
        checked(str(colours), "memory://rights/run")
        assert len(storage.list_files("memory://rights/run")) == 1
        return
    with pytest.raises(StorageError, match="memory://rights/run"):
        checked(str(colours), "memory://rights/run")
