"""The command line: ``python -m job COMMAND``."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from dataclasses import dataclass

from job.cli import help
from job.cli.known_options import require_known_options
from job.cli.versions import library_versions
from job.cluster import ranks
from job.cluster.environment import require_ranks
from job.errors import EXIT_INTERNAL_ERROR, EXIT_INTERRUPTED, EXIT_USER_ERROR, ConfigError, JobError, Preempted
from job.process import logs, temporary
from job.process.descendants import kill_descendants
from job.process.signals import Stopped, StopSignals
from job.train.errors import translated

log = logging.getLogger("job")

HELP_OPTIONS = frozenset(["-h", "--help", "--help-all"])


@dataclass(frozen=True)
class Command:
    """A command, whose module is imported when it runs.

    Attributes:
        module: the module, which has a function of the command's name.
        summary: its line in ``--help``.
        on_ranks: runs in many processes, and imports Lightning, which takes seconds.
        has_grace: its child processes have a grace of their own at a signal.
        has_check: the module has a function ``check``, too.
    """

    module: str
    summary: str
    on_ranks: bool = False
    has_grace: bool = False
    has_check: bool = False


COMMANDS = {
    "fit": Command(
        "job.cli.fit", "Train a model, or continue its training, in RUN_DIR.", on_ranks=True, has_check=True
    ),
    "tune": Command(
        "job.cli.tune", "Find an initial learning rate and the largest batch that fits.", on_ranks=True, has_check=True
    ),
    "sweep": Command(
        "job.cli.sweep", "Train many heads of a frozen backbone at once, and keep the best.", on_ranks=True
    ),
    "audit": Command(
        "job.cli.audit", "Find wrong labels, copies, outliers and broken images in a data set.", on_ranks=True
    ),
    "validate": Command(
        "job.cli.evaluate", "Evaluate a checkpoint on the validation images.", on_ranks=True, has_check=True
    ),
    "test": Command("job.cli.evaluate", "Evaluate a checkpoint on the test images.", on_ranks=True, has_check=True),
    "predict": Command("job.cli.predict", "Classify images with a checkpoint.", has_check=True),
    "embed": Command("job.cli.embed", "Compute a feature vector per image, and search for similar images."),
    "check": Command("job.cli.check", "Find out before a run what would stop it or slow it down.", on_ranks=True),
    "export": Command("job.cli.export", "Write a model for use without this package: ONNX, torch.export, weights."),
    "serve": Command("job.cli.serve", "Answer predictions over HTTP."),
    "index": Command("job.cli.index", "List a data set ahead of training."),
    "checkpoints": Command("job.cli.checkpoints", "List, verify or clean up the checkpoints of a run."),
    "tensorboard": Command("job.cli.tensorboard", "Look at runs in TensorBoard, wherever they are stored."),
    "report": Command("job.cli.report", "Print the summary of a run, or compare several."),
    "submit": Command("job.cli.submit", "Start a run on Kubernetes or Vertex AI."),
    "status": Command("job.cli.runs", "Say how a submitted run is doing."),
    "logs": Command("job.cli.runs", "Follow the logs of a submitted run."),
    "stop": Command("job.cli.runs", "Stop a submitted run after it has saved."),
    "delete": Command("job.cli.runs", "Delete what a submitted run has in the cluster."),
    "launch": Command("job.cli.launch", "Run a command in all processes of this node.", has_grace=True),
    "demo": Command("job.cli.demo", "Run everything on this machine, with a local bucket.", has_grace=True),
}


def main(argv: list[str] | None = None) -> None:
    """Run one command, and exit by the table of exit codes: 2 with one message for a user's mistake."""
    if code := run(sys.argv[1:] if argv is None else argv):
        sys.exit(code)


