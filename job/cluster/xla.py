"""Training on XLA devices by torch-xla: the chips of a TPU, or XLA's CPU device with ``PJRT_DEVICE=CPU``.

Everything of torch-xla is in the modules ``xla…`` of this package, since its last release is 2.9 and TorchTPU is to
take its place: models, data and checkpoints know nothing of it.

One process per host drives all its chips as one device (SPMD,
https://docs.pytorch.org/xla/master/perf/spmd_basic.html): a batch lies in shares on the chips, parameters lie whole on
each, and XLA puts the sums over chips into the compiled step. Operations are collected into a graph and run,
asynchronously, where this module calls ``torch_xla.sync``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.plugins import MixedPrecision, Precision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor

from job.cluster import ranks
from job.cluster.xla_internals import to_host, tpu_chips
from job.errors import ConfigError

log = logging.getLogger(__name__)


def is_wanted(accelerator: str) -> bool:
    """Whether ``--trainer.accelerator`` means XLA: "tpu" does, and "auto" on a machine with a TPU and torch-xla."""
    if accelerator == "tpu":
        return True
    if accelerator != "auto" or importlib.util.find_spec("torch_xla") is None:
        return False
    return tpu_chips() > 0


class XLAAccelerator(Accelerator):
    """All chips of this host, as one device.

    Lightning's own only accepts a TPU on the PCI bus.
    """

    def setup_device(self, device: torch.device) -> None:
        """Nothing: there is one device."""

    def teardown(self) -> None:
        """Nothing."""

    @staticmethod
    def parse_devices(devices: Any) -> int:
        """One device, whatever is requested."""
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The one device."""
        return [torch.device("xla", 0)]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """True: checked before this object is made."""
        return True

    @staticmethod
    def name() -> str:
        """Name on the command line."""
        return "tpu"

    def get_device_stats(self, device: str | int | torch.device) -> dict[str, Any]:
        """None: XLA's CPU device has no figures."""
        return {}


