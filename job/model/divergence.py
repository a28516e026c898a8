"""Detection of divergence: stop a run, or skip steps, whose loss, gradients or weights are not finite."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from job.cluster import ranks
from job.errors import DivergedError
from job.torch_internals import flag_not_finite

log = logging.getLogger(__name__)

STEPS_BEHIND = 2
"""Latest steps on a GPU whose values are not fetched yet, so that the host does not wait for the GPU."""
SCALER_PATIENCE = 40
"""Consecutive steps that a GradScaler may skip while it searches its scale; 40 halvings exhaust any scale."""


class DivergenceGuard:
    """Checks the loss and the gradients of each step, and the weights before each checkpoint.

    It stops the run, or skips the step: gradients are dropped, the running statistics of batch normalisation are
    restored, and schedule and step number advance. The module calls it in its hooks, because the overhead of a
    callback is larger than that of the checks.

    Gradients are checked after their reduction over all ranks, so that all ranks decide alike without another
    collective. A loss can be non-finite on one rank only, with finite gradients (a sum that overflows): ranks compare
    their losses at the next validation or checkpoint. Values on a CPU are checked before the optimizer's update, values
    on a GPU :data:`STEPS_BEHIND` steps later. On XLA, which would compile each check into the step, only weights are
    checked, before each checkpoint.

    Steps that a GradScaler skips (--trainer.precision=16-mixed) are counted. They are a divergence if
    :data:`SCALER_PATIENCE` consecutive steps are skipped.

    Args:
        nonfinite: "stop" or "skip".
        max_skipped_steps: consecutive steps that may be skipped.

    Attributes:
        skipped_steps: number of steps skipped by a GradScaler or by "skip".
        step_skipped: "skip" has skipped the last step.
    """

    def __init__(self, nonfinite: Literal["stop", "skip"], max_skipped_steps: int) -> None:
        self.nonfinite = nonfinite
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        self.step_skipped = False
        self._finding = ""
        self._consecutive = 0
        self._gradients: Tensor | None = None
        self._pending: deque[tuple[str, Tensor, torch.cuda.Event | None]] = deque()
        self._one = torch.ones(())
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._exempt: set[str] = set()
        self._scales = False

    def start(self, trainer: pl.Trainer, module: nn.Module) -> None:
        """Exempt tensors that are not finite by design, such as a mask of -inf."""
        self._exempt = set(_not_finite(module.state_dict()))
        self._one = torch.ones((), device=trainer.strategy.root_device)
        self._scales = getattr(trainer.precision_plugin, "scaler", None) is not None

    def before_forward(self, network: nn.Module) -> None:
        """Save the running statistics, which the forward passes of an optimizer step change, if it may be skipped."""
        if self.nonfinite == "skip":
            changing = [b for m in network.modules() if m.training for b in m.buffers(recurse=False)]
            self._statistics = [(buffer, buffer.clone()) for buffer in changing]

    def before_update(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Check the gradients, after their reduction and before they are clipped."""
        self.step_skipped = False
        device = self._one.device.type
        if device == "xla":
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flag = self._not_finite_flag(gradients)
        if self.nonfinite == "skip" or device == "cpu":
            if bool(flag):
                self._handle_bad_gradients(_place(trainer), optimizer)
            else:
                self._consecutive = 0
        else:
            self._gradients = flag

    def after_batch(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Check the loss, and the values of earlier steps on a GPU."""
        if self.nonfinite == "skip":
            return
        if loss.device.type == "cpu":
            if not math.isfinite(value := float(loss)):
                self._handle_bad_loss(value, _place(trainer))
        elif loss.device.type != "xla":
            gradients = torch.zeros_like(self._one) if self._gradients is None else self._gradients
            values = torch.stack([gradients.float(), loss.float()])
            self._gradients, event = None, None
            if values.is_cuda:
                values, event = values.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            self._pending.append((_place(trainer), values, event))
            self._fetch(STEPS_BEHIND)

    def before_validation(self) -> None:
        """Stop before a validation if any rank's loss was not finite; called on all ranks together."""
        self._fetch(0)
        self._raise_together()

    def before_save(self, trainer: pl.Trainer, state: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite; called on all ranks together."""
        self._fetch(0)
        if names := [name for name in _not_finite(state) if name not in self._exempt]:
            others = f" and {len(names) - 1} other tensors" if len(names) > 1 else ""
            self._finding = self._finding or f"{names[0]}{others} held values that are not finite at {_place(trainer)}"
        self._raise_together()

    def _not_finite_flag(self, gradients: list[Tensor]) -> Tensor:
        """A scalar on their device: 0 if all gradients are finite."""
        flag = torch.zeros_like(self._one)
        by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient in gradients:
            by_type.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for (dtype, device), alike in by_type.items():
            if dtype in (torch.float32, torch.float16) and device.type in ("cpu", "cuda"):
                flag_not_finite(alike, flag, self._one)
            else:
                flag = flag + (~torch.isfinite(torch.nn.utils.get_total_norm(alike))).to(flag)
        return flag

    def _handle_bad_gradients(self, place: str, optimizer: Optimizer | None = None) -> None:
        """Stop the run, or skip the step, whose gradients are not finite."""
        skips = self.nonfinite == "skip"
        if not skips and not self._scales:
            raise DivergedError(f"training diverged: the gradients were not finite at {place}.")
        self.skipped_steps += 1
        self._consecutive += 1
        most = self.max_skipped_steps if skips else SCALER_PATIENCE
        if self._consecutive > most:
            raise DivergedError(
                f"training diverged: the gradients were not finite in {self._consecutive} consecutive steps, the last "
                f"at {place}{f'; --model.max_skipped_steps allows {most}' if skips else ''}."
            )
        if optimizer is not None and skips:
            log.warning(
                "the gradients were not finite at %s: the step is skipped (%d so far)", place, self.skipped_steps
            )
            self.step_skipped = True
            optimizer.zero_grad(set_to_none=True)
            for buffer, before in self._statistics:
                buffer.copy_(before)

    def _handle_bad_loss(self, loss: float, place: str) -> None:
        self._finding = self._finding or f"the loss was {loss} at {place}"
        if ranks.world_size() == 1:
            self._raise_together()

    def _fetch(self, leave: int) -> None:
        """Fetch and check the values of all but the last ``leave`` steps."""
        while len(self._pending) > leave:
            place, values, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            gradients, loss = values.tolist()
            if gradients:
                self._handle_bad_gradients(place)
            else:
                self._consecutive = 0
            if not math.isfinite(loss):
                self._handle_bad_loss(loss, place)

    def _raise_together(self) -> None:
        """Raise the same error on all ranks if any of them has a finding."""
        findings = ranks.union({self._finding} - {""})
        if findings:
            raise DivergedError(f"training diverged: {min(findings)}.")


def _place(trainer: pl.Trainer) -> str:
    rank = f", rank {trainer.global_rank}" if trainer.world_size > 1 else ""
    batch = trainer.fit_loop.batch_idx
    return f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch}{rank})"


def _not_finite(state: dict[str, Any]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()}
    tensors = {k: v.cpu() if v.device.type == "xla" else v for k, v in tensors.items()}
    if not tensors:
        return []
    if bool(torch.isfinite(torch.nn.utils.get_total_norm(tensors.values()))):
        return []
    # A norm of finite values may overflow.
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
