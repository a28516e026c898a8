from __future__ import annotations

import pytest
from cli.options import GOLDEN, command_line, option_names, type_name
from support import REPOSITORY, run_well

from job.cli.known_options import FILE, require_known_options
from job.errors import ConfigError


def test_the_configuration_reference_equals_the_help() -> None:
    committed = (REPOSITORY / "docs" / "configuration.txt").read_text()
    assert run_well("fit", "--help-all", COLUMNS="120").stdout == committed, "make reference writes it anew"


def test_the_command_line_is_as_committed() -> None:
    """Commands, options, types and defaults are an interface: commit the golden file with an intended change."""
    assert command_line() == GOLDEN.read_text(), "make golden writes it anew"


def test_the_list_of_option_names_is_complete() -> None:
    assert option_names() == FILE.read_text(), "make golden writes it anew"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--data.rot=x"], "unrecognized arguments: --data.rot=x\nDid you mean --data.root?\nSee --help."),
        (["--fooo", "3"], "unrecognized arguments: --fooo=3\nSee --help."),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate=1\nDid you mean --lr?\nSee --help."),
        (["--trainer.devices=2"], "--trainer.devices is reserved: job itself sets this argument of the Trainer."),
        (["--epochs", "3", "--data.root", "x", "--profile", "--print_config", "-c", "head"], None),
        (["--trainer.strategy.bucket_cap_mb=5", "--model.optimizer.lr", "1", "--trainer.callbacks+=X"], None),
        (["--model.optimizer.help", "AdamW", "--data.global-batch-size=8", "runs/1"], None),
    ],
)
def test_a_misspelt_option_is_refused_before_anything_is_imported(args: list[str], expected: str | None) -> None:
    if expected is None:
        require_known_options("fit", args)
        return
    with pytest.raises(ConfigError) as excinfo:
        require_known_options("fit", args)
    assert str(excinfo.value) == expected


def test_types_are_written_alike_whatever_typing_has_cached() -> None:
    assert type_name(int | float | None) == type_name(float | int | None) == "float | int | null"
