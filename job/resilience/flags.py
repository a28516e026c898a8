"""Asynchronous all-reduced flags: any rank raises one, all ranks see it at the same step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist


class AsyncFlags:
    """All-reduces a few flags beside a training step.

    :meth:`exchange` sends this rank's flags and returns what all ranks sent at the *previous* call, so that nobody
    waits: a flag is seen one step late, by all ranks alike. The reduction is gloo's on CPU memory, whatever the device:
    it does not make the GPU's queue wait.

    Create it, and call its methods, on all ranks together.

    Args:
        count: number of flags.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo")) if dist.is_initialized() else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, flags: Sequence[bool]) -> list[bool]:
        """Send ``flags``; returns whether any rank raised each of them at the call before this one."""
        if self._group is None:
            return list(flags)
        earlier = self.drain()
        tensor = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = (work, tensor)
        return earlier

    def drain(self) -> list[bool]:
        """Wait for the last exchange; returns its result."""
        if self._pending is None:
            return [False] * self._count
        work, tensor = self._pending
        self._pending = None
        work.wait()
        return [bool(value) for value in tensor.tolist()]
