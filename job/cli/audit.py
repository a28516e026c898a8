"""``python -m job audit``: find wrong labels, copies, outliers and broken images in a data set."""

from __future__ import annotations

from job.audit.run import Audit
from job.cli.evaluate import EVALUATION_TIMEOUT, with_saved_config
from job.cli.training import TrainingCLI
from job.cluster import ranks
from job.train.errors import translate_errors
from job.train.trainer import evaluating_trainer


def audit(args: list[str]) -> None:
    """Run ``python -m job audit ARGS``."""
    with with_saved_config(args, trains=True) as configured:
        cli = TrainingCLI("audit", configured)
    options = cli.config_init
    with ranks.process_group(EVALUATION_TIMEOUT), translate_errors(cli.datamodule.global_batch_size):
        trainer = evaluating_trainer(dict(options["trainer"]), options["run_dir"])
        settings, ckpt = options["audit"], options["ckpt"]
        Audit(cli.model_config, cli.datamodule, settings, trainer, options["run_dir"], ckpt).run()
