from __future__ import annotations

from cli.options import GOLDEN, command_line, type_name
from support import REPOSITORY, run_well


def test_the_configuration_reference_is_what_help_says() -> None:
    committed = (REPOSITORY / "docs" / "configuration.txt").read_text()
    assert run_well("fit", "--help-all", COLUMNS="120").stdout == committed, "make reference writes it anew"


def test_the_command_line_is_as_committed() -> None:
    """Commands, options, types and defaults are an interface: a change is either a mistake or to be committed."""
    assert command_line() == GOLDEN.read_text(), "make golden writes it anew"


def test_types_are_written_alike_whatever_typing_has_cached() -> None:
    assert type_name(int | float | None) == type_name(float | int | None) == "float | int | null"
