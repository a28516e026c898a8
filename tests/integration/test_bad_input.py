"""Users' mistakes: each ends with a message and exit code 2, without a traceback."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import torchvision
from support import TINY, options, picture, picture_files, run, scalars, write_files

from job import storage
from job.cli import main

pytestmark = pytest.mark.integration


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Function that runs the command line in this process, and returns its stderr."""

    def call(*args: object) -> str:
        monkeypatch.setattr("sys.argv", ["job"])
        with pytest.raises(SystemExit) as excinfo:
            main([str(arg) for arg in args])
        stderr = capsys.readouterr().err
        assert excinfo.value.code == 2, stderr
        assert "Traceback" not in stderr
        assert stderr.startswith("job: error: ") or "\njob: error: " in stderr
        # It would end this process, a notebook say, twenty minutes later.
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]
        return stderr

    return call


def fit(**changes: object) -> list[str]:
    return ["fit", *options(TINY, **changes)]


def test_no_such_bucket_or_prefix(fails, gcs: str, tmp_path: Path) -> None:
    for uri in ("gs://nowhere-to-be-found/data", f"{gcs}/no/such/prefix", str(tmp_path / "nothing")):
        assert f"{uri}: no such bucket, object or folder" in fails(*fit(data__root=uri, run_dir=tmp_path / "run"))


def test_permission_denied(fails, gcs_forbidden: str, tmp_path: Path) -> None:
    message = fails(*fit(data__root=f"{gcs_forbidden}/data", run_dir=tmp_path / "run"))
    assert "permission denied" in message
    assert "roles/storage.objectUser" in message


