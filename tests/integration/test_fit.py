"""Training in real processes, from a GCS server and back to it."""

from __future__ import annotations

import collections
import contextlib
import gzip
import io
import itertools
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import (
    COLOURS,
    TINY,
    environment,
    final_weights,
    free_port,
    options,
    picture,
    picture_files,
    run,
    run_well,
    scalars,
    write_files,
)

import job
from job import checkpoint, storage

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("fitted")]

EPOCHS = 12
STEPS = list(range(EPOCHS * 4))  # 32 of 40 images train, 8 a batch


@pytest.fixture(scope="module")
def fitted(gcs: str, gcs_colours: str) -> str:
    """run_dir in the bucket, of a run of 2 processes."""
    settings = options(TINY, data__root=gcs_colours, run_dir=f"{gcs}/fitted", trainer__max_epochs=EPOCHS)
    run_well("fit", *settings, processes=2)
    return f"{gcs}/fitted"


def test_every_logged_step_is_in_the_bucket(fitted: str) -> None:
    curves = scalars(fitted)
    assert [step for step, _ in curves["train/loss"]] == STEPS
    assert [step for step, _ in curves["lr/head"]] == STEPS
    assert [step for step, _ in curves["val/accuracy"]] == STEPS[3::4]
    assert {"val/loss", "val/f1", "val/auroc", "val/accuracy_of/blue", "wall_time/goodput"} <= curves.keys()


def test_tensorboard_reads_the_bucket(fitted: str) -> None:
    port = free_port()
    server = subprocess.Popen(
        # Its fast loader, written in Rust, knows the real GCS and no emulator.
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--load_fast=false",
            f"--logdir={fitted}/tensorboard",
            f"--port={port}",
        ],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        query = urllib.parse.urlencode({"run": ".", "tag": "train/loss"})
        points: list[list[float]] = []
        for _ in range(400):
            time.sleep(1)
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?{query}"
                points = json.load(urllib.request.urlopen(url))
                if len(points) == len(STEPS):
                    break
    finally:
        server.terminate()
        server.wait()
    assert [step for _, step, _ in points] == STEPS


def test_the_report_and_the_resolved_configuration(fitted: str) -> None:
    report = json.loads(storage.read_bytes(f"{fitted}/report.json"))
    assert (report["world_size"], report["epochs"], report["global_step"]) == (2, EPOCHS, len(STEPS))
    assert report["classes"] == ["blue", "red"]
    assert report["images"] == {"train": 32, "val": 8}
    assert sum(map(sum, report["confusion_matrix"]["counts"])) == 8
    last, best = (report["checkpoints"][which]["metrics"] for which in ("last", "best"))
    assert last["val/accuracy"] == scalars(fitted)["val/accuracy"][-1][1]
    assert report["metrics"] == best
    assert best["val/accuracy"] == max(value for _, value in scalars(fitted)["val/accuracy"])
    assert 0 < report["seconds"]["goodput"] < 1
    assert min(report["seconds"].values()) > -0.1  # nothing is counted twice
    assert sum(v for k, v in report["seconds"].items() if k not in ("goodput", "wall")) == pytest.approx(
        report["seconds"]["wall"]
    )
    config = storage.read_bytes(f"{fitted}/config.yaml").decode()
    assert "backbone: timm/test_resnet" in config


def test_tune_suggests_a_learning_rate_and_a_batch_size(gcs: str, gcs_colours: str) -> None:
    """Two processes take 60 steps over 16 epochs and write one file; the printed options are accepted."""
    run_dir = f"{gcs}/tuned-{uuid.uuid4().hex}"
    settings = {**TINY, "data.root": gcs_colours, "run_dir": run_dir, "model.milestones": "[]"}
    stdout = run_well("tune", *options(settings), "--lr_finder.steps=60", processes=2).stdout
    results = json.loads(storage.read_bytes(f"{run_dir}/tune.json"))
    assert 20 <= len(results["losses"]) == len(results["rates"]) <= 60
    assert results["rates"][0] == pytest.approx(1e-6)
    assert 1e-5 < results["lr"] < 0.5
    assert results["global_batch_size_at_most"] % 16 == 0
    assert not checkpoint.manifests(run_dir)
    chosen = re.findall(r"^  (--\S+) '?(.*?)'?$", stdout, re.MULTILINE)
    assert [name for name, _ in chosen] == ["--model.lr", "--data.global_batch_size"]
    arguments = [word for pair in chosen for word in pair]
    refused = run("fit", *options(settings), *arguments, "--trainer.max_epochs=1", "--data.root=gs://none")
    assert "gs://none" in refused.stderr  # the options were read


