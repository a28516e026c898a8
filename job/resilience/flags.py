"""Flags that any rank may raise, and that all ranks see raised at the same step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist


class Votes:
    """An all-reduce of a few flags that runs beside a training step.

    A call sends this rank's flags and returns what all ranks sent at the *previous* call, so that
    nobody waits: a flag is seen one step late, by all ranks alike. The reduction is gloo's on CPU
    memory, whatever the device: it does not make the GPU's queue wait.

    Args:
        count: flags in a vote.

    Create it, and call :meth:`cast`, on all ranks together.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo")) if dist.is_initialized() else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def cast(self, flags: Sequence[bool]) -> list[bool]:
        """Whether any rank raised each flag at the call before this one."""
        if self._group is None:
            return list(flags)
        earlier = self.drain()
        tensor = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = (work, tensor)
        return earlier

    def drain(self) -> list[bool]:
        """The result of the last call, with nothing left under way."""
        if self._pending is None:
            return [False] * self._count
        work, tensor = self._pending
        self._pending = None
        work.wait()
        return [bool(value) for value in tensor.tolist()]
