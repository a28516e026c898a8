"""``python -m job check``: find out before a run what would stop it or slow it down."""

from __future__ import annotations

from json import dumps, loads

import msgspec

from job.check.finding import CheckReport, ChecksFailed, ChecksUnanswered
from job.check.preflight import preflight
from job.check.runner import are_unfinished
from job.check.table import print_report
from job.cli.training import TrainingCLI
from job.cluster import ranks
from job.process import logs
from job.process.ending import end_process


def check(args: list[str]) -> None:
    """Run ``python -m job check ARGS``: the options of fit, without training.

    Raises:
        ChecksFailed: at least one check has failed.
        ChecksUnanswered: the same, and each of them may succeed later.
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
    error = _error(report)
    if are_unfinished():
        if error:
            logs.report(f"job: error: {error}")
        end_process(error.exit_code if error else 0)
    if error:
        raise error


def _error(report: CheckReport) -> ChecksFailed | None:
    """The error that names the checks that have failed."""
    failures = [finding for finding in report.findings if finding.status == "fail"]
    names = list(dict.fromkeys(finding.check for finding in failures))
    if not names:
        return None
    message = f"{len(names)} check(s) failed: {', '.join(names)}."
    return (ChecksUnanswered if all(finding.temporary for finding in failures) else ChecksFailed)(message)
