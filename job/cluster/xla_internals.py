"""Every use of private API of torch-xla 2.9, its last release.

``tests/xla/test_xla_internals.py`` fails where another one changes it.
"""

from __future__ import annotations

from typing import Any


def tpu_chips() -> int:
    """TPU chips on this machine's PCI bus; what is public counts them only once the TPU's runtime is started.

    Upstream: https://github.com/pytorch/xla/issues/7767.
    """
    from torch_xla._internal import tpu

    return int(tpu.num_available_chips())


def to_host(state: Any) -> Any:
    """A copy of a state in host memory, by one transfer; the public ``xm.save`` writes it to a file as well.

    Checkpoints are written by a thread while the next step changes the tensors. No upstream issue is known that asks
    for a public form; https://github.com/pytorch/xla/issues/5585 is about its use of memory.
    """
    import torch_xla.core.xla_model as xm

    return xm._maybe_convert_to_cpu(state)
