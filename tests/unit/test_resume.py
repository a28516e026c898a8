"""Going back to the best checkpoint, and training for longer than first planned."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, Outcome, assert_same_weights, options, run_here, scalars

from job import checkpoint
from job.checkpoint import abandoned
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.manifest import kept_metrics
from job.checkpoint.resume import Resume, ResumePoint, StepBackWriter, resume_point
from job.checkpoint.retention import Retention
from job.checkpoint.settings import CheckpointSettings
from job.checkpoint.state import MANIFEST_KEY
from job.errors import CheckpointError, JobError, NewerFormatError

KEEP = CheckpointSettings(monitor="val/accuracy", keep_last=2)


class Run:
    """A run that saves checkpoints without training; each attempt has the configuration of its command."""

    def __init__(self, run_dir: Path, settings: CheckpointSettings = KEEP) -> None:
        self.run_dir = str(run_dir)
        self.settings = settings
        self.step = 0
        self.io = BackgroundCheckpointIO()

    def start(self, how: Resume = "best", configuration: str = "a", *, trains: bool = True) -> ResumePoint | None:
        point = resume_point(self.run_dir, how, configuration)
        self.step = point.manifest.global_step if point else 0
        self.io = BackgroundCheckpointIO(5, after_commit=Retention(self.settings, self.run_dir).remove_superseded)
        if point and point.step_back and trains:
            StepBackWriter(None)._write(self.run_dir, point.step_back)
        return point

    def save(self, accuracy: float | None) -> None:
        self.step += 1
        metrics = {} if accuracy is None else {"val/accuracy": accuracy}
        facts = {"epoch": self.step, "batch": 0, "global_step": self.step, "monitor": "val/accuracy", "mode": "max"}
        state = {
            "state_dict": {"w": torch.tensor(accuracy or 0.0)},
            MANIFEST_KEY: {**facts, "metrics": kept_metrics(metrics, "val/accuracy")},
        }
        self.io.save_checkpoint(state, f"{self.run_dir}/checkpoints/epoch={self.step:03d}-step={self.step:08d}.ckpt")
        self.io.wait()

    @property
    def steps(self) -> list[int]:
        return [manifest.global_step for manifest in checkpoint.manifests(self.run_dir)]

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in Path(self.run_dir, "checkpoints").iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.start("auto")
    for accuracy in (0.5, 0.9, 0.8, 0.7):
        run.save(accuracy)
    return run


def test_later_checkpoints_are_abandoned_and_deleted_after_the_next_one(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    assert run.steps == [2, 3, 4]
    point = run.start()
    assert point is not None
    assert run.steps == [2]
    assert "2 later checkpoint(s) are abandoned" in caplog.text
    assert "epoch=004-step=00000004.ckpt" in run.files  # until there is another one
    assert checkpoint.resolve(f"{run.run_dir}/checkpoints/last").endswith("step=00000002.ckpt")
    run.save(0.6)
    assert run.steps == [2, 3]
    assert "epoch=003-step=00000003-2.ckpt" in run.files  # a name of its own
    assert not any("step=00000004" in name or name.endswith("3.ckpt") for name in run.files)


def test_a_restart_with_the_same_options_does_not_go_back_again(run: Run) -> None:
    run.start()
    for accuracy in (0.6, 0.95, 0.7):
        run.save(accuracy)
        step = run.step
        assert run.start().manifest.global_step == step  # type: ignore[union-attr]
    assert run.start("best", "b").manifest.global_step == 4  # type: ignore[union-attr]
    assert run.steps == [4]
    run.save(0.5)
    assert run.start("auto").manifest.global_step == 5  # type: ignore[union-attr]
    assert checkpoint.resolve(run.run_dir).endswith("step=00000004-2.ckpt")


def test_the_same_holds_where_the_best_is_the_newest(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start("auto")
    run.save(0.9)
    run.start()
    run.save(0.8)
    assert run.start().manifest.global_step == 2  # type: ignore[union-attr]


def test_a_start_that_is_rejected_before_training_abandons_nothing(run: Run) -> None:
    assert run.start(trains=False).manifest.global_step == 2  # type: ignore[union-attr]
    assert run.steps == [2, 3, 4]


def test_deleting_the_file_undoes_the_step_back(run: Run) -> None:
    run.start()
    Path(run.run_dir, "checkpoints/abandoned-001.json").unlink()
    assert run.steps == [2, 3, 4]


def test_checkpoints_to_keep_for_ever_stay_though_abandoned(tmp_path: Path) -> None:
    run = Run(tmp_path, CheckpointSettings(monitor="val/accuracy", keep_last=1, keep_every_n_epochs=3))
    run.start("auto")
    for accuracy in (0.9, 0.8, 0.7, 0.6):
        run.save(accuracy)
    run.start()
    run.save(0.5)
    assert run.steps == [1, 2]
    assert [name for name in run.files if name.endswith(".ckpt")] == [
        "epoch=001-step=00000001.ckpt",
        "epoch=002-step=00000002.ckpt",
        "epoch=003-step=00000003.ckpt",
    ]


def test_a_damaged_best_checkpoint_falls_back_to_the_next_best(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    Path(run.run_dir, "checkpoints/epoch=002-step=00000002.ckpt").write_bytes(b"x")
    assert run.start().manifest.global_step == 3  # type: ignore[union-attr]
    assert "trying the next best" in caplog.text


@pytest.mark.parametrize("validated", [False, True])
def test_no_best_checkpoint_is_an_error(validated: bool, tmp_path: Path) -> None:
    run = Run(tmp_path)
    if validated:
        run.start("auto")
        run.save(None)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint with a validation\. Use --resume=auto"):
        run.start()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", CheckpointError),
        ("[]", CheckpointError),
        ('{"configuration":"0","resumed":"x","abandoned":[],"format":1}', CheckpointError),
        (
            f'{{"configuration":"{0:064d}","resumed":"epoch=001-step=00000001.ckpt","abandoned":["../../x.ckpt"]}}',
            CheckpointError,
        ),
        ('{"format":2}', NewerFormatError),
    ],
)
def test_a_damaged_file_is_named(run: Run, content: str, error: type[JobError]) -> None:
    Path(run.run_dir, "checkpoints", "abandoned-001.json").write_text(content)
    with pytest.raises(error, match=r"abandoned-001\.json"):
        run.start("auto")


def test_a_further_file_replaces_none_where_an_earlier_one_was_deleted() -> None:
    assert abandoned.next_file_name([]) == "abandoned-001.json"
    assert abandoned.next_file_name(["abandoned-002.json", "last.ckpt", "x/abandoned-007.json"]) == "abandoned-003.json"


@pytest.mark.parametrize("seed", range(12))
def test_no_sequence_of_kills_and_restarts_loses_more_than_one_step_back(seed: int, tmp_path: Path) -> None:
    """Restarts with unchanged options never return to an earlier checkpoint than the newest one of their own."""
    draw = random.Random(seed)
    run = Run(tmp_path / "run")
    run.start("auto")
    run.save(0.5)
    configuration, how, newest = 0, "auto", run.step
    for _ in range(40):
        action = draw.choice(["save", "save", "save", "restart", "restart", "killed early", "other command"])
        if action == "save":
            run.save(draw.choice([None, round(draw.random(), 2)]))
        elif action == "other command":
            configuration, how = configuration + 1, draw.choice(["auto", "best"])
            run.start(how, str(configuration), trains=False)  # type: ignore[arg-type]
            run.start(how, str(configuration))  # type: ignore[arg-type]
        else:
            point = run.start(how, str(configuration), trains=action == "restart")  # type: ignore[arg-type]
            assert point is not None
            assert point.step_back is None
            assert point.manifest.global_step == newest
        newest = run.step


def fit(tmp_path: Path, colours: Path, name: str = "run", **changes: object) -> Outcome:
    fixed = {"run_dir": tmp_path / name, "data__cache_dir": tmp_path / "cache", "data__num_workers": 0}
    ranking = {"checkpoint__monitor": "val/loss", "checkpoint__mode": "max", "checkpoint__keep_last": 9}
    frozen = {"features__use": "never", "model__milestones": "[9]"}
    return run_here("fit", *options(TINY, data__root=colours, **frozen, **fixed, **ranking, **changes))


def report(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    return content


def test_a_run_goes_back_to_its_best_checkpoint_and_goes_on_as_if_it_had_ended_there(
    tmp_path: Path, colours: Path
) -> None:
    """The best is the first: the highest loss."""
    run_dir, reference = tmp_path / "run", tmp_path / "reference"
    assert fit(tmp_path, colours, trainer__max_epochs=3).returncode == 0
    assert fit(tmp_path, colours, "reference", trainer__max_epochs=1).returncode == 0
    clipped = {"trainer__max_epochs": 3, "trainer__gradient_clip_val": 0.01}
    assert fit(tmp_path, colours, "reference", **clipped).returncode == 0
    refused = fit(tmp_path, colours, **clipped, resume="best", model__label_smoothing=0.1)
    assert "cannot go on from its checkpoint: model.label_smoothing" in refused.output
    assert len(checkpoint.manifests(str(run_dir))) == 3

    back = fit(tmp_path, colours, **clipped, resume="best")
    assert back.returncode == 0, back.output
    assert "resuming after step 4, epoch 1" in back.output
    assert_same_weights(str(run_dir), str(reference))
    mine, other = scalars(str(run_dir)), scalars(str(reference))
    for tag in ("train/loss", "val/loss", "val/accuracy"):
        assert mine[tag] == other[tag]
    assert [record["metrics"] for record in report(run_dir)["history"]] == [
        record["metrics"] for record in report(reference)["history"]
    ]
    names = [manifest.file for manifest in checkpoint.manifests(str(run_dir))]
    assert names == [f"epoch={n:03d}-step={4 * n:08d}{'-2' if n > 1 else ''}.ckpt" for n in (1, 2, 3)]

    checkpoint.remove(f"{run_dir}/checkpoints/{names[-1]}")  # killed before it was saved
    again = fit(tmp_path, colours, **clipped, resume="best")
    assert "resuming after step 8, epoch 2" in again.output
    assert "with these options the run went back to epoch=001-step=00000004.ckpt before" in again.output
    assert_same_weights(str(run_dir), str(reference))


def test_more_epochs_than_first_planned_continue_the_run(tmp_path: Path, colours: Path) -> None:
    patience = {"early_stopping": 2}
    assert fit(tmp_path, colours, trainer__max_epochs=2, **patience).returncode == 0
    assert report(tmp_path / "run")["planned_epochs"] == 2
    longer = fit(tmp_path, colours, trainer__max_epochs=3, **patience)
    assert longer.returncode == 0, longer.output
    assert "resuming after step 8, epoch 2" in longer.output
    assert (
        "early stopping after epoch 3" in longer.output
    )  # epochs 2 and 3 are not better than 1: counted over attempts
    content = report(tmp_path / "run")
    assert (content["planned_epochs"], content["epochs"], content["status"]) == (3, 3, "finished")
    assert [record["epoch"] for record in content["history"]] == [1, 2, 3]
    fewer = fit(tmp_path, colours, trainer__max_epochs=2, **patience)
    assert fewer.returncode == 2
    assert "has trained 3 epochs, and --trainer.max_epochs is 2. Use at least 3 to continue it" in fewer.output
    assert report(tmp_path / "run") == content


def test_a_schedule_as_long_as_the_run_is_not_stretched(tmp_path: Path, colours: Path) -> None:
    cosine = {"class_path": "CosineAnnealingLR", "init_args": {"T_max": "auto"}}
    settings = {"model__lr_scheduler": json.dumps(cosine)}
    assert fit(tmp_path, colours, trainer__max_epochs=1, **settings).returncode == 0
    refused = fit(tmp_path, colours, trainer__max_epochs=2, **settings)
    assert refused.returncode == 2
    assert "model.lr_scheduler was CosineAnnealingLR" in refused.output
    assert "is not stretched, so that a longer training is a new run" in refused.output
    assert f"--init_from={tmp_path}/run starts that from these weights" in refused.output
    started = fit(tmp_path, colours, "new", trainer__max_epochs=1, init_from=tmp_path / "run", **settings)
    assert started.returncode == 0, started.output
    assert "2 of 2 classes taken over" in started.output
