"""Advice on the data and its loader."""

from __future__ import annotations

import math
from collections.abc import Sequence

from job.monitoring.advice.context import Advice, Context
from job.monitoring.history import ValidationRecord

STARVING = 0.20
"""Share of the time in which training waits for data, reported from this value on: without the wait, epochs take a
fifth less."""

STARVING_SECONDS = 60.0
"""Time over which that share is measured at least: in shorter epochs the loader has hardly begun."""


def data_wait(history: Sequence[ValidationRecord], context: Context) -> Advice | None:
    """Training waits for images, twice in a row and not in its first epoch, which fills caches."""
    if len(history) < 3 or context.has_cached_features:
        return None
    shares = [record.data_wait for record in history[-2:]]
    if any(share is None or share < STARVING for share in shares):
        return None
    if history[-1].seconds - history[-3].seconds < STARVING_SECONDS:
        return None
    return Advice(
        "data_wait",
        f"Training waits for images {shares[-1]:.0%} of the time (epoch {history[-1].epoch}).",
        _more_data(context),
    )


def _more_data(context: Context) -> str:
    """What would give images faster on this machine."""
    if context.data_bytes > context.cache_bytes:
        gigabytes = math.ceil(context.data_bytes * 1.05 / 1e9)
        return (
            f"Raise --data.cache_gb to {gigabytes} (it is {context.cache_bytes / 1e9:.3g}), so that all images stay in "
            "--data.cache_dir after the first epoch."
        )
    if context.num_workers < context.available_cpus:
        return f"Raise --data.num_workers to {context.available_cpus} (it is {context.num_workers})."
    shared = ", which train, too" if context.trains_on_cpu else ""
    return (
        f"Decoding has all {context.available_cpus} CPU(s) of a rank{shared}: take more CPUs, store images smaller, "
        f"or lower --data.image_size (it is {context.image_size})."
    )


def repeated_images(context: Context) -> Advice | None:
    """Many training images are the same file."""
    repeated = context.repeated_images
    if repeated is None:
        return None
    return Advice(
        "repeated_images",
        f"About {repeated.count:,} of {repeated.total:,} training images are the same file of {repeated.size:,} "
        f'bytes, such as a picture that says "image not found": {", ".join(repeated.examples)}.',
        "Look at them, and remove them from the data unless they are copies on purpose.",
    )
