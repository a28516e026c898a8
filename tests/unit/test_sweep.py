"""A sweep from images to a checkpoint that predict takes and a recipe that fit takes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import yaml
from support import FROZEN, fit_here, options, picture_files, run_here, write_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.sweep.crossvalidation import gathered
from job.sweep.result import SweepResult

SETTINGS: dict[str, object] = {
    **FROZEN,
    "lr": "0.003,0.03",
    "weight_decay": "0",
    "hidden": "none,8",
    "label_smoothing": "0",
    "folds": 3,
    "epochs": 3,
    "sweep.logged": 2,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("images"), picture_files(["blue", "red"], 20))


def test_sweep_predict_fit(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = run_here("sweep", *options(SETTINGS, data__root=images, run_dir=run_dir, dropout="0,0.1"))
    assert result.returncode == 0, result.output
    assert "best of 8 trials, 3-fold cross-validation" in result.output
    folder = run_dir / "sweep"
    saved = msgspec.json.decode((folder / "sweep.json").read_bytes(), type=SweepResult)
    assert len(saved.trials) == 8
    means = [trial.mean for trial in saved.trials if trial.mean is not None]
    assert means == sorted(means, reverse=True)
    assert saved.train_images == 32
    assert saved.validation["accuracy"] is not None
    assert sorted(path.name for path in (folder / "tensorboard").iterdir()) == ["001", "002"]
    events = EventAccumulator(str(folder / "tensorboard" / "001"))
    events.Reload()
    assert events.Scalars("cv/accuracy")[0].value == pytest.approx(means[0])

    validated = run_here("validate", folder)
    assert validated.returncode == 0, validated.output
    metrics = json.loads((folder / "validate.json").read_text())["metrics"]
    assert metrics["val/accuracy"] == pytest.approx(saved.validation["accuracy"])
    assert metrics["val/loss"] == pytest.approx(saved.validation["loss"], rel=1e-4)

    predicted = run_here("predict", folder, images, f"--output={tmp_path / 'out.jsonl'}")
    assert predicted.returncode == 0, predicted.output
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 40

    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["model"]["optimizer"]["init_args"]["lr"] == saved.trials[0].lr
    fitted = run_here("fit", tmp_path / "fit", f"--config={folder / 'recipe.yaml'}", f"--init_from={folder}")
    assert fitted.returncode == 0, fitted.output

    anew = run_here("fit", tmp_path / "anew", f"--config={folder / 'recipe.yaml'}")
    assert anew.returncode == 0, anew.output
    last = json.loads((tmp_path / "anew" / "report.json").read_text())["history"][-1]["metrics"]
    assert last["val/loss"] == pytest.approx(saved.validation["loss"], rel=1e-4)
    assert last["val/accuracy"] == pytest.approx(saved.validation["accuracy"])


def test_a_second_sweep_replaces_the_first(images: Path, tmp_path: Path) -> None:
    for learning_rates, trials in (("0.003,0.03", 2), ("0.01", 1)):
        arguments = options({**SETTINGS, "lr": learning_rates, "hidden": "none"}, data__root=images)
        result = run_here("sweep", *arguments, "--run_dir", tmp_path)
        assert result.returncode == 0, result.output
        assert len(list((tmp_path / "sweep" / "tensorboard").rglob("events.*"))) == trials
        assert len(list((tmp_path / "sweep" / "checkpoints").glob("*.ckpt"))) == 1


def test_ranks_wait_for_one_another_while_heads_are_trained(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a collective operation, which ends the job after 20 minutes."""
    events: list[str] = []

    class Barrier:
        def tick(self) -> None:
            events.append("heads")

        def wait(self) -> None:
            events.append("wait")

    def gathered_(scores: Any) -> Any:
        events.append("gather")
        return gathered(scores)

    def from_rank_zero(function: Callable[[Any], str], perform: object) -> str:
        return function(SimpleNamespace(tick=lambda: events.append("best head")))

    monkeypatch.setattr("job.sweep.run.ProgressBarrier", Barrier)
    monkeypatch.setattr("job.sweep.run.gathered", gathered_)
    monkeypatch.setattr("job.sweep.run.from_rank_zero", from_rank_zero)
    result = run_here("sweep", *options(SETTINGS, data__root=images, run_dir=tmp_path / "run"))
    assert result.returncode == 0, result.output
    assert [kind for kind, _ in itertools.groupby(events)] == ["heads", "wait", "gather", "best head"]
    assert events.count("heads") == 2 * events.count("best head")  # a block per shape, of all trials and folds


