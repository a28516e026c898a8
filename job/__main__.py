"""``python -m job``."""

from __future__ import annotations

import sys
import traceback

from job.errors import EXIT_INTERNAL_ERROR
from job.process import log_format, signals


def main() -> None:
    """Run the command line; a signal during its imports, which take seconds, ends it with one line."""
    signals.end_at_once()
    try:
        from job import cli
        from job.process.ending import end_process
    except Exception as error:
        message = (
            f"job: cannot start: {type(error).__name__}: {error}. Is the package installed completely? pip install ."
        )
        if log_format.log_format() == "json":
            message = log_format.json_line("ERROR", message, stack_trace=traceback.format_exc())
        else:
            traceback.print_exc()
        print(message, file=sys.stderr)
        sys.exit(EXIT_INTERNAL_ERROR)
    code: object = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
        raise
    finally:
        signals.end_at_once(code if isinstance(code, int) else int(code is not None))
        if isinstance(code, int) and code:
            end_process(code)


if __name__ == "__main__":
    main()
