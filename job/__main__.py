"""``python -m job``."""

from __future__ import annotations

import sys
import traceback

from job import signals
from job.errors import EXIT_INTERNAL_ERROR


def main() -> None:
    """Run the command line; a signal during its imports, which take seconds, ends it with one line."""
    signals.end_at_once()
    try:
        from job import cli
    except Exception as error:
        traceback.print_exc()
        print(
            f"job: cannot start: {type(error).__name__}: {error}. Is the job installed whole? pip install .",
            file=sys.stderr,
        )
        sys.exit(EXIT_INTERNAL_ERROR)
    cli.main()


if __name__ == "__main__":
    main()
