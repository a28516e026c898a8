"""A process that writes to a run_dir whenever it holds the lease: ``python contender.py RUN_DIR NAME LOG SECONDS``.

Each line of the log is an event with its time, by the clock of this machine, which the server shares.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from job import storage
from job.errors import LeaseError, StorageOutage
from job.resilience.lease import Lease


def main(run_dir: str, name: str, log: Path, seconds: float) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*fields: object) -> None:
        os.write(descriptor, (" ".join(map(str, fields)) + "\n").encode())

    number = 0
    while True:
        lease = Lease(run_dir, seconds=seconds)
        try:
            lease.acquire()
            at = time.time()
            lease.require_held()  # a process that was slow may have lost it again: it held the lease only before ``at``
        except (LeaseError, StorageOutage):
            time.sleep(seconds / 20)
            continue
        note("acquired", at)
        while True:
            try:
                checked: list[float] = []

                def check(lease: Lease = lease, checked: list[float] = checked) -> None:
                    lease.require_held()
                    checked.append(time.time())

                storage.write_bytes(f"{run_dir}/{name}-{number}", b"x", check)
                note("wrote", checked[0], time.time(), number)
            except LeaseError:
                note("lost", time.time())
                break
            except StorageOutage:
                pass
            number += 1
            time.sleep(0.05)
        lease.release()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
