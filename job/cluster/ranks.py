"""The processes that torchrun started: rank and world size of this one, and collectives on Python objects.

torch is imported by the functions that run a collective: commands without one start without it.
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
"""How errors of gloo begin: with the place in its source. They have no type of their own."""
_MISUSE = {
    "Duplicate GPU detected": "two ranks share one GPU, which NCCL does not allow",
    "invalid device ordinal": "a rank has no GPU of its own",
    "ncclInvalidUsage": "NCCL was called wrongly",
    "ncclInvalidArgument": "NCCL was called wrongly",
}
"""What NCCL says of mistakes that a restart repeats."""


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default  # what is no number is refused by environment.require_ranks


def rank() -> int:
    """This process's number among all, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """How many processes train together."""
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """How many of them run on this node."""
    return _number("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number among those of its node, from 0."""
    return _number("LOCAL_RANK", 0)


@contextlib.contextmanager
def process_group(timeout_seconds: float) -> Iterator[None]:
    """The process group of the job, while the context lasts; nothing for a process alone.

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
            store = _store_of_this_start(store, timeout)
        dist.init_process_group(store=store, rank=rank(), world_size=world_size(), timeout=timeout)
        yield
    # Only on the way out without an error: with one, other ranks may never come to meet this one.
    dist.destroy_process_group()


def _store_of_this_start(agents: Any, timeout: timedelta) -> Any:
    """A new store that rank 0 serves; ``agents`` is asked for no more than where it is.

    torchrun's agent keeps one store for all restarts, with the addresses of ranks that are dead in
    it, which gloo would connect to (torch 2.14). Nor is the number of a restart the same for agents
    that came at different times. A port that an earlier rank 0 left there refuses the connection.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host = os.environ["MASTER_ADDR"]
    if rank() == 0:
        served = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        agents.set("job/port", str(served.port))
        return served
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        port = int(agents.get("job/port"))
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=5).close()
            return TCPStore(host, port, is_master=False, timeout=timeout)
        time.sleep(0.2)
    raise RankLost(f"rank 0 does not serve a store on {host}; its log says why.")


def from_rank_zero(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 alone and give its result to every rank.

    Raises:
        JobError: what ``function`` raised, the same on every rank.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return function()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = function()
        except (JobError, Stopped) as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    result: T = told[0]
    return result


def union(mine: set[str]) -> set[str]:
    """What is in any rank's set; called by all ranks together."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return mine
    everyones: list[Any] = [None] * world_size()
    dist.all_gather_object(everyones, mine)
    return set().union(*everyones)


def broadcast(tensors: list[Tensor]) -> None:
    """Overwrite ``tensors``, of one type and device, with those of rank 0; called by all ranks together."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and tensors and tensors[0].device.type != "xla":  # XLA's are one on all chips
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
            for sign, mistake in _MISUSE.items():
                if sign in message:
                    last = message.strip().splitlines()[-1][:300]
                    raise ConfigError(
                        f"{mistake} ({last}). Start one process per GPU: torchrun --nproc-per-node, or "
                        "LAUNCH_PROCESSES."
                    ) from error
        if not from_gloo:  # its cause may lie in this process; gloo reports other processes alone
            log.error("a collective operation failed:", exc_info=error)
        raise RankLost(
            f"another rank ended or does not answer ({type(error).__name__}: {cause}). Its own log shows the cause."
        ) from error