def test_predicting_from_the_bucket(fitted: str, gcs: str) -> None:
    for name in ("blue", "red"):
        for n in range(6):
            storage.write_bytes(f"{gcs}/new/{name}{n}.jpg", picture(COLOURS[name], 9000 + n))
    options = ["--ckpt", fitted, "--input", f"{gcs}/new", "--precision", "fp32"]
    result = run_well("predict", *options, "--output", f"{gcs}/predictions.jsonl")
    assert f"{gcs}/new/blue0.jpg" in result.stdout
    lines = [json.loads(line) for line in storage.read_bytes(f"{gcs}/predictions.jsonl").splitlines()]
    assert len(lines) == 12
    assert all(sum(line["probabilities"].values()) == pytest.approx(1) for line in lines)
    correct = [line["label"] in line["uri"].rpartition("/")[2] for line in lines]
    assert sum(correct) >= 11
    assert {line["label"] for line in lines} == {"blue", "red"}  # one logit, two answers

    predictor = job.load(fitted)
    assert predictor.classes == ("blue", "red")
    predictions = predictor.predict([f"{gcs}/new/red1.jpg", picture(COLOURS["red"], 9001)])
    by_uri = {line["uri"]: line["probabilities"] for line in lines}
    for prediction in predictions:
        assert prediction.probabilities == pytest.approx(by_uri[f"{gcs}/new/red1.jpg"], abs=1e-5)

    run_well("predict", *options, "--output", f"{gcs}/averaged.jsonl", "--tta", "hflip")
    averaged = [json.loads(line) for line in storage.read_bytes(f"{gcs}/averaged.jsonl").splitlines()]
    predictor = job.load(fitted, tta="hflip")
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(picture(COLOURS["red"], 9001))))).permute(2, 0, 1)
    one, flipped = predictor.predict([image]), predictor.predict([image.flip(-1)])
    assert one[0].probabilities == pytest.approx(flipped[0].probabilities, abs=1e-5)
    assert {line["uri"]: line["probabilities"] for line in averaged} != by_uri


def test_checkpoints_commands(fitted: str) -> None:
    table = run_well("checkpoints", "ls", fitted).stdout
    assert "epoch=012-step=00000048.ckpt" in table
    assert "good" in run_well("checkpoints", "verify", fitted).stdout
    assert "0 leftover(s)" in run_well("checkpoints", "gc", fitted).stdout


def test_validate_reproduces_the_metrics(fitted: str) -> None:
    run_well("validate", "--run_dir", fitted, "--ckpt", f"{fitted}/checkpoints/last", processes=2)
    repeated = json.loads(storage.read_bytes(f"{fitted}/validate.json"))["metrics"]
    metrics = json.loads(storage.read_bytes(f"{fitted}/report.json"))["checkpoints"]["last"]["metrics"]
    assert repeated == pytest.approx(metrics, rel=1e-5)
    run_well("validate", fitted, "--tta", "hflip")
    averaged = json.loads(storage.read_bytes(f"{fitted}/validate.json"))["metrics"]
    assert averaged["val/loss"] != pytest.approx(metrics["val/loss"], rel=1e-4)
    assert averaged["val/loss"] == pytest.approx(metrics["val/loss"], abs=0.1)


def test_fit_of_a_finished_run_changes_nothing(fitted: str) -> None:
    before = final_weights(fitted)
    result = run_well("fit", "--config", f"{fitted}/config.yaml", processes=2)
    assert "Finished" in result.stdout
    after = final_weights(fitted)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [step for step, _ in scalars(fitted)["train/loss"]] == STEPS


def test_resume_never_refuses_an_existing_run(fitted: str) -> None:
    result = run("fit", "--config", f"{fitted}/config.yaml", "--resume=never")
    assert result.returncode == 2
    assert "--resume is never" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__global_batch_size": 4}, "data.global_batch_size was 8, is 4"),
        ({"model__hidden": "[9]"}, "hidden was [8], is [9]"),
        ({"model__optimizer": "torch.optim.SGD"}, "model.optimizer was Adam"),
    ],
)
def test_resuming_with_other_settings_is_refused(fitted: str, changes: dict[str, object], message: str) -> None:
    settings = {**changes, "trainer__max_epochs": EPOCHS + 1}
    result = run("fit", "--config", f"{fitted}/config.yaml", *options({}, **settings))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_resuming_with_other_images_is_refused(gcs: str, fitted: str, gcs_colours: str) -> None:
    for entry in storage.list_files(gcs_colours):
        if not entry.is_dir:
            storage.write_bytes(f"{gcs}/more/{entry.key}", storage.read_bytes(f"{gcs_colours}/{entry.key}"))
    storage.write_bytes(f"{gcs}/more/red/new.jpg", picture(COLOURS["red"], 1))
    result = run("fit", "--config", f"{fitted}/config.yaml", "--data.root", f"{gcs}/more", "--trainer.max_epochs=13")
    assert result.returncode == 2
    assert "data.train was 32 images" in result.stderr


