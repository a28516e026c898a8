"""What lies in run_dir already: another run's lease, checkpoints and configuration of an earlier one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields

from job import checkpoint, storage
from job.check.finding import Finding, fail, ok, warn
from job.config.run_config import FILE as CONFIG_FILE
from job.config.run_config import changes, listed_changes
from job.data.datamodule import ImageDataModule
from job.data.index.index import Index
from job.data.index.sources import INDEX_FILE
from job.data.index.store import local_index
from job.errors import ConfigError
from job.model.config import ModelConfig
from job.resilience import attempts
from job.resilience.lease import FILE as LEASE_FILE
from job.resilience.lease import RENEWALS
from job.resilience.lease_file import parse
from job.storage import conditional
from job.train.fit import FitSettings

LEASE, EARLIER_RUN = "lease", "earlier_run"
FIXED = frozenset(
    {
        *("seed_everything", "data.global_batch_size", "model.task", "model.backbone", "model.hidden"),
        *(f"model.{each.name}" for each in fields(ModelConfig) if "fixed" in each.metadata),
    }
)
"""Options that a run which resumes may not change."""
_POLL_SECONDS = 0.5
_MEND = "Wait for its end or stop it, or choose another --run_dir."


def lease(run_dir: str) -> Iterator[Finding]:
    """Whether another run holds the lease of run_dir, which is not taken here.

    A holder renews it several times per lifetime: one that is not renewed for so long belongs to a dead process.
    """
    uri = storage.join(run_dir, LEASE_FILE)
    first = conditional.read_versioned(uri)
    holder = None if first is None else parse(uri, first.data)
    if first is None or (holder is not None and holder.process.is_dead()):
        yield ok(LEASE, f"no other run holds {run_dir}.")
        return
    seconds = holder.seconds if holder is not None else 30.0
    owner = str(holder.process) if holder is not None else "another job"
    deadline = time.monotonic() + 1.2 * seconds / RENEWALS
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        current = conditional.read_versioned(uri)
        if current is None:
            yield ok(LEASE, f"no other run holds {run_dir}: the lease of {owner} was released just now.")
            return
        if current.version != first.version:
            yield fail(LEASE, f"another run writes to {run_dir}: rank 0 is {owner}.", _MEND)
            return
    yield warn(
        LEASE,
        f"{run_dir} has a lease of {owner}, which has not renewed it for {1.2 * seconds / RENEWALS:.0f} s.",
        f"Make sure that this run has ended. A fit waits {seconds:.0f} s for it, and then takes the lease over.",
    )


def earlier_run(settings: FitSettings) -> Iterator[Finding]:
    """Whether a fit would start anew, resume or refuse to, and with which other configuration."""
    run_dir = settings.run_dir
    scan = checkpoint.scan(run_dir)
    step = scan.good[-1].global_step if scan.good else -1
    attempts.earlier(run_dir, step, settings.config)
    count = len(scan.good) + len(scan.damaged) + len(scan.newer)
    if scan.newer:
        yield fail(EARLIER_RUN, scan.newer[0], "Use the version of job that wrote it, or choose another --run_dir.")
        return
    if count and settings.resume == "never":
        yield fail(
            EARLIER_RUN,
            f"{run_dir} holds {count} checkpoint(s) of an earlier run, and --resume is never.",
            "Choose another --run_dir, or --resume=auto.",
        )
        return
    if not scan.good and settings.resume == "must":
        yield fail(
            EARLIER_RUN,
            f"--resume is must, but {run_dir} holds no checkpoint that can be used.",
            "Correct --run_dir, or use --resume=auto.",
        )
        return
    uri = storage.join(run_dir, CONFIG_FILE)
    try:
        changed = changes(uri, settings.config) if storage.exists(uri) else {}
    except ConfigError as error:
        yield warn(EARLIER_RUN, str(error), "Delete or restore the file; a fit writes its own, and keeps this one.")
        changed = {}
    resumes = f"{run_dir} holds a run, which continues after step {step:,}" if scan.good else f"{run_dir} has no run"
    if fixed := {name: change for name, change in changed.items() if scan.good and name in FIXED}:
        yield fail(
            EARLIER_RUN,
            f"{resumes}, and a run that resumes may not change {listed_changes(fixed)}.",
            "Take these options back, or choose another --run_dir.",
        )
    elif changed:
        yield warn(
            EARLIER_RUN,
            f"{run_dir} holds the configuration of an earlier run, which differs: {listed_changes(changed)}.",
            "If this is meant to be another run, choose another --run_dir.",
        )
    else:
        yield ok(EARLIER_RUN, f"{resumes}.")
    if scan.damaged:
        yield warn(
            EARLIER_RUN,
            f"{len(scan.damaged)} checkpoint(s) cannot be used: {scan.damaged[0]}",
            "An older one is used. python -m job checkpoints verify lists them.",
        )


def resumed_data(data: ImageDataModule, run_dir: str) -> Iterator[Finding]:
    """Whether the training images are those of the run that would be resumed: with others a resume is refused."""
    uri = data.index_uri(run_dir)
    if not checkpoint.scan(run_dir).good or not storage.exists(storage.join(uri, INDEX_FILE)):
        return
    before = Index(local_index(uri, data.cache_dir), "train", data.access).fingerprint()
    now = data.parts["train"].fingerprint()
    if before != now:
        yield fail(
            EARLIER_RUN,
            f"the training images have changed since {run_dir} was started: {before} → {now}.",
            "Put them back as they were, or choose another --run_dir.",
        )
