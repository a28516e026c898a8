"""``python -m job fit``."""

from __future__ import annotations

import logging

from job import checkpoint, storage
from job.cli.training import TrainingCLI
from job.cluster import ranks
from job.errors import (
    CheckpointError,
    ConfigError,
)
from job.monitoring.report import Report, print_summary
from job.monitoring.tensorboard import BucketTensorBoardLogger, events_uri
from job.process import temporary
from job.resilience import attempts
from job.resilience.divergence import last_checkpoint_named
from job.resilience.lease import Lease
from job.resilience.preemption import Preemption
from job.train.errors import translate_errors
from job.train.trainer import training_trainer

log = logging.getLogger("job")


def fit(args: list[str]) -> None:
    """Train, or continue training, a model into run_dir."""
    cli = TrainingCLI("fit", args)
    options = cli.config_init
    run_dir, lease = options["run_dir"], Lease(options["run_dir"])
    with (
        options["watchdog"].stopped_at_end(),
        Preemption(options["grace"]) as preemption,
        ranks.process_group(options["watchdog"].startup_seconds),
        lease.released_at_end(),
    ):
        ranks.from_rank_zero(lease.acquire)
        if ranks.local_rank() == 0:
            temporary.delete_stale()
        resumed = ranks.from_rank_zero(lambda: _resume_point(run_dir, options["resume"]))
        cli.datamodule.before_write = lease.require_held
        step, config = resumed.global_step if resumed else -1, cli.config_yaml()
        before = ranks.from_rank_zero(lambda: attempts.begin(run_dir, step, config, lease.require_held))
        with (
            attempts.counted(run_dir, before if ranks.rank() == 0 else None, lease.require_held),
            translate_errors(cli.datamodule.global_batch_size),
            last_checkpoint_named(run_dir, options["checkpoint"].io),
        ):
            trainer = training_trainer(
                dict(options["trainer"]),
                run_dir,
                config=config,
                checkpointer=options["checkpoint"],
                features=options["features"],
                profile=options["profile"],
                watchdog=options["watchdog"],
                preemption=preemption,
                lease=lease,
                logger=BucketTensorBoardLogger(
                    events_uri(run_dir),
                    purge_step=resumed.global_step if resumed else 0,
                    before_write=lease.require_held,
                ),
            )
            if resumed:
                cli.model.weights = "none"  # the checkpoint brings them
                log.info("going on after step %d, epoch %d", resumed.global_step, resumed.epoch)
            preemption.training = True
            trainer.fit(
                cli.model,
                datamodule=cli.datamodule,
                ckpt_path=storage.join(run_dir, checkpoint.FOLDER, resumed.file) if resumed else None,
            )
            preemption.training = False
            if trainer.is_global_zero:
                print_summary(run_dir, next(c.content for c in trainer.callbacks if isinstance(c, Report)))  # type: ignore[attr-defined]


def _resume_point(run_dir: str, resume: str) -> checkpoint.Manifest | None:
    if resume == "never":
        found = checkpoint.scan(run_dir)
        if count := len(found.good) + len(found.damaged) + len(found.newer):
            raise ConfigError(
                f"{run_dir} holds {count} checkpoint(s) of an earlier run, and --resume is never. "
                "Choose another --run_dir, or --resume=auto."
            )
        return None
    newest = checkpoint.newest_trusted(run_dir)
    if newest is None and resume == "must":
        raise CheckpointError(f"--resume is must, but {run_dir} holds no checkpoint.")
    return newest