class SPMDStrategy(SingleDeviceStrategy):
    """Shards batches over the chips of all hosts (SPMD), and runs each step's graph.

    To Lightning it is one process with one device (``world_size`` 1), since XLA's tensors are those of the
    whole mesh: the loss of a step is that of the global batch already.

    Args:
        precision: Lightning's name of one: 32-true or bf16-mixed. None: bf16-mixed on a TPU, 32-true elsewhere.
        cache: local folder of compiled steps.

    Raises:
        ConfigError: torch-xla is missing, or finds no TPU, or other hosts than were started; there is no such
            precision.
    """

    strategy_name = "xla_spmd"

    def __init__(self, precision: str | None, cache: Path) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # or XLA warns at every compilation
        try:
            import torch_xla
            from torch_xla import runtime
            from torch_xla.distributed import spmd
        except ImportError as error:
            raise ConfigError(
                f"--trainer.accelerator tpu needs torch-xla, which does not load here ({error}). Install the "
                "package with its extra in an environment of its own: pip install '.[tpu]'"
            ) from error
        # Without this libtpu would ask Google's metadata server for minutes.
        if os.environ.get("PJRT_DEVICE", "TPU") == "TPU" and not tpu_chips():
            raise ConfigError(
                "--trainer.accelerator tpu, and this machine has no TPU. With PJRT_DEVICE=CPU it is XLA's CPU device."
            )
        runtime.initialize_cache(str(cache))
        runtime.use_spmd()
        self.chips = runtime.global_runtime_device_count()
        if runtime.process_count() != ranks.world_size():
            raise ConfigError(
                f"{ranks.world_size()} process(es) were started, but XLA counts {runtime.process_count()}: one "
                "process per TPU host drives all its chips, and XLA's CPU device is always one host."
            )
        precision = precision or ("bf16-mixed" if runtime.device_type() == "TPU" else "32-true")
        super().__init__(
            device=torch_xla.device(), accelerator=XLAAccelerator(), precision_plugin=_precision_plugin(precision)
        )
        self._mesh = spmd.Mesh(np.arange(self.chips), (self.chips,), ("chip",))
        log.info(
            "XLA: %d chip(s) of %d host(s), %s, precision %s",
            self.chips,
            ranks.world_size(),
            runtime.device_type(),
            precision,
        )

    @property
    def is_global_zero(self) -> bool:
        """Whether this host is the one that writes checkpoints and logs."""
        return ranks.rank() == 0

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Shard every tensor of the batch over the chips.

        The copy overlaps with the previous step, which the device is still computing.

        Raises:
            ConfigError: the batch size is not a multiple of the number of chips.
        """
        import torch_xla.core.xla_model as xm
        from torch_xla.distributed.spmd import ShardingSpec

        moved = dict(batch)
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                continue
            if value.shape[0] * ranks.world_size() % self.chips:
                raise ConfigError(
                    f"--data.global_batch_size {value.shape[0] * ranks.world_size()} does not divide over "
                    f"{self.chips} chips."
                )
            spec = ShardingSpec(self._mesh, ("chip", *[None] * (value.dim() - 1)), minibatch=ranks.world_size() > 1)
            moved[name] = xm.send_cpu_data_to_device([value.contiguous()], self.root_device, spec)[0]
        return moved

    @property
    def device_kind(self) -> str:
        """What XLA computes on, as its results may differ: "xla CPU" or "xla TPU"."""
        from torch_xla import runtime

        return f"xla {runtime.device_type()}"

    def run_pending(self) -> None:
        """Run what has only been traced: else it becomes part of the next graph, whichever that is."""
        _run()

    def forward_on_all_chips(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Compute a batch without gradients, a share of it on each chip, and wait for the result, in host memory.

        Args:
            forward: from ``inputs`` on the device to a value per row.
            inputs: [B, ...] in host memory; equal B in all calls, or each is compiled.
        """
        batch = self.batch_to_device({"inputs": inputs})
        return self._run_whole({"values": forward(batch["inputs"])})["values"].cpu()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step with the device's generator seeded from torch's, which ``torch.manual_seed`` does not reach."""
        import torch_xla.core.xla_model as xm

        xm.set_rng_state(torch.initial_seed() % 2**31, str(self.root_device))
        return super().training_step(*args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Run forward and backward pass apart from the update.

        In its first step an optimizer creates its state, which is another graph than that of all later steps: so only
        the small update is compiled twice, and not the network.
        """
        _run()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the update."""
        result = super().optimizer_step(*args, **kwargs)
        _run()
        return result

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run each step by itself: else a whole evaluation would be one graph, compiled for its length."""
        return self._run_whole(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run each step by itself, as in validation."""
        return self._run_whole(super().test_step(*args, **kwargs))

    def _run_whole(self, result: Any) -> dict[str, Tensor]:
        """Run the graph, with each of its results replicated on every chip.

        Fetching a sharded one would compile a program to gather it, each time (torch-xla 2.9).
        """
        from torch_xla.distributed import spmd

        # New tensors: a sharded one, or its clone, can't be marked again.
        whole = {name: (tensor * 1).to(tensor.dtype) for name, tensor in result.items()}
        for tensor in whole.values():
            spmd.mark_sharding(tensor, self._mesh, (None,) * tensor.dim())
        _run()
        return whole

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Parameters in host memory, fetched together."""
        return cast("dict[str, Any]", to_host(super().lightning_module_state_dict()))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimizer's state in host memory, fetched together."""
        return cast("dict[str, Tensor]", to_host(super().optimizer_state(optimizer)))


def _precision_plugin(precision: str) -> Precision:
    if precision in ("bf16-mixed", "bf16"):
        return MixedPrecision("bf16-mixed", "xla")
    if precision in ("32-true", "32"):
        return Precision()
    raise ConfigError(f"--trainer.precision {precision} does not exist on XLA: take 32-true or bf16-mixed.")


def _run() -> None:
    import torch_xla

    torch_xla.sync()
