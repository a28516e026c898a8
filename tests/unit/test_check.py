"""What is checked of a fit before it waits for other nodes."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file
from support import fit_here

from job import cli, storage
from job.check import access
from job.check.start import check
from job.data.datamodule import ImageDataModule
from job.errors import CheckpointError, ConfigError, JobError, StorageError
from job.model.config import ModelConfig


def checked(data: str, run_dir: object, backbone: str = "resnet18", *, writes: bool = True, **options: str) -> None:
    config = ModelConfig(backbone=backbone, weights=options.pop("weights", "DEFAULT"))
    check(config, ImageDataModule(root=data), str(run_dir), writes=writes, **options)


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


@pytest.mark.parametrize("pattern", ["/no/such/*.tar", "memory://no/such/shard-??.tar", "{folder}/*.zip"])
def test_a_pattern_that_nothing_matches(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "shard-0.tar").touch()
    with pytest.raises(StorageError, match="nothing matches"):
        checked(pattern.format(folder=tmp_path), tmp_path)
    checked(f"{tmp_path}/*.tar", tmp_path / "run")


def test_a_listing_of_minutes_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    monkeypatch.setattr(storage, "glob", lambda pattern: stop.wait(60))
    monkeypatch.setattr(access, "PATTERN_SECONDS", 0.1)
    checked("/many/*.tar", tmp_path)
    stop.set()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files of weights: two that can be read, and others."""
    folder = tmp_path_factory.mktemp("weights")
    state = {"weight": torch.zeros(3)}
    torch.save(state, folder / "good.pth")
    save_file(state, folder / "good.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:20])
    (folder / "page.pth").write_text("<html>Sign in</html>")
    (folder / "empty.pth").touch()
    (folder / "run").mkdir()
    return folder


@pytest.mark.parametrize("name", ["good.pth", "good.safetensors"])
def test_weights_that_can_be_read(name: str, weights: Path, colours: Path, tmp_path: Path) -> None:
    checked(str(colours), tmp_path / "run", weights=str(weights / name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.pth", "absent.pth: no such bucket, object or folder"),
        ("cut.safetensors", "is not a file of tensors, or is cut off"),
        ("page.pth", "is not a file of tensors"),
        ("empty.pth", "is not a file of tensors"),
        ("run", "no checkpoint"),
    ],
)
def test_weights_that_cannot(name: str, message: str, weights: Path, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=message):
        checked(str(colours), tmp_path / "run", weights=str(weights / name))
    if name == "run":
        with pytest.raises(CheckpointError, match="--init_from"):
            checked(str(colours), tmp_path / "run", init_from=str(weights / name))


@pytest.mark.parametrize("verb", ["fit", "tune", "validate", "test", "predict"])
def test_commands_that_are_launched(
    verb: str, trained: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is there, one that is not, and a misspelt option."""
    arguments = {
        "predict": [f"--input={colours}", f"--output={tmp_path / 'out'}"],
    }.get(verb, [f"--data.root={colours}"])
    good = [verb, f"--run_dir={trained}", *arguments]
    assert cli.check_start(good, writes=True) == 0, capsys.readouterr().err
    bad = [verb, f"--run_dir={tmp_path / 'none'}", *arguments]
    if verb in ("validate", "test", "predict"):
        assert cli.check_start(bad, writes=False) == 2
        assert str(tmp_path / "none") in capsys.readouterr().err
    assert cli.check_start([argument.replace(str(colours), "/no/such") for argument in good], writes=False) == 2
    assert "/no/such: no such bucket, object or folder" in capsys.readouterr().err
    assert cli.check_start([*good, "--nonsense=1"], writes=False) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run_dir of a finished run."""
    return fit_here(tmp_path_factory.mktemp("trained"), trainer__max_epochs=1)


@pytest.mark.parametrize(("method", "accepted"), [("rm_file", True), ("pipe_file", False)])
def test_rights_to_run_dir(method: str, accepted: bool, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training does without the right to delete, and not without that to write."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(MemoryFileSystem, method, refuse)
    run_dir = f"memory://{uuid.uuid4().hex}/run"
    if accepted:
        checked(str(colours), run_dir)
        assert len(storage.list_files(run_dir)) == 1
        return
    with pytest.raises(StorageError, match=run_dir):
        checked(str(colours), run_dir)
