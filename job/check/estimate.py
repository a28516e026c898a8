"""Length, size and price of a run, from a few measured steps; whether training will wait for images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from job import storage
from job.check.finding import Estimate, Finding, ok, warn
from job.check.machine import gigabytes
from job.check.training import Measured
from job.checkpoint.settings import CheckpointSettings
from job.cluster import ranks
from job.data.datamodule import ImageDataModule
from job.features.callback import FeatureSettings
from job.model.config import ModelConfig
from job.model.freeze import Stage, stage_at
from job.monitoring.advice.data import STARVING, STARVING_SECONDS
from job.process.cpus import available_cpus
from job.process.progress import duration

LOADER, ESTIMATE = "loader", "estimate"
HEAD_STEP_SECONDS = 2e-3
"""Time of a step from cached features."""


@dataclass(frozen=True)
class Plan:
    """The run whose length is estimated.

    Attributes:
        config: hyperparameters of the model.
        data: the images.
        features: whether the features of a frozen backbone are cached.
        checkpoint: which checkpoints are kept.
        measured: what was measured.
    """

    config: ModelConfig
    data: ImageDataModule
    features: FeatureSettings
    checkpoint: CheckpointSettings
    measured: Measured

    def seconds(self) -> float | None:
        """Time of training and validation; None: the run has no end."""
        measured, epochs = self.measured, self.measured.epochs
        if epochs is None:
            return None
        cached = self._cached_epochs(epochs)
        train, val = measured.batches * measured.batch, len(self.data.parts.get("val", ())) / ranks.world_size()
        forward = min(measured.seconds_per_image.values())
        total = 0.0
        if cached:
            variants = self.data.preprocessing("train").variants or 1
            images = len(self.data.parts["train"]) * variants / ranks.world_size() + val
            total += images * self._per_image(forward) + cached * measured.batches * HEAD_STEP_SECONDS
        for epoch in range(cached, epochs):
            stage = stage_at(epoch, self.config.milestones)
            exchange = 0.0
            if measured.reduced_per_second is not None:
                exchange = measured.batches * measured.gradient_bytes.get(stage, 0) / measured.reduced_per_second
            step = measured.seconds_per_image.get(stage, forward)
            total += train * self._per_image(step) + exchange + val * self._per_image(forward)
        return total

    def _per_image(self, compute: float) -> float:
        """Seconds per image: a GPU computes while the CPUs decode, and CPUs do both."""
        load = 1 / self.measured.loader_rate
        return compute + load if self.measured.is_cpu else max(compute, load)

    def _cached_epochs(self, epochs: int) -> int:
        """First epochs that train from cached features; see :class:`~job.features.callback.FeatureCache`."""
        config, variants = self.config, self.data.preprocessing("train").variants
        varies = config.train_bn or config.mixup or config.cutmix
        frozen = 0 if varies else sum(stage_at(epoch, config.milestones) == Stage.HEAD for epoch in range(epochs))
        size = len(self.data.parts["train"])
        if not frozen or variants is None or self.features.use == "never" or not self.data.is_cache_usable:
            return 0
        if self.features.use == "auto" and size * variants >= frozen * size:
            return 0
        needed = self.measured.feature_bytes * (size * variants + len(self.data.parts.get("val", ())))
        return frozen if needed <= self.features.max_gb * 1e9 else 0


def estimate(plan: Plan, price_per_hour: float | None) -> Estimate | None:
    """Length, size and price of the run; None: it has no end."""
    seconds, measured = plan.seconds(), plan.measured
    if seconds is None or measured.epochs is None or measured.steps is None:
        return None
    every = plan.checkpoint.keep_every_n_epochs
    kept = plan.checkpoint.keep_last + plan.checkpoint.keep_best + (measured.epochs // every if every else 0)
    return Estimate(
        epochs=measured.epochs,
        steps=measured.steps,
        seconds=round(seconds, 1),
        checkpoint_bytes=measured.checkpoint_bytes,
        kept_bytes=min(kept, measured.epochs) * measured.checkpoint_bytes,
        price=None if price_per_hour is None else round(seconds / 3600 * price_per_hour, 2),
    )


def loader(plan: Plan, *, is_far: bool) -> Finding:
    """Whether training will wait for images for a noticeable share of the run.

    Args:
        plan: the run.
        is_far: the data are in another region than this machine.
    """
    measured = plan.measured
    need = 1 / min(measured.seconds_per_image.values())
    rates = (
        f"the loader gives {measured.loader_rate:,.0f} images/s per rank, and {measured.device} can take {need:,.0f}"
    )
    seconds, without = plan.seconds(), replace(plan, measured=replace(measured, loader_rate=math.inf)).seconds()
    if seconds is None or without is None:
        wait, lost = max(1 - measured.loader_rate / need, 0.0), math.inf
    else:
        wait, lost = 1 - without / max(seconds, 1e-9), seconds - without
    if wait < STARVING or lost < STARVING_SECONDS:
        return ok(LOADER, f"{rates}.")
    device = "training" if measured.is_cpu else "the GPU"
    return warn(LOADER, f"{device} will wait {wait:.0%} of its time for images: {rates}.", _mend(plan, is_far=is_far))


def _mend(plan: Plan, *, is_far: bool) -> str:
    data, cpus = plan.data, max(available_cpus() // ranks.local_world_size(), 1)
    ways = []
    if is_far:
        ways.append("move the data to the region of this machine")
    if data.num_workers is not None and data.num_workers < cpus:
        ways.append(f"raise --data.num_workers to {cpus} (it is {data.num_workers})")
    total = sum(index.info.rows * index.info.mean_bytes for index in data.parts.values())
    remote = any(not storage.is_local(uri) for index in data.parts.values() for uri in index.stores)
    if remote and total > data.cache_bytes:
        ways.append(f"raise --data.cache_gb to {math.ceil(total * 1.05 / 1e9)}, which holds all images after an epoch")
    if data.preprocessing("train").variants is None and plan.config.milestones:
        ways.append("limit --data.augment_views, so that features of the frozen backbone are cached")
    ways.append("use more CPUs per GPU, or store images smaller")
    text = "; ".join(ways)
    return f"{text[0].upper()}{text[1:]}."


def describe(result: Estimate | None) -> Iterator[Finding]:
    """The estimate as a finding."""
    if result is None:
        message = "the run has no end (--trainer.max_epochs=-1): length and price are not known."
        yield ok(ESTIMATE, message)
        return
    price = "" if result.price is None else f", for {result.price:,.2f}"
    yield ok(
        ESTIMATE,
        f"{result.epochs:,} epochs, {result.steps:,} steps, about {duration(result.seconds)}{price}; checkpoints of "
        f"{gigabytes(result.checkpoint_bytes)}, {gigabytes(result.kept_bytes)} in all.",
    )
