"""Ranks of the job: rank and world size, process group, broadcasts from rank 0.

Functions that run a collective import torch: commands without one start without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from job.errors import ConfigError, JobError, RankLost
from job.process.signals import Stopped

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

_GLOO = re.compile(r"(Gloo \w+ failed with )?\[[^\]]*gloo/[^\]]*\.(cc|h|cpp):\d+\]")
"""Beginning of gloo's errors: a place in its source. They have no type of their own."""
_MISUSE = {
    "Duplicate GPU detected": "two ranks share one GPU, which NCCL does not allow",
    "invalid device ordinal": "a rank has no GPU of its own",
    "ncclInvalidUsage": "NCCL was called wrongly",
    "ncclInvalidArgument": "NCCL was called wrongly",
}
"""NCCL's messages for mistakes that a restart would repeat."""


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default  # environment.require_ranks refuses anything else


def rank() -> int:
    """Rank of this process, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of ranks."""
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Number of ranks on this node."""
    return _number("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """Rank of this process within its node, from 0."""
    return _number("LOCAL_RANK", 0)


@contextlib.contextmanager
def process_group(timeout_seconds: float) -> Iterator[None]:
    """Keep the process group of the job open while the context lasts; a single process has none.

    Lightning uses a group that exists. torch chooses gloo for CPU tensors and NCCL for CUDA's.

    Raises:
        RankLost: another rank ended in the middle of a collective.
    """
    if world_size() == 1:
        yield
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=timeout_seconds)
    with _translate_failures():
        store, _, _ = next(rendezvous("env://", rank(), world_size(), timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _store_of_this_attempt(store, timeout)
        dist.init_process_group(store=store, rank=rank(), world_size=world_size(), timeout=timeout)
        yield
    # Not after an error: other ranks might never join the destruction.
    dist.destroy_process_group()


def _store_of_this_attempt(agent_store: Any, timeout: timedelta) -> Any:
    """A new store that rank 0 serves; the store of torch's elastic agent only holds its port.

    The agent keeps one store for all restarts, with the addresses of dead ranks in it, which gloo would connect to
    (torch 2.14). The restart count cannot tell them apart: agents that joined at different times count differently.
    A port that an earlier rank 0 left there refuses the connection. ``launch`` has another run id at each restart.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from job.cluster.store import serve

    host, key = os.environ["MASTER_ADDR"], f"job/port/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    if rank() == 0:
        store = serve(host, 0, timeout)
        agent_store.set(key, str(store.port))
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        port = int(agent_store.get(key))
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=5).close()
            return TCPStore(host, port, is_master=False, timeout=timeout)
        time.sleep(0.2)
    raise RankLost(f"rank 0 does not serve a store on {host}; its log says why.")


def from_rank_zero(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 only, and broadcast its result to all ranks.

    Raises:
        JobError: the exception of ``function``, on every rank.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except (JobError, Stopped) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def union(values: set[T]) -> set[T]:
    """Union of the sets of all ranks; a collective operation."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return values
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, values)
    return set().union(*gathered)


def gather(value: T) -> list[T]:
    """The values of all ranks in their order, on rank 0; none on the others. A collective operation."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, gathered if rank() == 0 else None, dst=0)
    return gathered


def broadcast(tensors: list[Tensor]) -> None:
    """Overwrite ``tensors``, of one type and device, with those of rank 0; a collective operation."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and tensors and tensors[0].device.type != "xla":  # XLA replicates them by itself
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.broadcast(flat, src=0)
        for tensor, values in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))


@contextlib.contextmanager
def _translate_failures() -> Iterator[None]:
    """Translate the failure of a collective, by its type, or by gloo's mark: it has no type.

    Raises:
        ConfigError: the ranks were started wrongly, which a restart would repeat.
        RankLost: another rank ended, hangs or cannot be reached.
    """
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:  # torch's DistError is one, too
        message = str(error)
        from_gloo = _GLOO.match(message) is not None
        if not from_gloo and not isinstance(error, dist.DistError):
            raise
        cause = message.strip().splitlines()[0][:300] if message.strip() else type(error).__name__
        if isinstance(error, dist.DistBackendError):
            for mark, mistake in _MISUSE.items():
                if mark in message:
                    last = message.strip().splitlines()[-1][:300]
                    raise ConfigError(
                        f"{mistake} ({last}). Start one process per GPU: torchrun --nproc-per-node, or "
                        "LAUNCH_PROCESSES."
                    ) from error
        # The cause may be in this process; gloo, and a store that is gone, only report other processes.
        if not from_gloo and not isinstance(error, dist.DistNetworkError):
            log.error("a collective operation failed:", exc_info=error)
        raise RankLost(
            f"another rank ended or does not respond ({type(error).__name__}: {cause}). See the log of that rank."
        ) from error
