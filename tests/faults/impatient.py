"""``python -m job`` that waits a tenth as long for a bucket that does not answer: ``python -m impatient fit …``."""

from __future__ import annotations

import asyncio
import functools
from types import SimpleNamespace

import gcsfs.retry

from job import cli
from job.monitoring.tensorboard import logger
from job.resilience import lease
from job.train import fit

if __name__ == "__main__":
    gcsfs.retry.asyncio = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 10))
    logger.CLOSE_SECONDS /= 10
    lease.RELEASE_SECONDS /= 10
    fit.Lease = functools.partial(lease.Lease, seconds=3.0)  # type: ignore[assignment,misc]
    cli.main()
