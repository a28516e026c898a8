"""Options and callbacks in --help work for two steps and a resume; others are refused."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import callbacks
from support import TINY, options, run_here

from job.config.reserved import RESERVED
from job.config.trainer_options import _SUPPORTED_CALLBACKS

pytestmark = pytest.mark.integration

SHORT = {**TINY, "trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1}
ARGUMENTS: dict[type, dict[str, Any]] = {
    callbacks.EarlyStopping: {"monitor": "val/loss", "patience": 9},
    callbacks.GradientAccumulationScheduler: {"scheduling": {0: 2}},
    callbacks.LambdaCallback: {"on_fit_start": "test_options.nothing"},
    callbacks.ThroughputMonitor: {"batch_size_fn": "test_options.batch_size"},
}


def nothing(*args: Any) -> None:
    """A hook."""


def batch_size(batch: Any) -> int:
    """For ThroughputMonitor."""
    return len(batch["label"])


def works(colours: Path, tmp_path: Path, **changes: object) -> None:
    for epochs in (1, 2):
        settings = {"data__root": colours, "run_dir": tmp_path / "run", "trainer__max_epochs": epochs, **changes}
        outcome = run_here("fit", *options(SHORT, **settings))
        assert outcome.returncode == 0, outcome.output
        assert "Traceback" not in outcome.output
    assert "resuming after step" in outcome.output


@pytest.mark.parametrize("kind", _SUPPORTED_CALLBACKS, ids=lambda kind: kind.__name__)
def test_callbacks_that_help_lists(kind: type, colours: Path, tmp_path: Path) -> None:
    if kind is callbacks.DeviceStatsMonitor and importlib.util.find_spec("psutil") is None:
        pytest.skip("it needs psutil on a CPU")
    entry = {"class_path": f"pytorch_lightning.callbacks.{kind.__name__}", "init_args": ARGUMENTS.get(kind, {})}
    works(colours, tmp_path, trainer__callbacks=json.dumps([entry]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "bf16-mixed"),
        ("precision", "64-true"),
        ("gradient_clip_algorithm", "value"),
        ("val_check_interval", 1),
        ("check_val_every_n_epoch", 2),
        ("detect_anomaly", "true"),
        ("profiler", "simple"),
        ("max_time", "00:01:00:00"),
        ("log_every_n_steps", 0),
    ],
)
def test_options_that_help_lists(name: str, value: object, colours: Path, tmp_path: Path) -> None:
    works(colours, tmp_path, **{f"trainer__{name}": value})


def callback(name: str, **arguments: object) -> str:
    return json.dumps([{"class_path": f"pytorch_lightning.callbacks.{name}", "init_args": arguments}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__accelerator": "gpu"}, "No supported gpu backend"),
        ({"trainer__accelerator": "abacus"}, "trainer.accelerator"),
        ({"trainer__strategy": "fsdp"}, "--trainer.strategy fsdp is not supported"),
        ({"trainer__strategy": "deepspeed_stage_2"}, "--trainer.strategy deepspeed_stage_2 is not supported"),
        ({"trainer__strategy": "ddp_spawn"}, "--trainer.strategy ddp_spawn is not supported"),
        ({"trainer__strategy": "pytorch_lightning.strategies.FSDPStrategy"}, "FSDPStrategy is not supported"),
        ({"trainer__precision": "16-true"}, "trainer.precision"),
        ({"trainer__val_check_interval": 100}, "val_check_interval"),
        ({"trainer__val_check_interval": 0}, "--trainer.val_check_interval must be above 0"),
        ({"trainer__check_val_every_n_epoch": 0}, "--trainer.check_val_every_n_epoch must be at least 1"),
        ({"trainer__gradient_clip_val": 1, "trainer__gradient_clip_algorithm": "bogus"}, "bogus is invalid"),
        ({"trainer__gradient_clip_val": -1}, "--trainer.gradient_clip_val must be at least 0"),
        ({"trainer__accumulate_grad_batches": 0}, "--trainer.accumulate_grad_batches must be at least 1"),
        ({"trainer__max_epochs": 0}, "--trainer.max_epochs must be at least 1"),
        ({"trainer__max_epochs": -5}, "--trainer.max_epochs must be at least 1"),
        ({"trainer__min_epochs": 9}, "--trainer.min_epochs 9 is above"),
        ({"trainer__max_time": "soon"}, "not a valid duration"),
        ({"trainer__max_time": "00:00:00:00"}, "leaves no time to train"),
        ({"trainer__limit_train_batches": 0}, "trains nothing"),
        ({"trainer__limit_train_batches": 1.5}, "limit_train_batches"),
        ({"trainer__profiler": "xl"}, "profiler"),
        ({"seed_everything": "true"}, "seed_everything"),
        ({"seed_everything": -1}, "--seed_everything must be a whole number"),
        ({"trainer__callbacks": callback("BackboneFinetuning")}, "layers are unfrozen at --model.milestones"),
        (
            {"trainer__callbacks": callback("LearningRateFinder")},
            "LearningRateFinder is not supported: python -m job tune",
        ),
        ({"trainer__callbacks": callback("BatchSizeFinder")}, "BatchSizeFinder is not supported: python -m job tune"),
        ({"trainer__callbacks": callback("ModelCheckpoint")}, "ModelCheckpoint is not supported"),
        (
            {"trainer__callbacks": callback("ModelPruning", pruning_fn="l1_unstructured")},
            "ModelPruning is not supported",
        ),
        ({"trainer__callbacks": callback("StochasticWeightAveraging", swa_lrs=0.1)}, "--model.ema"),
        ({"trainer__callbacks": callback("Timer", duration="00:01:00:00")}, "--trainer.max_time"),
        ({"trainer__callbacks": callback("EarlyStopping", monitor="val/loss", mode="median")}, "mode"),
        ({"trainer__callbacks": '[{"class_path": "job.monitoring.report.Report"}]'}, "Report"),
        *(({f"trainer__{name}": "null"}, name) for name in ("plugins", "max_steps", "fast_dev_run")),
    ],
    ids=lambda value: " ".join(map(str, value.items()))[:60] if isinstance(value, dict) else None,
)
def test_options_that_are_refused(changes: dict[str, object], message: str, colours: Path, tmp_path: Path) -> None:
    outcome = run_here("fit", *options(SHORT, **{"data__root": colours, "run_dir": tmp_path / "run", **changes}))
    assert outcome.returncode == 2, outcome.output
    assert message in outcome.output
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_help_lists_only_supported_options() -> None:
    text = "".join(run_here("fit", "--help-all").output.split())
    for name in ("BackboneFinetuning", "ModelPruning", "FSDPStrategy", "DeepSpeed", "LBFGS", "16-true", "job.train."):
        assert name not in text
    for kind in _SUPPORTED_CALLBACKS:
        assert f"pytorch_lightning.callbacks.{kind.__name__}" in text
    assert "--trainer.max_epochs" in text
    assert not [name for name in RESERVED if re.search(rf"--trainer\.{name}(?![a-z_])", text)]
