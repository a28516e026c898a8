from __future__ import annotations

from support import REPOSITORY, run_well


def test_the_configuration_reference_is_what_help_says() -> None:
    committed = (REPOSITORY / "docs" / "configuration.txt").read_text()
    assert run_well("fit", "--help-all", COLUMNS="120").stdout == committed, "make reference writes it anew"
