"""Every use of Lightning's private API, held to pytorch-lightning 2.6 in setup.cfg.

Each function says why no public hook does, with its place in Lightning's source.
``tests/unit/test_lightning_internals.py`` fails where a release changes what they rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.precision.amp import _optimizer_handles_unscaling
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from pytorch_lightning.trainer.states import RunningStage
from torch.optim import Optimizer

StepHook = Callable[[pl.Trainer], None]
RestoreContext = Callable[[str, str, dict[str, Any]], AbstractContextManager[None]]
HOOKS_OF_STEPS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end"),
)
RESTORE_STEPS = ("restore_model", "restore_datamodule", "restore_callbacks", "restore_training_state")


def add_step_hooks(trainer: pl.Trainer, hooks: Sequence[StepHook]) -> None:
    """Call ``hooks`` after each step's bookkeeping and before the next batch is fetched.

    ``on_train_batch_end`` comes before the step is counted and logged, ``on_train_batch_start`` after the next batch is
    counted: a checkpoint taken in either misses an event or a step (loops/training_epoch_loop.py, ``advance``).
    """
    trainer.fit_loop.epoch_loop = TrainingEpochLoop(trainer, hooks)


class TrainingEpochLoop(_TrainingEpochLoop):
    """Lightning's training loop with the hooks of :func:`add_step_hooks`."""

    def __init__(self, trainer: pl.Trainer, hooks: Sequence[StepHook]) -> None:
        super().__init__(trainer)
        self._hooks = tuple(hooks)

    def advance(self, data_fetcher: Any) -> None:
        """One step; or, on the first call after a resume, what the loaded checkpoint left to do."""
        # Lightning holds "restarting" until the epoch ends, and would leave out ReduceLROnPlateau's step there
        # (loops/fit_loop.py, ``on_advance_end``).
        self.trainer.fit_loop._restarting = False
        if not self.restarting:
            for hook in self._hooks:
                hook(self.trainer)
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: Any) -> None:
        """End a step, unless the loaded checkpoint was taken after its end: Lightning would count it twice."""
        if self._skip_next_val:
            self._skip_next_val = False
            return
        super().on_advance_end(data_fetcher)

    def _broadcast_sigterm_tensor(self) -> None:
        """Do nothing: Lightning blocks on a broadcast before each step, :mod:`job.resilience.flags` does not."""


def disable_signal_handlers(trainer: pl.Trainer) -> None:
    """Keep Lightning's SIGTERM handler from running a collective on the rank that was signalled alone.

    https://github.com/Lightning-AI/pytorch-lightning/issues/20806
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def around_restore(trainer: pl.Trainer, context: RestoreContext) -> None:
    """Run each of :data:`RESTORE_STEPS`, in this order, within ``context(step, path, checkpoint)``.

    Their errors have any type, and nothing public tells them from those of training; the first public hook comes after
    the module has been restored (trainer/connectors/checkpoint_connector.py).
    """
    connector = trainer._checkpoint_connector

    def wrapped(step: str, restore: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            with context(step, str(connector._ckpt_path), connector._loaded_checkpoint):
                restore()

        return call

    for step in RESTORE_STEPS:
        setattr(connector, step, wrapped(step, getattr(connector, step)))


def epochs_processed(trainer: pl.Trainer) -> int:
    """Epochs trained; ``current_epoch`` counts one later, after loader processes of the next have begun to fetch."""
    progress: Any = trainer.fit_loop.epoch_progress
    return int(progress.current.processed)


def logs_are_due(trainer: pl.Trainer) -> bool:
    """Whether Lightning will write this step's values: a value that it would drop need not be reduced over ranks."""
    return trainer._logger_connector.should_update_logs


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the batch that trains now, by the number of batches, which all ranks know alike.

    Lightning decides it after the batch (loops/training_epoch_loop.py, ``_should_check_val_fx``).
    """
    by_time: Any = trainer
    if by_time._val_check_time_interval is not None:
        return False
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(None))  # type: ignore[arg-type]


def log_last_steps(trainer: pl.Trainer) -> None:
    """Let Lightning also write the values of the last step of each epoch.

    It asks for them at every ``log_every_n_steps``-th step alone (trainer/connectors/logger_connector).
    """
    trainer._logger_connector.__class__ = LoggerConnector


class LoggerConnector(_LoggerConnector):
    """Lightning's connector with the rule of :func:`log_last_steps`."""

    @property
    def should_update_logs(self) -> bool:
        """Whether values of this step are written."""
        trainer: Any = self.trainer
        if trainer.state.stage is not RunningStage.TRAINING:
            return super().should_update_logs
        # Lightning's property takes 5 µs, and is read several times in a step of 1 ms.
        loop, interval = trainer.fit_loop.epoch_loop, trainer.log_every_n_steps
        is_last = loop.batch_progress.is_last_batch or trainer.should_stop
        return bool(interval > 0 and (is_last or (loop._batches_that_stepped + 1) % interval == 0))


def skip_empty_hooks(trainer: pl.Trainer) -> None:
    """Do not call the hooks of a step that a callback of this package does not define.

    Lightning calls each within a profiler's context, which takes 2 µs: of 18 callbacks 0.2 ms per step. It passes over
    an attribute that is not callable (trainer/call.py, ``_call_callback_hooks``). Callbacks of others stay as they are:
    their owner may use them again, or call ``super()``.
    """
    own = [each for each in trainer.callbacks if type(each).__module__.startswith("job.")]  # type: ignore[attr-defined]
    for callback in own:
        for hook in HOOKS_OF_STEPS:
            if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
                setattr(callback, hook, None)


def gradient_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Factor of the gradients before an optimizer step: that of a GradScaler, if the optimizer itself divides by it.

    Lightning divides for other optimizers (plugins/precision/amp.py, ``optimizer_step``).
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and _optimizer_handles_unscaling(optimizer) else 1.0


def starts_processes(strategy: Strategy) -> bool:
    """Whether a DDP strategy forks or spawns its ranks, which the launcher has started already."""
    return getattr(strategy, "_start_method", "popen") != "popen"


def loop_counters(fit_loop: dict[str, Any]) -> tuple[int, int, int]:
    """Epochs trained, batches of the next one, and optimizer steps, in a fit loop's checked ``state_dict()``."""
    return (
        fit_loop["epoch_progress"]["current"]["processed"],
        fit_loop["epoch_loop.batch_progress"]["current"]["ready"],
        fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"],
    )


def mark_validation_unfinished(checkpoint: dict[str, Any]) -> None:
    """Let a run that resumes from ``checkpoint`` validate from the first batch (loops/evaluation_loop.py)."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    for count in ("total", "current"):
        progress[count].update(ready=1, started=1, processed=0, completed=0)
    progress["is_last_batch"] = False
