"""The report of a check on a terminal."""

from __future__ import annotations

from job.check.finding import CheckReport, Finding
from job.process.terminal import print_table, say


def print_report(report: CheckReport) -> None:
    """Print a table of the findings, and below it what to do; good news of other ranks than 0 is left out."""
    shown = [each for each in report.findings if each.rank == 0 or each.status != "ok"]
    rows = [(each.status, _name(each), each.message) for each in shown]
    print_table(["status", "check", "finding"], rows)
    for each in shown:
        if each.mend:
            say(f"{each.status} {_name(each)}: {each.mend}")
    counts = {status: sum(each.status == status for each in report.findings) for status in ("ok", "warn", "fail")}
    listed = ", ".join(f"{count} {status}" for status, count in counts.items())
    say(f"{len(report.findings)} findings in {report.seconds:.0f} s: {listed}")


def _name(finding: Finding) -> str:
    return f"{finding.check} (rank {finding.rank})" if finding.rank else finding.check