def test_checkpoints_between_validations_have_no_metrics(colours: Path, tmp_path: Path) -> None:
    settings = {**TINY, "trainer.check_val_every_n_epoch": 2, "checkpoint.keep_last": 9, "checkpoint.every_n_steps": 3}
    result = run_well("fit", *options(settings, data__root=colours, run_dir=tmp_path / "run"))
    manifests = checkpoint.manifests(str(tmp_path / "run"))
    assert [(m.epoch, m.global_step) for m in manifests if m.metrics] == [(2, 8)]
    assert [m.global_step for m in manifests] == [3, 4, 6, 8, 9, 12]
    assert "accuracy" in result.stdout
    off = run_well("fit", *options(TINY, data__root=colours, run_dir=tmp_path / "off", trainer__limit_val_batches=0))
    assert "Finished" in off.stdout


def test_other_data_sets_and_optimizers_by_configuration(tmp_path: Path, colours: Path) -> None:
    """Environment variables, a YAML file and flags; early stopping, SGD, step-wise cosine; a third class."""
    from support import picture_files, write_files

    write_files(colours, picture_files(["green"], 20))
    config = tmp_path / "config.yaml"
    config.write_text(
        "model:\n"
        "  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}\n"
        "  lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 30}}\n"
        "  lr_interval: step\n"
        "trainer:\n"
        "  callbacks:\n"
        "    - class_path: pytorch_lightning.callbacks.EarlyStopping\n"
        "      init_args: {monitor: val/loss, patience: 1, min_delta: 100.0}\n"
    )
    run_well(
        "fit",
        "--config",
        config,
        *options(TINY, data__root=colours, trainer__max_epochs=9),
        JOB_RUN_DIR=str(tmp_path / "run"),
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["epochs"] == 2  # stopped: no improvement by 100
    assert report["classes"] == ["blue", "green", "red"]
    rates = [value for _, value in scalars(str(tmp_path / "run"))["lr/head"]]
    assert rates[0] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_profile_breaks_down_a_step(gcs: str, gcs_colours: str) -> None:
    run_dir = f"{gcs}/profile-{uuid.uuid4().hex}"  # a finished run would not be profiled once more
    settings = options(TINY, data__root=gcs_colours, run_dir=run_dir, model__milestones="[]", data__global_batch_size=4)
    result = run_well("fit", *settings, "--profile", processes=2)
    (breakdown,) = [line for line in result.stderr.splitlines() if "a step takes" in line]
    names = ("data wait", "forward", "backward", "optimizer", "checkpoint", "other")
    shares = [int(re.search(rf"{name} [\d.]+ \((\d+)%\)", breakdown)[1]) for name in names]  # type: ignore[index]
    assert 97 <= sum(shares) <= 103
    assert float(re.search(r"within them ([\d.]+) ms of communication", breakdown)[1]) > 0  # type: ignore[index]
    traces = [file.key for file in storage.list_files(f"{run_dir}/profile")]
    assert sorted(key.split("-")[0] for key in traces) == ["rank0", "rank1"]
    for key in traces:
        events = json.loads(gzip.decompress(storage.read_bytes(f"{run_dir}/profile/{key}")))["traceEvents"]
        names_found = {event.get("name") for event in events}
        assert {"aten::conv2d", "aten::mkldnn_convolution"} & names_found
        assert any("allreduce" in str(name) or "all_reduce" in str(name) for name in names_found)


@pytest.mark.parametrize("changes", [{"model.milestones": "[]"}, {"features.use": "always"}], ids=["all", "features"])
def test_a_step_waits_for_no_other_rank_between_logs(changes: dict[str, object], tmp_path: Path) -> None:
    """By torch's profiler: gradients are reduced, and flags beside the step; nothing else is fetched or exchanged."""
    data = write_files(tmp_path / "data", picture_files(["blue", "red"], 48))
    settings = options({**TINY, "model.milestones": "[1]", "data.global_batch_size": 4, **changes}, data__root=data)
    run_dir, fewer = tmp_path / "run", ("--trainer.max_epochs=1", "--trainer.log_every_n_steps=99")
    run_well("fit", *settings, f"--run_dir={run_dir}", "--profile", *fewer, processes=2)
    for trace in (run_dir / "profile").iterdir():
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        steps = [event for event in events if str(event.get("name")).startswith("Optimizer.step#")]
        updates = [
            (event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "aten::_fused_adam_"
        ]
        assert len(steps) == 10
        assert updates
        count = collections.Counter(
            event["name"]
            for event in events
            # On a CPU, the update itself reads the number of each parameter's steps.
            if event.get("ph") == "X" and not any(begin <= event["ts"] <= end for begin, end in updates)
        )
        exchanged = {name: number for name, number in count.items() if name.startswith("c10d::")}
        assert set(exchanged) == {"c10d::allreduce_"}
        buckets = 1 if "features.use" in changes else 2
        assert exchanged["c10d::allreduce_"] <= (buckets + 1) * len(steps)
        # The guard reads two values on a CPU, whose values are there; on a GPU it reads those of earlier steps.
        assert count["aten::_local_scalar_dense"] == 2 * len(steps)