@pytest.fixture
def gcs_forbidden() -> str:
    """A bucket on a server that answers every request with 403, as GCS does without permission."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Forbidding(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"error": {"code": 403, "message": "job@x.iam does not have storage.objects.list access"}}'
            self.send_response(403)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    storage.use_gcs_emulator(f"http://127.0.0.1:{server.server_port}")
    storage.filesystem("gs://x")[0].clear_instance_cache()
    yield "gs://locked"
    server.shutdown()
    storage.filesystem("gs://x")[0].clear_instance_cache()
    if before:
        storage.use_gcs_emulator(before)
    else:
        del os.environ["STORAGE_EMULATOR_HOST"]


def test_empty_training_class(fails, colours: Path, tmp_path: Path) -> None:
    (colours / "green").mkdir()
    other = write_files(tmp_path / "val", picture_files(["blue", "green"], 2))
    message = fails(*fit(data__train=colours, data__val=other, run_dir=tmp_path / "run"))
    assert "2 image(s)" in message
    assert "class green" in message


def test_classes_that_differ(fails, colours: Path, tmp_path: Path) -> None:
    other = write_files(tmp_path / "val", picture_files(["blue", "green"], 2))
    message = fails(*fit(data__train=colours, data__val=other, run_dir=tmp_path / "run"))
    assert f"2 image(s) of {other} are of class green, of which {colours} has none; it has class red instead" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (picture((200, 40, 30), 1)[:400], "red/000.jpg is damaged"),
        (b"I am a text file", "red/000.jpg is no image of a known format"),
        (b"", "red/000.jpg is empty"),
    ],
)
def test_unreadable_image(fails, content: bytes, reason: str, colours: Path, tmp_path: Path) -> None:
    (colours / "red" / "000.jpg").write_bytes(content)
    message = fails(*fit(data__root=colours, run_dir=tmp_path / "run"))
    assert reason in message
    assert "--data.max_bad_samples" in message


def test_unreadable_images_within_the_limit_are_left_out(colours: Path, tmp_path: Path) -> None:
    (colours / "red" / "000.jpg").write_bytes(b"text")
    result = run(*fit(data__root=colours, run_dir=tmp_path / "run", data__max_bad_samples=1), processes=2)
    assert result.returncode == 0, result.stderr
    assert f"bad sample: {colours}/red/000.jpg" in result.stderr
    assert f"{colours}/red/000.jpg" in (tmp_path / "run" / "report.json").read_text()
    assert [count for _, count in scalars(str(tmp_path / "run"))["data/bad_samples"]] == [1.0] * 3


def test_damaged_archive(fails, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK no zip at all")
    message = fails(
        *fit(data__root=tmp_path / "data.zip", run_dir=tmp_path / "run", data__cache_dir=tmp_path / "cache")
    )
    assert f"{tmp_path}/data.zip is not a readable archive" in message


def test_unknown_backbone(fails, colours: Path, tmp_path: Path) -> None:
    message = fails(*fit(data__root=colours, run_dir=tmp_path / "run", model__backbone="resnet_50"))
    assert "unknown backbone 'resnet_50'. Did you mean resnet50" in message


def test_weights_of_another_architecture(fails, colours: Path, tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    message = fails(*fit(data__root=colours, run_dir=tmp_path / "run", model__weights=tmp_path / "w.pth"))
    assert "do not fit the backbone timm/test_resnet" in message


def test_weights_that_cannot_be_downloaded(fails, colours: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    settings = {"model__backbone": "resnet18", "model__weights": "DEFAULT"}
    message = fails(*fit(data__root=colours, run_dir=tmp_path / "run", **settings))
    assert "Give --model.weights the URI of a state dict" in message


def test_batch_size_that_does_not_divide(colours: Path, tmp_path: Path) -> None:
    result = run(*fit(data__root=colours, run_dir=tmp_path / "run", data__global_batch_size=9), processes=2)
    assert result.returncode != 0
    assert "--data.global_batch_size 9 does not divide over 2 processes. Choose 8 or 10." in result.stderr


def test_run_dir_that_cannot_be_written(fails, colours: Path) -> None:
    assert "/proc/run" in fails(*fit(data__root=colours, run_dir="/proc/run"))


def test_misspelt_option(fails, colours: Path, tmp_path: Path) -> None:
    message = fails("fit", "--data.root", colours, "--run_dir", tmp_path, "--model.backbon", "resnet18")
    assert "Did you mean --model.backbone?" in message


def test_misspelt_key_in_a_file(fails, colours: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data:\n  global_batchsize: 4\n")
    message = fails("fit", "--config", tmp_path / "c.yaml", "--data.root", colours, "--run_dir", tmp_path / "run")
    assert "Did you mean --data.global_batch_size?" in message


def test_misspelt_command(fails) -> None:
    assert "unknown command 'fti'. Did you mean fit?" in fails("fti")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__val_fraction": 1.5}, "--data.val_fraction must be above 0.0 and below 1.0"),
        ({"model__milestones": "[5,2]"}, "--model.milestones must be at most two epochs in rising order"),
        ({"checkpoint__keep_last": 0}, "--checkpoint.keep_last must be at least 1"),
        ({"checkpoint__monitor": "val/acuracy"}, "Give --checkpoint.mode max or --checkpoint.mode min"),
        (
            {"checkpoint__monitor": "val/acuracy", "checkpoint__mode": "max"},
            "'val/acuracy' is not logged. There are: val/accuracy",
        ),
        ({"data__image_size": "large"}, "data.image_size"),
        ({"data__global_batch_size": 1, "model__milestones": "[]"}, "cannot learn from 1 images per process"),
        ({"trainer__devices": 2}, "trainer.devices"),
        ({"resume": "must"}, "holds no checkpoint"),
        ({"data__val": "/tmp"}, "--data.root already says where validation"),
    ],
)
def test_invalid_values(fails, changes: dict[str, object], message: str, colours: Path, tmp_path: Path) -> None:
    assert message in fails(*fit(data__root=colours, run_dir=tmp_path / "run", **changes))


def test_predict_without_a_checkpoint(fails, colours: Path, tmp_path: Path) -> None:
    assert "Is this the run_dir of a fit?" in fails("predict", "--ckpt", tmp_path, "--input", colours)
    (tmp_path / "x.ckpt").write_bytes(b"not a checkpoint")
    assert "x.ckpt cannot be loaded safely" in fails("predict", "--ckpt", tmp_path / "x.ckpt", "--input", colours)


def test_help_and_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    for args, text in ((["--help"], "fit"), (["fit", "--help"], "--batch_size")):
        main(args)
        assert text in capsys.readouterr().out
    with pytest.raises(SystemExit) as excinfo:
        main(["fit", "--help-all"])
    assert excinfo.value.code == 0
    assert "--data.global_batch_size" in capsys.readouterr().out
    with pytest.raises(SystemExit) as excinfo:
        main(["fit", "--data.root", "x", "--run_dir", "y", "--print_config"])
    assert excinfo.value.code == 0
    assert "global_batch_size: 32" in capsys.readouterr().out