def run(args: list[str]) -> int:
    """Run one command; returns the exit code."""
    args = logs.take_options(args)
    try:
        logs.set_up(ranks.rank(), is_rank=not (args and args[0] in COMMANDS and COMMANDS[args[0]].has_grace))
    except ConfigError as error:
        return _report(error)
    if not args or args[0] in HELP_OPTIONS:
        print(_usage())
        return 0 if args else EXIT_USER_ERROR
    if args[0] == "--version":
        print(library_versions())
        return 0
    if args[0] in COMMANDS and COMMANDS[args[0]].on_ranks and not _wants_help(args):
        try:
            require_known_options(args[0], args[1:])
        except ConfigError as error:
            return _report(error)
        log.info("%s: starting %s", library_versions(), args[0])
        # Before signals raise an exception, which C code that imports a module might turn into another one.
        try:
            importlib.import_module(COMMANDS[args[0]].module)
        except ImportError as error:
            log.error("cannot start:", exc_info=error)
            logs.report(f"job: cannot start: {error}. Is the package installed completely? pip install .")
            return EXIT_INTERNAL_ERROR
        except Exception as error:
            return _report(error)
    # LightningCLI warns of arguments that are passed to it if sys.argv has some.
    sys.argv = [sys.argv[0]]
    has_grace = args[0] in COMMANDS and COMMANDS[args[0]].has_grace
    try:
        with StopSignals(None, at_end=kill_descendants) if has_grace else StopSignals(at_end=temporary.remove_all):
            return _exit_code(args)
    except Stopped as stopped:
        return _report(stopped)


def check_start(args: list[str], *, writes: bool) -> int:
    """Check a command's options and its access to data, without running it; returns the exit code.

    Not named ``check``: importing the command of that name sets the attribute to its module.

    Args:
        args: a command that has a check, and its options.
        writes: also check that this process may write to run_dir.
    """
    logs.set_up(ranks.rank(), is_rank=False)
    sys.argv = [sys.argv[0]]
    try:
        importlib.import_module(COMMANDS[args[0]].module).check(args[0], args[1:], writes=writes)
    except Exception as error:
        return _report(translated(error))
    return 0


def _exit_code(args: list[str]) -> int:
    """Run the command ``args[0]``; report what ends it, and return the exit code."""
    try:
        run_command(args[0], args[1:])
    except (Stopped, KeyboardInterrupt) as error:
        return _report(error)
    except Exception as error:
        return _report(translated(error))
    return 0


def run_command(name: str, args: list[str]) -> None:
    """Import a command and run it.

    Raises:
        ConfigError: there is no such command, or its options cannot work.
    """
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"unknown command {name!r}.{hint}\n{_usage()}")
    if name in help.COMMON and _wants_help(args):
        print(help.common_help(name))
        return
    command = COMMANDS[name]
    if command.on_ranks:
        require_ranks(os.environ)
    getattr(importlib.import_module(command.module), name)(args)


def _wants_help(args: list[str]) -> bool:
    return "-h" in args or "--help" in args


def _report(error: BaseException) -> int:
    """Print why the process ends; returns the exit code."""
    rank = f" (rank {ranks.rank()})" if ranks.world_size() > 1 else ""
    if isinstance(error, Preempted):
        log.warning("%s", error)
        return error.exit_code
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        logs.report(f"job: {error or 'stopped by SIGINT.'}{rank}", logging.WARNING)
        return error.exit_code if isinstance(error, Stopped) else EXIT_INTERRUPTED
    if isinstance(error, JobError):
        logs.report(f"job: error{rank}: {error}")
        return error.exit_code
    log.error("unexpected exception:", exc_info=error)
    first_line = next(iter(str(error).splitlines()), "")
    logs.report(
        f"job: unexpected error{rank}: {type(error).__name__}: {first_line}. See the traceback above: a bug of job, "
        "or of a callback, transform or library that it uses."
    )
    return EXIT_INTERNAL_ERROR


def _usage() -> str:
    lines = [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: python -m job COMMAND [options]\n\n"
        + "\n".join(lines)
        + f"\n\n{logs.HELP}"
        + "\n\npython -m job COMMAND --help shows the options of a command, python -m job --version all versions."
    )
