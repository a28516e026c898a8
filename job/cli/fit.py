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


def check(verb: str, args: list[str], *, writes: bool) -> None:
    """Check the options of ``python -m job fit ARGS``, and access to its data and run_dir."""
    cli = TrainingCLI(verb, args)
    options = cli.config_init
    check_fit(cli.model_config, cli.datamodule, options["run_dir"], writes=writes, init_from=options["init_from"])
