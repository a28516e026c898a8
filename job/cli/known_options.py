"""Names of all options of the commands that build a Trainer, known without importing Lightning.

``option_names.txt`` has one line per command. ``make golden`` writes it, and ``tests/unit/test_cli.py`` compares it
with the parsers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from job.cli import messages
from job.cli.arguments import FLAGS, aliases_of, canonical_arguments
from job.config.reserved import RESERVED, reserved_error
from job.errors import ConfigError

FILE = Path(__file__).with_name("option_names.txt")


def option_names(command: str) -> frozenset[str]:
    """Options of a command, without dashes; none for a command whose parser is quickly built."""
    lines = (line.split() for line in FILE.read_text().splitlines())
    return next((frozenset(names) for name, *names in lines if name == command), frozenset())


def require_known_options(command: str, args: Sequence[str]) -> None:
    """Check the names of a command's options before it imports anything that takes seconds.

    Raises:
        ConfigError: an option does not exist; the message suggests another one.
    """
    names = option_names(command)
    if not names:
        return
    aliases = aliases_of(command)
    canonical = canonical_arguments(args, options=names, aliases=aliases, positional=("run_dir",))
    options = [(arg, arg[2:].partition("=")[0]) for arg in canonical if arg.startswith("--") and len(arg) > 2]
    unknown = [(arg, name) for arg, name in options if name not in FLAGS and not _is_known(name, names)]
    for _, name in unknown:
        if name.startswith("trainer.") and (reserved := name.split(".")[1]) in RESERVED:
            raise reserved_error(reserved)
    if unknown:
        message = f"unrecognized arguments: {' '.join(arg for arg, _ in unknown)}"
        raise ConfigError(f"{messages.explain(message, dict.fromkeys(names), [], aliases)}\nSee --help.")


def _is_known(name: str, names: frozenset[str]) -> bool:
    """Whether the option exists, or may be an argument of the class that an option names."""
    if name in names:
        return True
    while name := name.rpartition(".")[0]:
        if name in names:
            return not any(each.startswith(f"{name}.") and each != f"{name}.help" for each in names)
    return False
