"""``python -m job fit``."""

from __future__ import annotations

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
