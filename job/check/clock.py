"""This machine's clock against that of the store."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from job.check.finding import Finding, fail, ok, warn

CLOCK = "clock"
RESOLUTION_SECONDS = 1.0
"""Of the time at which a store says an object was written."""
NOTICEABLE_SECONDS = 5.0
"""Difference from which on times in logs and reports mislead."""
REFUSED_SECONDS = 300.0
"""Difference from which on signed requests are refused: 5 min for Google's tokens, 15 min for S3."""
_MEND = "Synchronise the clock of this machine (chrony, or systemd-timesyncd)."


def compare_clocks(modified: datetime | None, before: float, after: float) -> Iterator[Finding]:
    """The difference of the clocks.

    Args:
        modified: when an object was written, by the store's clock; None: the store does not say.
        before: time just before it was written, by this machine's clock.
        after: time just after.
    """
    if modified is None:
        yield warn(CLOCK, "the store does not say when an object was written: the clocks cannot be compared.", _MEND)
        return
    store = modified.timestamp()
    skew = max(before - RESOLUTION_SECONDS - store, store - after - RESOLUTION_SECONDS, 0.0)
    direction = "ahead of" if store < before else "behind"
    message = f"the clock of this machine is {skew:,.0f} s {direction} that of the store of --run_dir."
    if skew >= REFUSED_SECONDS:
        yield fail(CLOCK, f"{message} Stores refuse requests that are signed at another time.", _MEND)
    elif skew >= NOTICEABLE_SECONDS:
        yield warn(CLOCK, message, _MEND)
    else:
        yield ok(CLOCK, "the clocks of this machine and of the store of --run_dir agree.")
