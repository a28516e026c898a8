"""All checks of a run, in under a minute: what ``python -m job check`` does on each rank."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from job.check import access, bucket, cluster, data, machine, network, run_dir_state, training
from job.check import estimate as estimates
from job.check.finding import CheckReport, Estimate, Finding, fail, warn, worst
from job.check.runner import Check, run_check, run_checks
from job.cluster import ranks
from job.data.datamodule import ImageDataModule
from job.errors import JobError, RankLost
from job.model.config import ModelConfig
from job.process import temporary
from job.process.identity import process_age
from job.process.periodic import call_within
from job.train.fit import FitSettings

log = logging.getLogger(__name__)

STEP = "training_step"
ACCESS_SECONDS = 12.0
SCAN_SECONDS = 10.0
"""Of the listing; data that have more images are judged by those that it has found."""
DATA_SECONDS = 8.0
WEIGHTS_SECONDS = 18.0
MEASURING_SHARE = 0.5
"""Share of the limit of the measurement that is used for it: a single step may take longer."""
MOST_MEASURING_SECONDS = 12.0
"""About how long steps and loader are measured at most."""
TOTAL_SECONDS = 55.0
"""From the start of the process to the end of the last check."""
IMPORT_SECONDS = 15.0
"""Age of the process that counts at most: of one that has done other things before, the checks have the rest."""
LEAST_TRAINING_SECONDS = 12.0
"""Limit of the measurement where the other checks have taken most of the time."""
RANKS_SECONDS = 40.0
"""Timeout of collective operations: at the first one, other ranks may still be checking."""
GATHER_SECONDS = 5.0
_STEP_MEND = "Correct what this names, if anything; python -m job tune measures steps without a limit of time."
_RANKS_MEND = "See the log of the other ranks; start them by python -m job launch check or torchrun."


def preflight(
    config: ModelConfig, images: ImageDataModule, settings: FitSettings, price_per_hour: float | None = None
) -> CheckReport:
    """Check a run without starting it; called on all ranks, and returns the findings of all on each.

    It writes one object below run_dir, which it deletes, and does not take the lease.

    Args:
        config: hyperparameters of the model.
        images: the data.
        settings: everything else.
        price_per_hour: of all machines of the run.
    """
    began = time.monotonic()
    until = began + TOTAL_SECONDS - min(process_age(), IMPORT_SECONDS)
    folder = temporary.folder("check")
    findings = run_checks(_first_checks(config, images, settings, folder))
    if ranks.rank() == 0 and images.parts:
        findings += _data_checks(config, images, settings.run_dir)
    result: Estimate | None = None
    try:
        with ranks.process_group(RANKS_SECONDS):
            findings = _gathered(findings)
            is_far = any(each.check == bucket.REGION and each.mend == bucket.FAR_MEND for each in findings)
            own, result = _training(
                config,
                images,
                settings,
                folder,
                price_per_hour,
                is_far=is_far,
                seconds=max(until - time.monotonic(), LEAST_TRAINING_SECONDS),
            )
            findings += _gathered(own, GATHER_SECONDS)
            if _is_group_unusable(findings):
                raise RankLost("a training step has not ended on all ranks.")
    except JobError as error:
        findings.append(fail(cluster.RANKS, str(error), _RANKS_MEND))
    temporary.remove(folder)
    return CheckReport(worst(findings), findings, result, round(time.monotonic() - began, 1))


def _first_checks(config: ModelConfig, images: ImageDataModule, settings: FitSettings, folder: Path) -> list[Check]:
    """The checks that need no other one: of the run by rank 0, of the node by one rank, of the process by all."""
    run_dir, mend = settings.run_dir, access.RUN_DIR_MEND
    cache = images.cache_dir
    uris = [uri for part in images.uris.values() for uri in part]
    checks = [Check(access.DATA, lambda: access.data_access(images), ACCESS_SECONDS, access.DATA_MEND, "fail")]
    if ranks.rank() == 0:
        checks += [
            Check(
                data.SCAN,
                lambda: data.scan(images, run_dir, folder / "index", SCAN_SECONDS),
                SCAN_SECONDS + DATA_SECONDS,
                access.DATA_MEND,
            ),
            Check(run_dir_state.LEASE, lambda: run_dir_state.lease(run_dir), ACCESS_SECONDS, mend),
            Check(run_dir_state.EARLIER_RUN, lambda: run_dir_state.earlier_run(settings), ACCESS_SECONDS, mend),
            Check(bucket.SETTINGS, lambda: bucket.bucket_settings(run_dir), ACCESS_SECONDS, mend),
            Check(bucket.REGION, lambda: bucket.regions([*uris, run_dir]), ACCESS_SECONDS, mend),
        ]
    if ranks.local_rank() == 0:
        if (shared := settings.features.uri) is not None and settings.features.use != "never":
            checks.append(Check(access.FEATURES, lambda: access.features_access(shared), ACCESS_SECONDS, mend, "fail"))
        checks += [
            Check(access.RUN_DIR, lambda: access.run_dir_access(run_dir), ACCESS_SECONDS, mend, "fail"),
            Check(network.WEIGHTS, lambda: network.weights(config, images, settings), WEIGHTS_SECONDS, network.MEND),
            Check(cluster.NODES, cluster.nodes, ACCESS_SECONDS, cluster.MEND),
            Check(machine.SHARED_MEMORY, lambda: machine.shared_memory(images), 5.0, machine.SHM_MEND),
            Check(
                machine.CACHE_DISK,
                lambda: machine.cache_disk(images, cache, settings.features),
                5.0,
                "Choose another folder by --data.cache_dir.",
            ),
        ]
    return [*checks, Check(machine.OPEN_FILES, machine.open_files, 5.0, machine.FILES_MEND)]


def _data_checks(config: ModelConfig, images: ImageDataModule, run_dir: str) -> list[Finding]:
    return run_checks(
        [
            Check(data.CLASSES, lambda: data.classes(images, config), DATA_SECONDS, access.DATA_MEND),
            Check(data.SAMPLES, lambda: data.samples(images), DATA_SECONDS, access.DATA_MEND),
            Check(
                run_dir_state.EARLIER_RUN,
                lambda: run_dir_state.resumed_data(images, run_dir),
                DATA_SECONDS,
                "Look at the index in run_dir.",
            ),
            Check(data.OVERLAP, lambda: data.overlap(images), DATA_SECONDS, access.DATA_MEND),
        ]
    )


def _training(
    config: ModelConfig,
    images: ImageDataModule,
    settings: FitSettings,
    folder: Path,
    price_per_hour: float | None,
    *,
    is_far: bool,
    seconds: float,
) -> tuple[list[Finding], Estimate | None]:
    """Measure on all ranks together; only rank 0 has an estimate."""
    if not _share_index(images, folder / "index"):
        message = "samples, steps, memory and loader are not checked, since the data could not be listed."
        return ([] if ranks.rank() else [warn(data.SAMPLES, message, access.DATA_MEND)]), None
    results: list[training.Measured] = []

    def measure() -> list[Finding]:
        aim = min(MEASURING_SHARE * seconds, MOST_MEASURING_SECONDS)
        measured, findings = training.measure(config, images, settings.trainer, folder, aim)
        if measured is not None:
            results.append(measured)
        return findings

    findings = run_check(Check(STEP, measure, seconds, _STEP_MEND))
    if not results:
        return findings, None
    plan = estimates.Plan(config, images, settings.features, settings.checkpoint, results[0])
    result = estimates.estimate(plan, price_per_hour)
    findings += run_check(
        Check(estimates.LOADER, lambda: [estimates.loader(plan, is_far=is_far)], 5.0, access.DATA_MEND)
    )
    if ranks.local_rank() == 0:
        size = results[0].checkpoint_bytes
        check = Check(machine.TEMPORARY_DISK, lambda: [machine.temporary_disk(size)], 5.0, machine.TEMPORARY_MEND)
        findings += run_check(check)
    if ranks.rank() == 0:
        findings += estimates.describe(result)
    return findings, result


def _is_group_unusable(findings: list[Finding]) -> bool:
    """Whether some ranks may be in the middle of a collective operation, so that the process group cannot be closed.

    Where a step is refused on all ranks it is for an option, before any of them waits for another one.
    """
    ended = [finding for finding in findings if finding.check == STEP]
    if ranks.world_size() == 1 or not ended:
        return False
    return len(ended) < ranks.world_size() or any(each.status == "warn" for each in ended)


def _share_index(images: ImageDataModule, folder: Path) -> bool:
    """Let all ranks have the index that rank 0 has made; returns whether there is one."""
    if ranks.world_size() == 1:
        return bool(images.parts)
    files = ranks.from_rank_zero(lambda: _files(Path(images.parts["train"].folder)) if images.parts else None)
    if files is None:
        return False
    if ranks.rank():
        folder.mkdir(mode=0o700)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        images.open_index(folder)
    return True


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _gathered(findings: list[Finding], seconds: float = RANKS_SECONDS) -> list[Finding]:
    """The findings of all ranks, those of rank 0 first; a collective operation.

    Raises:
        RankLost: other ranks do not take part.
    """
    if ranks.world_size() == 1:
        return findings
    gathered: list[Any] = [None] * ranks.world_size()
    try:
        call_within(seconds, lambda: dist.all_gather_object(gathered, findings), "gathering the findings")
    except Exception as error:
        for finding in findings:
            if ranks.rank() and finding.status == "fail":
                log.error("%s: %s %s", finding.check, finding.message, finding.mend)
        raise RankLost(f"the findings of other ranks are missing: {error}") from error
    return [finding for each in gathered for finding in each]
