"""The command line: ``python -m job COMMAND``."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable

from job.cli.evaluate import test, validate
from job.cli.fit import fit
from job.cli.parser import call_with_options
from job.cli.tune import tune
from job.cluster import ranks
from job.cluster.environment import require_ranks
from job.config.import_policy import set_parsing_rules
from job.errors import EXIT_INTERNAL_ERROR, EXIT_INTERRUPTED, EXIT_USER_ERROR, ConfigError, JobError, Preempted
from job.process import temporary
from job.process.descendants import kill_descendants
from job.process.ending import end_process, flush_output
from job.process.signals import Stopped, StopSignals
from job.process.terminal import protect_output, say
from job.train.errors import translated

log = logging.getLogger("job")


def predict(args: list[str]) -> None:
    """Classify images with a checkpoint."""
    from job.predict import main as predict_main

    call_with_options("predict", predict_main, args)


def index(args: list[str]) -> None:
    """List a data set ahead of training."""
    from job.data.index.build import main as index_main

    call_with_options("index", index_main, args, positional=True)


def checkpoints(args: list[str]) -> None:
    """List, verify or clean up the checkpoints of a run."""
    from job.cli.checkpoints import main as checkpoints_main

    call_with_options("checkpoints", checkpoints_main, args, positional=True)


def launch(args: list[str]) -> None:
    """Start the ranks of this node by torchrun: launch fit …, in a container of any platform."""
    from job.cluster.launch import launch as start

    if not args or args[0] not in VERBS or args[0] in ("launch", "demo"):
        raise ConfigError("launch takes another command and its options: python -m job launch fit --data.root …")
    sys.exit(start(args, run, MODULES.get(args[0], [])))


def demo(args: list[str]) -> None:
    """Run the whole job on this machine, with a bucket of its own."""
    from job.demo import main as demo_main

    call_with_options("demo", demo_main, args)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "fit": fit,
    "tune": tune,
    "validate": validate,
    "test": test,
    "predict": predict,
    "index": index,
    "checkpoints": checkpoints,
    "launch": launch,
    "demo": demo,
}
RANKED_VERBS = ("fit", "tune", "validate", "test")
"""Those that run on many processes."""
MODULES = {
    "fit": ["job.cli.fit"],
    "tune": ["job.cli.tune"],
    "validate": ["job.cli.evaluate"],
    "test": ["job.cli.evaluate"],
}
"""Modules of the verbs in RANKED_VERBS: launch imports them once for all ranks of a node."""


def main(argv: list[str] | None = None) -> None:
    """Run one verb, and exit by the table in README: 2 with one message for a user's mistake."""
    if code := run(sys.argv[1:] if argv is None else argv):
        if ranks.world_size() > 1:
            end_process(code)
        flush_output()
        sys.exit(code)


def run(args: list[str]) -> int:
    """Run one verb; returns the exit code."""
    _set_up_logging()
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else EXIT_USER_ERROR
    # LightningCLI looks at sys.argv, and would warn of arguments given to it besides.
    sys.argv = [sys.argv[0]]
    waits = args[0] in ("launch", "demo")  # for processes that have a grace of their own
    try:
        with StopSignals(None, at_end=kill_descendants) if waits else StopSignals(at_end=temporary.remove_all):
            return _exit_code(args)
    except Stopped as stopped:
        return _report(stopped)


def _exit_code(args: list[str]) -> int:
    """Run the verb ``args[0]``; report what ends it, and return the exit code."""
    try:
        if args[0] not in VERBS:
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown command {args[0]!r}.{hint}\n{_usage()}")
        if args[0] in RANKED_VERBS:
            require_ranks(os.environ)
        VERBS[args[0]](args[1:])
    except (Stopped, KeyboardInterrupt) as error:
        return _report(error)
    except Exception as error:
        return _report(translated(error))
    return 0


def _report(error: BaseException) -> int:
    """Tell the user what ended the process; returns the exit code."""
    rank = f" (rank {ranks.rank()})" if ranks.world_size() > 1 else ""
    if isinstance(error, Preempted):
        log.warning("%s", error)
        return error.exit_code
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        say(f"job: {error or 'stopped by SIGINT.'}{rank}", file=sys.stderr)
        return error.exit_code if isinstance(error, Stopped) else EXIT_INTERRUPTED
    if isinstance(error, JobError):
        say(f"job: error{rank}: {error}", file=sys.stderr)
        return error.exit_code
    log.error("this should not have happened:", exc_info=error)
    first_line = next(iter(str(error).splitlines()), "")
    say(
        f"job: unexpected error{rank}: {type(error).__name__}: {first_line}. The traceback above shows where: a fault "
        "of the job, or of a callback, transform or library that it was given.",
        file=sys.stderr,
    )
    return EXIT_INTERNAL_ERROR


def _usage() -> str:
    lines = [f"  {name:<10}{verb.__doc__}" for name, verb in VERBS.items()]
    return "usage: python -m job COMMAND [options]\n\n" + "\n".join(lines) + "\n\npython -m job COMMAND --help"


def _set_up_logging() -> None:
    # Python's own accountant of semaphores complains about processes that were killed; it is another process.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    rank = ranks.rank()
    logging.basicConfig(
        format=f"%(asctime)s {'' if rank == 0 else f'[rank {rank}] '}%(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if rank == 0 else logging.WARNING,
        stream=sys.stderr,
        force=True,
    )
    for name in ("httpx", "fsspec", "google", "torch.distributed", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs a traceback for each request that fails; our own error says what failed.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Values logged at validation come from synchronised metrics: they agree on all ranks already.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    # The frozen backbone is in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    protect_output()
    set_parsing_rules()
