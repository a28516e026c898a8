"""``python -m job`` with a lease of SECONDS: ``python -m short_lease SECONDS fit …``."""

from __future__ import annotations

import functools
import sys

from job import cli
from job.resilience.lease import Lease
from job.train import fit

if __name__ == "__main__":
    fit.Lease = functools.partial(Lease, seconds=float(sys.argv.pop(1)))  # type: ignore[assignment,misc]
    cli.main()
