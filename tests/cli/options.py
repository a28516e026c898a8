"""The command line as text, for the comparison with options.txt: ``python tests/cli/options.py`` writes it."""

from __future__ import annotations

import argparse
import types
import typing
from pathlib import Path
from typing import Any

from job.cli import COMMANDS, run_command
from job.cli.arguments import FLAGS
from job.cli.known_options import FILE
from job.cli.parser import ParserMixin

GOLDEN = Path(__file__).with_name("options.txt")


class Built(Exception):
    """The parser of a command is complete."""


def parser_of(command: str) -> ParserMixin:
    """The parser of a command."""
    original = ParserMixin.parse_args

    def stop(self: ParserMixin, *args: Any, **kwargs: Any) -> None:
        raise Built(self)

    try:
        ParserMixin.parse_args = stop  # type: ignore[assignment,method-assign]
        run_command(command, [])
    except Built as built:
        parser: ParserMixin = built.args[0]
        return parser
    finally:
        ParserMixin.parse_args = original  # type: ignore[method-assign]
    raise AssertionError(f"{command} parses nothing")


def command_line() -> str:
    """All commands with their positional arguments, aliases, and options with type and default."""
    blocks = []
    for command in COMMANDS:
        if command == "launch":
            blocks.append("launch COMMAND [options of the command]")
            continue
        parser = parser_of(command)
        lines = [" ".join([command, *(f"[{name}]" for name in parser.positional)])]
        lines += [f"  --{alias} = --{option}" for alias, option in sorted(parser.aliases.items())]
        lines += sorted(line for action in parser._actions for line in _lines(action))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def option_names() -> str:
    """The names of all options of the commands that build a Trainer, a command per line."""
    lines = []
    for command in (name for name, each in COMMANDS.items() if each.on_ranks):
        names = {name[2:] for name in parser_of(command)._option_string_actions if name.startswith("--")}
        lines.append(" ".join([command, *sorted(names)]))
    return "\n".join(lines) + "\n"


def _lines(action: argparse.Action) -> list[str]:
    names = [name.removeprefix("--") for name in action.option_strings if name.startswith("--")]
    # Options that jsonargparse adds for a class or a group, and by which a list grows.
    names = [name for name in names if not name.endswith((".help", "+"))]
    if not names or (action.default == argparse.SUPPRESS and names[0] not in FLAGS):
        return []
    if action.nargs == 0 or names[0] in FLAGS:
        return [f"  --{name}" for name in names]
    kind = type_name(getattr(action, "_typehint", action.type))
    required = " required" if getattr(action, "_required", action.required) else f" default {action.default!r}"
    return [f"  --{name}: {kind}{required}" for name in names]


def type_name(kind: Any) -> str:
    """A type as text that does not depend on the order of a union's members, which typing caches."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(sorted(map(type_name, args)))
    if origin is typing.Literal:
        return " ".join(map(str, dict.fromkeys(map(str, args))))
    if kind is None or kind is type(None):
        return "null"
    if isinstance(kind, list):
        return ", ".join(map(type_name, kind))
    name = getattr(origin or kind, "__name__", str(kind))
    return f"{name}[{', '.join(map(type_name, args))}]" if args else name


if __name__ == "__main__":
    GOLDEN.write_text(command_line())
    FILE.write_text(option_names())
