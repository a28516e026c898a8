"""Uses of argparse's private API: neither argparse nor jsonargparse has a public list of a parser's options.

``tests/unit/test_arguments.py`` fails where a release of Python changes it. Upstream:
https://github.com/python/cpython/issues/144932, https://github.com/python/cpython/issues/125363.
"""

from __future__ import annotations

import argparse


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All options of a parser, in the order in which they were added."""
    return parser._actions


def option_names(parser: argparse.ArgumentParser) -> set[str]:
    """The names of all options, without dashes."""
    return {name.removeprefix("--") for name in parser._option_string_actions if name.startswith("--")}
