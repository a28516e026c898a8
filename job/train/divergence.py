"""Stops a run whose loss, gradients or weights are not finite, before it saves them."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from job import storage
from job.cluster import ranks
from job.errors import DivergedError, StorageError
from job.model.module import TransferLearningModel
from job.train import checkpoint
from job.train.checkpoint_io import BackgroundCheckpointIO

log = logging.getLogger(__name__)

STEPS_BEHIND = 2
"""Steps on a GPU whose values are not fetched yet, so that neither it nor the host waits for the other."""
SCALER_PATIENCE = 40
"""Consecutive steps that a GradScaler may skip in search of its scale: 2**-40 of any scale is too small for a float."""


class DivergenceGuard(Callback):
    """Looks at the loss and the gradients of every step, and at the weights before every checkpoint.

    By ``--model.nonfinite`` it stops the run, or skips the step: its gradients are dropped, batch normalisation's
    statistics are those of before, and schedule and step number go on.

    Gradients are looked at once they are reduced over all ranks, so that all ranks decide alike without another
    collective. A loss that is not finite beside finite gradients (a sum that overflows) may be one rank's alone:
    several ranks compare theirs at the next validation or checkpoint. A CPU's values are looked at before the
    optimizer's update, a GPU's :data:`STEPS_BEHIND` steps later, XLA's before validations and checkpoints.

    Steps that a GradScaler skips (--trainer.precision=16-mixed) are counted, and are no divergence unless they are
    :data:`SCALER_PATIENCE` in a row.
    """

    def __init__(self) -> None:
        self._finding = ""
        self._consecutive = 0
        self._gradients: Tensor | None = None
        self._pending: deque[tuple[str, Tensor, torch.cuda.Event | None]] = deque()
        self._lost_on_xla: Tensor | None = None
        self._one = torch.ones(())
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._exempt: set[str] = set()
        self._scales = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which tensors are not finite by design, such as a mask of -inf."""
        self._exempt = set(_not_finite(pl_module.state_dict()))
        self._one = torch.ones((), device=pl_module.device)
        self._scales = getattr(trainer.precision_plugin, "scaler", None) is not None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the statistics that this step's forward pass changes, where a step may be skipped."""
        module = cast("TransferLearningModel", pl_module)
        if module.nonfinite == "skip" and batch_idx % trainer.accumulate_grad_batches == 0:
            changing = [b for m in module.net.modules() if m.training for b in m.buffers(recurse=False)]
            self._statistics = [(buffer, buffer.clone()) for buffer in changing]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the gradients, after their reduction and before they are clipped."""
        module = cast("TransferLearningModel", pl_module)
        module.step_skipped = False
        if module.device.type == "xla":
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flag = self._not_finite_flag(gradients)
        if module.nonfinite == "skip" or module.device.type == "cpu":
            self._decide(module, bool(flag), f"at {_place(trainer)}", optimizer)
        else:
            self._gradients = flag

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss, and at what a GPU has computed by now."""
        module = cast("TransferLearningModel", pl_module)
        if module.nonfinite == "skip" or "loss" not in outputs:
            return
        loss: Tensor = outputs["loss"]
        if loss.device.type == "cpu":
            if not math.isfinite(value := float(loss)):
                self._note_loss(value, f"at {_place(trainer)}")
        elif loss.device.type == "xla":
            lost = ~torch.isfinite(loss)
            self._lost_on_xla = lost if self._lost_on_xla is None else self._lost_on_xla | lost
        else:
            gradients = torch.zeros_like(self._one) if self._gradients is None else self._gradients
            values = torch.stack([gradients.float(), loss.float()])
            self._gradients, event = None, None
            if values.is_cuda:
                values, event = values.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            self._pending.append((f"at {_place(trainer)}", values, event))
            self._look(module, STEPS_BEHIND)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before a validation if any rank's loss was not finite."""
        self._look(cast("TransferLearningModel", pl_module), 0)
        self._raise_together()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save weights that are not finite; called on all ranks together."""
        self._look(cast("TransferLearningModel", pl_module), 0)
        if names := [name for name in _not_finite(checkpoint["state_dict"]) if name not in self._exempt]:
            others = f" and {len(names) - 1} other tensors" if len(names) > 1 else ""
            self._finding = self._finding or f"{names[0]}{others} held values that are not finite at {_place(trainer)}"
        self._raise_together()

    def _not_finite_flag(self, gradients: list[Tensor]) -> Tensor:
        """0 if all are finite, on their device."""
        flag = torch.zeros_like(self._one)
        by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient in gradients:
            by_type.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for (dtype, device), alike in by_type.items():
            if dtype in (torch.float32, torch.float16) and device.type in ("cpu", "cuda"):
                # GradScaler's kernel: one pass, ten times as fast as norms. It multiplies by 1.
                torch._amp_foreach_non_finite_check_and_unscale_(alike, flag, self._one)
            else:
                flag = flag + (~torch.isfinite(torch.nn.utils.get_total_norm(alike))).to(flag)
        return flag

    def _decide(self, module: TransferLearningModel, bad: bool, place: str, optimizer: Optimizer | None = None) -> None:
        """Stop or skip a step whose gradients are not finite."""
        if not bad:
            self._consecutive = 0
            return
        skips = module.nonfinite == "skip"
        if not skips and not self._scales:
            raise DivergedError(f"training diverged: the gradients were not finite {place}.")
        module.skipped_steps += 1
        self._consecutive += 1
        most = module.max_skipped_steps if skips else SCALER_PATIENCE
        if self._consecutive > most:
            raise DivergedError(
                f"training diverged: the gradients were not finite in {self._consecutive} consecutive steps, the last "
                f"{place}{f'; --model.max_skipped_steps allows {most}' if skips else ''}."
            )
        if skips and optimizer is not None:
            log.warning(
                "the gradients were not finite %s: the step is skipped, the %d. so far", place, module.skipped_steps
            )
            module.step_skipped = True
            optimizer.zero_grad(set_to_none=True)
            for buffer, before in self._statistics:
                buffer.copy_(before)

    def _note_loss(self, loss: float, place: str) -> None:
        self._finding = self._finding or f"the loss was {loss} {place}"
        if ranks.world_size() == 1:
            self._raise_together()

    def _look(self, module: TransferLearningModel, leave: int) -> None:
        """Fetch and judge the values of all but the last ``leave`` steps."""
        while len(self._pending) > leave:
            place, values, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            gradients, loss = values.tolist()
            self._decide(module, gradients != 0, place)
            if not math.isfinite(loss):
                self._note_loss(loss, place)
        if leave == 0 and self._lost_on_xla is not None:
            if bool(self._lost_on_xla):
                self._finding = self._finding or "the loss was not finite since the last checkpoint"
            self._lost_on_xla = None

    def _raise_together(self) -> None:
        """Raise on all ranks what any of them has found."""
        findings = ranks.union({self._finding} - {""})
        if findings:
            raise DivergedError(f"training diverged: {min(findings)}.")


def _place(trainer: pl.Trainer) -> str:
    rank = f", rank {trainer.global_rank}" if trainer.world_size > 1 else ""
    batch = trainer.fit_loop.epoch_loop.batch_idx
    return f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch}{rank})"


def _not_finite(state: dict[str, Any]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()}
    if not tensors:
        return []
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors.values()))])
    if bool(torch.isfinite(norms).all()):
        return []
    # A norm of finite values may overflow.
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


@contextlib.contextmanager
def last_checkpoint_named(run_dir: str, io: BackgroundCheckpointIO) -> Iterator[None]:
    """Add the last good checkpoint and the ways to go on to a :class:`~job.errors.DivergedError`.

    Raises:
        DivergedError: with all of it, the same on every rank.
    """
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"{error} {ranks.from_rank_zero(lambda: _advice(run_dir, io))}") from error


def _advice(run_dir: str, io: BackgroundCheckpointIO) -> str:
    try:
        io.wait()
        committed = checkpoint.manifests(run_dir)
    except StorageError as error:
        return f"Its checkpoints cannot be listed: {error}"
    change = "--trainer.gradient_clip_val=1, --trainer.precision=32-true or --model.nonfinite=skip"
    if not committed:
        return (
            f"There is no checkpoint yet. Start again with a lower learning rate (--model.optimizer), {change}; "
            "python -m job tune finds a learning rate."
        )
    uri = storage.join(run_dir, checkpoint.FOLDER, committed[-1].file)
    return (
        f"The last good checkpoint is {uri} (step {committed[-1].global_step}). The same command with {change} goes on "
        "from there. A lower learning rate (--model.optimizer) needs another --run_dir; "
        f"--model.weights={uri} starts it from these weights."
    )