def test_several_labels(tmp_path: Path) -> None:
    pictures = write_files(tmp_path / "images", picture_files(["blue", "red"], 20))
    tables = []
    for part, numbers in (("train", range(12)), ("val", range(12, 20))):
        rows = [
            {"uri": str(pictures / name / f"{number:03d}.jpg"), "label": [name, *["even"] * (number % 2 == 0)]}
            for number in numbers
            for name in ("blue", "red")
        ]
        rows[0]["label"] = []
        tables.append(tmp_path / f"{part}.jsonl")
        tables[-1].write_text("\n".join(map(json.dumps, rows)))
    data = {"data__train": tables[0], "data__val": tables[1], "model__task": "multilabel", "run_dir": tmp_path / "run"}
    result = run_here("sweep", *options(SETTINGS, **data, class_weights="none,balanced"))
    assert result.returncode == 0, result.output
    folder = tmp_path / "run" / "sweep"
    saved = msgspec.json.decode((folder / "sweep.json").read_bytes(), type=SweepResult)
    assert (saved.metric, len(saved.trials)) == ("mAP", 8)
    assert run_here("validate", folder).returncode == 0
    metrics = json.loads((folder / "validate.json").read_text())["metrics"]
    assert metrics["val/mAP"] == pytest.approx(saved.validation["mAP"])


def test_several_backbones_and_an_unreadable_image(tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", picture_files(["blue", "red"], 20))
    for name in ("blue", "red"):
        (images / name / "003.jpg").write_bytes(b"no image")
    several = options(
        SETTINGS, data__root=images, run_dir=tmp_path / "run", model__backbone="timm/test_resnet,timm/test_efficientnet"
    )
    result = run_here("sweep", *several, "--data.max_bad_samples=2")
    assert result.returncode == 0, result.output
    saved = msgspec.json.decode((tmp_path / "run" / "sweep" / "sweep.json").read_bytes(), type=SweepResult)
    assert {trial.backbone for trial in saved.trials} == {"timm/test_resnet", "timm/test_efficientnet"}
    assert saved.repeated_images == 0


def test_run_dir_of_a_fit(tmp_path: Path) -> None:
    run_dir = fit_here(tmp_path)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["data"]["augment"] = {"class_path": "torchvision.transforms.v2.RandomErasing"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    result = run_here("sweep", run_dir, "--folds=2", "--epochs=2", "--lr=0.01", "--hidden=none")
    assert result.returncode == 0, result.output
    assert "data.augment" in result.output
    recipe = yaml.safe_load((run_dir / "sweep" / "recipe.yaml").read_text())
    assert recipe["model"]["backbone"] == "timm/test_resnet"
    assert recipe["model"]["weights"] == "none"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.lr=0.1", "--model.lr has no effect in a sweep. Use --sweep.lr"),
        ("--trainer.max_epochs=3", "Use --sweep.epochs"),
        ("--model.mixup=0.2", "--model.mixup has no effect in a sweep"),
        ("--lr=0.1,x", "'x' is no number"),
        ("--folds=17", "--sweep.folds=16"),
        ("--data.num_workers=-1", "--data.num_workers must be at least 0"),
        ("--data.sampling=balanced", "does not support --data.sampling=balanced"),
    ],
)
def test_mistakes(images: Path, tmp_path: Path, option: str, message: str) -> None:
    result = run_here("sweep", *options(SETTINGS, data__root=images, run_dir=tmp_path / "run"), option)
    assert result.returncode == 2
    assert message in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("backbones", "weights", "message"),
    [
        ("timm/test_resnet,timm/test_resnets", "none", "unknown backbone 'timm/test_resnets'"),
        ("timm/test_resnet,timm/test_vit", "none,nowhere.pth", "nowhere.pth"),
    ],
)
def test_mistakes_in_the_second_backbone_come_first(
    images: Path, tmp_path: Path, backbones: str, weights: str, message: str
) -> None:
    several = options(SETTINGS, data__root=images, run_dir=tmp_path / "run", model__backbone=backbones)
    result = run_here("sweep", *several, f"--model.weights={weights}")
    assert result.returncode == 2
    assert message in result.output.replace("\n", " ")
    assert "computing the backbone's features" not in result.output


def test_one_class(tmp_path: Path) -> None:
    root = write_files(tmp_path / "images", picture_files(["blue"], 20))
    result = run_here("sweep", *options(SETTINGS, data__root=root, run_dir=tmp_path / "run"))
    assert result.returncode == 2
    assert "class" in result.output
