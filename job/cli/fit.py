"""``python -m job fit``."""

from __future__ import annotations

from job.check.start import check as check_fit
from job.cli.training import TrainingCLI
from job.cluster import ranks
from job.monitoring.report.summary import print_summary
from job.train.fit import fit as train


def fit(args: list[str]) -> None:
    """Run ``python -m job fit ARGS``: train a model, or continue an interrupted run."""
    cli = TrainingCLI("fit", args)
    report = train(cli.model_config, cli.datamodule, cli.fit_settings())
    if ranks.rank() == 0:
        print_summary(report)


def check(args: list[str], *, writes: bool) -> None:
    """Check the options of ``python -m job fit ARGS``, and access to its data and run_dir."""
    cli = TrainingCLI("fit", args)
    check_fit(cli.model_config, cli.datamodule, cli.config_init["run_dir"], writes=writes)
