"""Uses of torch's private API; ``tests/unit/test_lightning_internals.py`` fails where a release changes them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader


def connect_default_store() -> Any:
    """Another connection to the store of the default process group: a collective may hold the group's own.

    Nothing public returns the store that ``init_process_group`` was given or made.
    """
    return dist.distributed_c10d._get_default_store().clone()


def without_buffer_broadcasts() -> dict[str, Any]:
    """Arguments of DistributedDataParallel by which rank 0 does not broadcast its buffers in each forward pass.

    torch 2.14 warns of ``broadcast_buffers``, whose successor earlier releases do not have.
    """
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}


def has_processes(loader: DataLoader[Any]) -> bool:
    """Whether processes of a loader with ``persistent_workers`` run: Lightning ends them with the run of a Trainer.

    Nothing public says so.
    """
    return loader._iterator is not None


def flag_not_finite(tensors: list[Tensor], flag: Tensor, scale: Tensor) -> None:
    """Set ``flag`` to 1 if a tensor holds NaN or infinity; with a ``scale`` of 1 the tensors stay as they are.

    It is GradScaler's kernel, which GradScaler alone offers: one pass, ten times as fast as norms.

    Args:
        tensors: float32 or float16, of one type and device, the CPU or a GPU.
        flag: float32, of one element, on their device.
        scale: as ``flag``.
    """
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, scale)


def compile_seconds() -> float:
    """Time that this process has spent in torch.compile; the public ``torch.compiler`` counts none."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))


def resize_bytes(image: Tensor, size: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.interpolate`, bilinear and antialiased, which may write into memory that exists.

    The public function allocates its result, which then is to be copied, and holds the GIL for twice as long.

    Args:
        image: uint8 [B, C, H, W].
        size: height and width of the result.
        out: uint8 [B, C, height, width], for the result.
    """
    untyped: Any = torch._C._nn
    resized: Tensor = untyped._upsample_bilinear2d_aa(image, size, False, None, out=out)
    return resized
