"""``python -m job tune``."""

from __future__ import annotations

import sys
from dataclasses import replace

from job import storage
from job.check.start import check as check_fit
from job.checkpoint.initial import initial_checkpoint
from job.cli.evaluate import EVALUATION_TIMEOUT
from job.cli.training import TrainingCLI
from job.cluster import ranks
from job.model.module import TransferLearningModel
from job.monitoring.report.summary import print_suggestions
from job.storage.json_files import write_json
from job.train.batch_size_finder import BatchSizeFinder
from job.train.errors import translate_errors
from job.train.trainer import tuning_trainer


def tune(args: list[str]) -> None:
    """Run ``python -m job tune ARGS``: find an initial learning rate and the largest batch that fits."""
    cli = TrainingCLI("tune", args)
    options = cli.config_init
    rates, batches = options["lr_finder"], BatchSizeFinder()
    # What trains in the first epoch trains in all steps, at rates that no schedule sets.
    milestones = [epoch if epoch == 0 else sys.maxsize for epoch in cli.model_config.milestones]
    config = replace(cli.model_config, lr_scheduler=None, lr_interval="epoch", milestones=milestones)
    with ranks.process_group(EVALUATION_TIMEOUT):
        source = options["init_from"]
        init_from = ranks.from_rank_zero(lambda: initial_checkpoint(source)) if source else None
        # The learning rate range test diverges on purpose.
        model = TransferLearningModel(check_finite=False, init_from=init_from, **vars(config))
        with translate_errors(cli.datamodule.global_batch_size):
            trainer = tuning_trainer(dict(options["trainer"]), options["run_dir"], rates, batches)
            trainer.fit(model, datamodule=cli.datamodule)
        suggestion, world_size = rates.suggestion(), ranks.world_size()
        if trainer.is_global_zero:
            result = {
                "lr": suggestion,
                "global_batch_size_at_most": batches.per_rank * world_size,
                "bytes_per_image": batches.bytes_each,
                "world_size": world_size,
                "optimizer": rates.optimizer,
                "rates": rates.rates,
                "losses": rates.losses,
            }
            write_json(storage.join(options["run_dir"], "tune.json"), result)
            print_suggestions(result)


def check(verb: str, args: list[str], *, writes: bool) -> None:
    """Check the options of ``python -m job tune ARGS``, and access to its data and run_dir."""
    cli = TrainingCLI(verb, args)
    options = cli.config_init
    check_fit(cli.model_config, cli.datamodule, options["run_dir"], writes=writes, init_from=options["init_from"])
