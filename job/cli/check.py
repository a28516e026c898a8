"""``python -m job check``: find out before a run what would stop it or slow it down."""

from __future__ import annotations

from json import dumps, loads

import msgspec

from job.check.finding import CheckReport, ChecksFailed
from job.check.preflight import preflight
from job.check.runner import are_unfinished
from job.check.table import print_report
from job.cli.training import TrainingCLI
from job.cluster import ranks
from job.process.ending import end_process


def check(args: list[str]) -> None:
    """Run ``python -m job check ARGS``: the options of fit, without training.

    Raises:
        ChecksFailed: at least one check has failed.
    """
    cli = TrainingCLI("check", args)
    options = cli.config_init
    report = preflight(cli.model_config, cli.datamodule, cli.fit_settings(), options["price_per_hour"])
    if ranks.rank() == 0:
        if options["json"]:
            # In ASCII, as the JSON of a report: names of classes and files are other people's.
            print(dumps(loads(msgspec.json.encode(report)), indent=2))
        else:
            print_report(report)
    if message := _failures(report):
        raise ChecksFailed(message)
    if are_unfinished():
        end_process(0)


def _failures(report: CheckReport) -> str:
    """Names of the checks that have failed; empty if none has."""
    failed = list(dict.fromkeys(finding.check for finding in report.findings if finding.status == "fail"))
    return f"{len(failed)} check(s) failed: {', '.join(failed)}." if failed else ""
