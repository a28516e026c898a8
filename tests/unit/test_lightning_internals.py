"""Contract of job.lightning_internals and job.torch_internals with the private API of Lightning and torch."""

from __future__ import annotations

import contextlib
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.profilers import SimpleProfiler
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from torch.nn.parallel import DistributedDataParallel

from job import lightning_internals as internals
from job import torch_internals
from job.monitoring.learning_rates import LearningRates
from job.monitoring.vertex import VertexMetricReporter


def trainer_of(folder: Path, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    fixed = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    counts = {"max_epochs": 2, "limit_train_batches": 4, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    return pl.Trainer(
        **{**fixed, **counts, "enable_checkpointing": False, "default_root_dir": folder, **settings},
        callbacks=list(callbacks),
    )


class Recorder(Callback):
    """Record the order of hooks."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.events.append(("batch end", trainer.fit_loop.batch_idx + 1))

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.events.append(("validated",))

    def between(self, trainer: pl.Trainer) -> None:
        batches, completed = (
            trainer.fit_loop.batch_idx + 1,
            trainer.fit_loop.epoch_loop.batch_progress.current.completed,
        )
        self.events.append(("between", internals.epochs_processed(trainer), batches, completed, trainer.global_step))


def test_step_hooks_run_after_a_steps_bookkeeping_and_before_the_next_batch(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = trainer_of(tmp_path, recorder, max_epochs=1, val_check_interval=2)
    internals.add_step_hooks(trainer, [recorder.between])
    trainer.fit(BoringModel())
    assert recorder.events == [
        ("between", 0, 0, 0, 0),
        ("batch end", 1),
        ("between", 0, 1, 1, 1),
        ("batch end", 2),
        ("validated",),
        ("between", 0, 2, 2, 2),
        ("batch end", 3),
        ("between", 0, 3, 3, 3),
        ("batch end", 4),
        ("validated",),
    ]


def test_the_loop_has_what_the_subclass_overrides(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    for method in ("advance", "on_advance_end", "_broadcast_sigterm_tensor"):
        assert callable(getattr(_TrainingEpochLoop, method))
    assert trainer.fit_loop.epoch_loop._skip_next_val is False
    assert trainer.fit_loop._restarting is False


def test_lightnings_signal_handlers_are_off(tmp_path: Path) -> None:
    class Handler(Callback):
        handler: Any = None

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.handler = signal.getsignal(signal.SIGTERM)

    before, with_handlers, without = signal.getsignal(signal.SIGTERM), Handler(), Handler()
    trainer_of(tmp_path, with_handlers).fit(BoringModel())
    assert with_handlers.handler is not before, "the work-around is no longer needed"
    trainer = trainer_of(tmp_path, without)
    internals.disable_signal_handlers(trainer)
    trainer.fit(BoringModel())
    assert without.handler is before


def test_each_step_of_a_restore_runs_within_the_context(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    saved = trainer_of(tmp_path, max_epochs=1)
    saved.fit(BoringModel())
    saved.save_checkpoint(path)
    steps: list[tuple[str, str, bool]] = []

    @contextlib.contextmanager
    def context(step: str, uri: str, checkpoint: dict[str, Any]) -> Iterator[None]:
        steps.append((step, uri, "state_dict" in checkpoint))
        yield

    trainer = trainer_of(tmp_path)
    internals.around_restore(trainer, context)
    trainer.fit(BoringModel(), ckpt_path=path, weights_only=True)
    assert [name for name, _, _ in steps] == list(internals.RESTORE_STEPS)
    assert all(uri == path and loaded for _, uri, loaded in steps)
    assert trainer.current_epoch == 2


def test_the_counters_of_a_checkpoint(tmp_path: Path) -> None:
    counters: list[tuple[int, int, int]] = []

    def note(trainer: pl.Trainer) -> None:
        counters.append(internals.loop_counters(trainer.fit_loop.state_dict()))

    trainer = trainer_of(tmp_path, accumulate_grad_batches=2)
    internals.add_step_hooks(trainer, [note])
    trainer.fit(BoringModel())
    assert counters == [(0, 0, 0), (0, 1, 0), (0, 2, 1), (0, 3, 1), (1, 0, 2), (1, 1, 2), (1, 2, 3), (1, 3, 3)]


def test_a_validation_marked_unfinished_is_run_again_and_the_steps_before_it_are_not(tmp_path: Path) -> None:
    class Save(Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(str(tmp_path / "x.ckpt"))

        def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
            internals.mark_validation_unfinished(checkpoint)

    trainer_of(tmp_path, Save(), max_epochs=1, val_check_interval=2).fit(BoringModel())
    recorder = Recorder()
    trainer = trainer_of(tmp_path, recorder, max_epochs=1, val_check_interval=2)
    internals.add_step_hooks(trainer, [recorder.between])
    trainer.fit(BoringModel(), ckpt_path=str(tmp_path / "x.ckpt"), weights_only=True)
    assert recorder.events[:3] == [("validated",), ("between", 0, 2, 2, 2), ("batch end", 3)]


def test_steps_that_are_logged(tmp_path: Path) -> None:
    due: list[bool] = []

    class Note(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            due.append(internals.logs_are_due(trainer))

    trainer_of(tmp_path, Note(), max_epochs=1, log_every_n_steps=2).fit(BoringModel())
    assert due == [False, True, False, True]


def test_strategies_that_start_processes() -> None:
    assert not internals.starts_processes(DDPStrategy())
    assert internals.starts_processes(DDPStrategy(start_method="spawn"))
    assert hasattr(DDPStrategy(), "_start_method")


def test_a_second_connection_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch_internals.connect_default_store().set("pulse", "1")
        assert dist.distributed_c10d._get_default_store().get("pulse") == b"1"
    finally:
        dist.destroy_process_group()


def test_ranks_broadcast_no_buffers_in_a_forward_pass() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network = DistributedDataParallel(torch.nn.BatchNorm1d(2), **torch_internals.without_buffer_broadcasts())
        assert not network.will_sync_module_buffers()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("value", "flagged"), [(1.0, 0.0), (float("nan"), 1.0), (float("-inf"), 1.0), (3e38, 0.0)])
def test_gradients_that_are_not_finite_are_flagged(value: float, flagged: float) -> None:
    tensors, flag = [torch.ones(3), torch.tensor([1.0, value])], torch.zeros(())
    before = [tensor.clone() for tensor in tensors]
    torch_internals.flag_not_finite(tensors, flag, torch.ones(()))
    assert flag.item() == flagged
    assert all(torch.equal(a, b) or value != value for a, b in zip(tensors, before, strict=True))


def test_resizing_into_memory_that_exists() -> None:
    image, out = torch.randint(256, (1, 3, 50, 70), dtype=torch.uint8), torch.zeros(2, 3, 20, 30, dtype=torch.uint8)
    torch_internals.resize_bytes(image, (20, 30), out[1:])
    expected = torch.nn.functional.interpolate(image, (20, 30), mode="bilinear", antialias=True)
    assert torch.equal(out[1:], expected)
    assert torch.equal(torch_internals.resize_bytes(image, (20, 30)), expected)
    assert not out[0].any()


def test_seconds_of_compiling() -> None:
    assert torch_internals.compile_seconds() >= 0


class Due(Callback):
    """Notes the steps whose logs are due, and whether they were for Lightning."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, bool, bool]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        lightnings = _LoggerConnector.should_update_logs.fget(trainer._logger_connector)  # type: ignore[attr-defined]
        self.steps.append((args[-1], internals.logs_are_due(trainer), lightnings))

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        lightnings = _LoggerConnector.should_update_logs.fget(trainer._logger_connector)  # type: ignore[attr-defined]
        assert internals.logs_are_due(trainer) == lightnings


@pytest.mark.parametrize(("interval", "accumulate"), [(0, 1), (1, 1), (2, 1), (2, 2), (3, 1), (100, 3)])
def test_logs_are_due_as_lightnings_are_and_at_the_last_step(interval: int, accumulate: int, tmp_path: Path) -> None:
    due = Due()
    trainer = trainer_of(tmp_path, due, log_every_n_steps=interval, accumulate_grad_batches=accumulate)
    internals.log_last_steps(trainer)
    trainer.fit(BoringModel())
    assert len(due.steps) == 8
    for batch, is_due, lightnings in due.steps:
        assert is_due == (lightnings or (interval > 0 and batch == 3))


def test_of_the_packages_callbacks_only_the_hooks_that_they_define_are_called(tmp_path: Path) -> None:
    class Profiler(SimpleProfiler):
        calls: ClassVar[list[str]] = []

        def start(self, action_name: str) -> None:
            self.calls.append(action_name)
            super().start(action_name)

    ours = [LearningRates(), VertexMetricReporter("val/loss")]
    trainer = trainer_of(tmp_path, *ours, max_epochs=1, profiler=Profiler())
    internals.skip_empty_hooks(trainer)
    trainer.fit(BoringModel())
    of_steps = {name for name in Profiler.calls if "[Callback]" in name and name.endswith(internals.HOOKS_OF_STEPS)}
    assert len(of_steps) == 1
    assert of_steps.pop().endswith("LearningRates.on_train_batch_start")
    assert [name for name in Profiler.calls if name.endswith("[Callback]VertexMetricReporter.on_train_start")]


def test_callbacks_of_others_keep_their_hooks(tmp_path: Path) -> None:
    class Calling(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            self.on_after_backward(*args[:2])

    callbacks = [Calling(), Callback(), EarlyStopping("x", strict=False)]
    before = [dict(vars(callback)) for callback in callbacks]
    internals.skip_empty_hooks(trainer_of(tmp_path, *callbacks))
    assert [dict(vars(callback)) for callback in callbacks] == before
    trainer_of(tmp_path, callbacks[0], max_epochs=1).fit(BoringModel())
