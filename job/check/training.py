"""One real training step: the memory that it needs, its speed, and that of the loader."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from job.check.cluster import all_reduce
from job.check.finding import Finding, fail, ok, warn
from job.check.machine import gigabytes
from job.cluster import ranks, xla
from job.data.datamodule import ImageDataModule, image_data
from job.model.config import ModelConfig
from job.model.freeze import Stage, stage_at
from job.model.lora import merge
from job.model.module import TransferLearningModel
from job.model.steps import batches_per_epoch, optimizer_steps
from job.train.batch_size_finder import NOTICEABLE
from job.train.errors import translate_errors
from job.train.step_memory import free_bytes, held_bytes, peak_bytes, run_step
from job.train.trainer import measuring_trainer

DEVICE, MEMORY = "device", "memory"
MEMORY_MEND = (
    "Lower --data.global_batch_size (with --trainer.accumulate_grad_batches for the same step) or --data.image_size, "
    "use --trainer.precision=bf16-mixed, or more processes. python -m job tune measures how many images fit."
)
FIRST_SIZE = 4
"""Images of the first batch."""
TIGHT = 0.9
"""Share of the memory from which on a step is said to fit only just."""
_STEP_SHARE, _LOADER_SHARE = 0.5, 0.35
"""Shares of the time limit for steps and for the loader."""


@dataclass
class Measured:
    """What was measured on this rank.

    Attributes:
        device: name of the device.
        is_cpu: the CPUs that decode images train, too.
        batch: images of a rank's batch.
        memory_needed: bytes that a step needs, parameters and optimizer included; None: not measured.
        memory_available: bytes that this rank may take, those that it holds included.
        seconds_per_image: of a step, by stage; of :attr:`Stage.HEAD` it is hardly more than the forward pass.
        loader_rate: images per second that the loader gives to this rank.
        reduced_per_second: bytes of gradients that all ranks exchange per second; None: one rank.
        gradient_bytes: bytes of the gradients, by stage.
        checkpoint_bytes: of the largest checkpoint.
        feature_bytes: of the features of an image.
        batches: batches per epoch.
        steps: optimizer steps of the run; None: it has no end.
        epochs: of the run; None: it has no end.
    """

    device: str = ""
    is_cpu: bool = True
    batch: int = 0
    memory_needed: float | None = None
    memory_available: float = 0.0
    seconds_per_image: dict[Stage, float] = field(default_factory=dict)
    loader_rate: float = math.inf
    reduced_per_second: float | None = None
    gradient_bytes: dict[Stage, int] = field(default_factory=dict)
    checkpoint_bytes: int = 0
    feature_bytes: int = 0
    batches: int = 0
    steps: int | None = None
    epochs: int | None = None


def measure(
    config: ModelConfig, data: ImageDataModule, settings: dict[str, Any], folder: Path, seconds: float
) -> tuple[Measured | None, list[Finding]]:
    """Start a fit, measure before its first step, and end it; called on all ranks together.

    Args:
        config: hyperparameters of the model; its weights are not loaded.
        data: the images, listed before.
        settings: the user's arguments of Trainer.
        folder: local folder that the Trainer may write to.
        seconds: about how long the measurement may take.

    Raises:
        JobError: a subclass says what prevents the fit.
    """
    if xla.is_wanted(str(settings.get("accelerator"))):
        message = "steps, memory and the loader are not measured on XLA, which would compile for minutes."
        return None, [warn(DEVICE, message, "Look at system/data_wait in the first epoch.")]
    measurement = Measurement(seconds)
    # Compilation takes minutes, and changes memory and speed by a fraction.
    module = TransferLearningModel(pretrained=False, **vars(replace(config, compile_backbone=False)))
    with translate_errors(data.global_batch_size):
        trainer = measuring_trainer(settings, str(folder), measurement)
        trainer.fit(module, datamodule=data)
    return measurement.measured, [*measurement.findings, *_memory(measurement.measured)]


class Measurement(Callback):
    """Measures on the network and the device of a fit, before its first step, and stops it.

    Args:
        seconds: about how long it may take.

    Attributes:
        measured: the results.
        findings: on the device and the exchange between ranks.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.measured = Measured()
        self.findings: list[Finding] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure."""
        module, data, measured = cast("TransferLearningModel", pl_module), image_data(trainer), self.measured
        epochs, size = trainer.max_epochs, len(data.parts["train"])
        measured.epochs = None if epochs is None or epochs < 0 else epochs
        measured.steps = optimizer_steps(trainer, size, data.global_batch_size)
        measured.batches = batches_per_epoch(trainer, size, data.global_batch_size)
        measured.batch = max(data.global_batch_size // ranks.world_size(), 1)
        measured.is_cpu = module.device.type == "cpu"
        measured.device = _name(module.device)
        threads = f", {torch.get_num_threads()} thread(s)" if measured.is_cpu else ""
        self.findings.append(ok(DEVICE, f"{measured.device}{threads}, precision {trainer.precision}."))
        if ranks.world_size() > 1:
            finding, measured.reduced_per_second = all_reduce(module.device)
            self.findings.append(finding)
        self._measure_steps(trainer, module, measured)
        module.enter_stage(_stages(module.config, measured.epochs)[0])  # as training would find it
        measured.loader_rate = loader_rate(data, self.seconds * _LOADER_SHARE)
        trainer.should_stop = True

    def _measure_steps(self, trainer: pl.Trainer, module: TransferLearningModel, measured: Measured) -> None:
        stages = _stages(module.config, measured.epochs)
        module.enter_stage(stages[-1])
        size = min(FIRST_SIZE, measured.batch)
        # Allocates what stays, the optimizer's state included, and is slow: kernels are chosen or compiled.
        run_step(trainer, module, size, trainer.optimizers[0])
        measured.checkpoint_bytes = _checkpoint_bytes(trainer, module)
        began, limit = time.monotonic(), self.seconds * _STEP_SHARE
        size = self._measure_memory(trainer, module, measured, size, began + limit / 2)
        for stage in stages:
            module.enter_stage(stage)
            measured.gradient_bytes[stage] = _gradient_bytes(module)
            measured.seconds_per_image[stage] = _timed(trainer, module, size) / size
            if time.monotonic() - began > limit:
                break
        slowest = max(measured.seconds_per_image.values())
        measured.seconds_per_image = {stage: measured.seconds_per_image.get(stage, slowest) for stage in stages}
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            image = torch.zeros(1, 3, module.net.image_size, module.net.image_size, dtype=torch.uint8)
            module.net.eval()
            measured.feature_bytes = module.net.features(image.to(module.device)).nbytes

    def _measure_memory(
        self, trainer: pl.Trainer, module: TransferLearningModel, measured: Measured, size: int, until: float
    ) -> int:
        """Extrapolate from batches that grow until the difference can be seen; returns the size of the last one."""
        if module.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
            return size
        began, held = time.monotonic(), held_bytes(module.device)
        first, small = size, peak_bytes(trainer, module, size)
        seconds, more = time.monotonic() - began, 0.0
        while size < measured.batch and more < NOTICEABLE:
            larger = min(4 * size, measured.batch)
            if time.monotonic() + seconds * larger / size > until:
                break
            began = time.monotonic()
            more, size = peak_bytes(trainer, module, larger) - small, larger
            seconds = time.monotonic() - began
        if size > first:
            each = max(more, 0.0) / (size - first)
        else:  # a second batch would take too long, or there is none larger
            each = max(small - held - _gradient_bytes(module), 0.0) / first
        averages = sum(parameter.nbytes for parameter in module.parameters()) if module.config.ema else 0
        measured.memory_needed = small + each * (measured.batch - first) + averages
        measured.memory_available = held_bytes(module.device) + free_bytes(module.device)
        if module.device.type == "cuda" and measured.memory_needed < TIGHT * measured.memory_available:
            return measured.batch  # a small batch does not show a GPU's speed
        return size


def loader_rate(data: ImageDataModule, seconds: float) -> float:
    """Images per second that the training loader gives, without waiting for steps.

    Raises:
        JobError: images cannot be read.
    """
    loader = data.train_dataloader()
    began, images = time.monotonic(), 0
    for batch in loader:
        if batch["error"] is not None:
            raise batch["error"]
        if loader.num_workers and not images:  # processes take seconds to start
            began = time.monotonic()
        images += len(batch["label"])
        if time.monotonic() - began > seconds:
            break
    return images / max(time.monotonic() - began, 1e-6)


def _stages(config: ModelConfig, epochs: int | None) -> list[Stage]:
    """The stages that the run reaches, in order."""
    last = Stage.ALL if epochs is None else stage_at(max(epochs - 1, 0), config.milestones)
    return [stage for stage in Stage if stage_at(0, config.milestones) <= stage <= last]


def _timed(trainer: pl.Trainer, module: TransferLearningModel, size: int) -> float:
    """Seconds of a step; on a GPU of the second one, which finds its kernels chosen."""
    if module.device.type == "cuda":
        run_step(trainer, module, size)
        torch.cuda.synchronize(module.device)
    began = time.monotonic()
    run_step(trainer, module, size)
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.monotonic() - began


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _gradient_bytes(module: TransferLearningModel) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def _checkpoint_bytes(trainer: pl.Trainer, module: TransferLearningModel) -> int:
    """Weights, their averages and the optimizer's state, all of which a checkpoint holds."""
    state, parts = merge(module.net.state_dict(), module.config.lora_alpha)
    weights: int = sum(value.nbytes for value in (*state.values(), *parts.values()))
    states = (value for state in trainer.optimizers[0].state.values() for value in state.values())
    optimizer: int = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    return (2 * weights if module.config.ema else weights) + optimizer


def _memory(measured: Measured) -> Iterator[Finding]:
    if measured.memory_needed is None:
        message = "the memory of a step could not be measured, which takes CUDA or Linux."
        yield warn(MEMORY, message, "If a step fails for lack of memory, lower --data.global_batch_size.")
        return
    needed, available = measured.memory_needed, measured.memory_available
    message = (
        f"a step of {measured.batch} images per rank needs about {gigabytes(needed)}, and {measured.device} has "
        f"{gigabytes(available)} for it."
    )
    if needed > available:
        yield fail(MEMORY, message, MEMORY_MEND)
    elif needed > TIGHT * available:
        yield warn(MEMORY, message, MEMORY_MEND)
    else:
        yield ok(MEMORY, message)
