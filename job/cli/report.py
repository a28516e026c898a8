"""``python -m job report``: the summary of a run, or a comparison of several."""

from __future__ import annotations

from json import dumps, loads

import msgspec

from job.cli.parser import call_with_options
from job.monitoring.report.comparison import compare, print_comparison, runs_in
from job.monitoring.report.files import read_report
from job.monitoring.report.summary import print_results


def report(args: list[str]) -> None:
    """Run ``python -m job report ARGS``."""
    call_with_options("report", main, args, positional=("run_dirs+",))


def main(run_dirs: list[str], json: bool = False) -> None:
    """Print the summary of a run, or compare several.

    Args:
        run_dirs: folder of a run; several, or a folder of such folders, are compared, the best run first.
        json: print JSON: all of report.json for one run, a list with an object per run for several.
    """
    runs = runs_in(run_dirs)
    if len(runs) > 1 or runs != run_dirs:
        rows = compare(runs)
        if json:
            _print_json(msgspec.json.encode(rows))
        else:
            print_comparison(rows)
        return
    (run_dir,) = runs
    content = read_report(run_dir)
    if json:
        _print_json(msgspec.json.encode(content))
    else:
        print_results(content, run_dir)


def _print_json(content: bytes) -> None:
    """Print JSON, in ASCII: other people's names have no control characters there, and any terminal can show it."""
    print(dumps(loads(content), indent=2))
