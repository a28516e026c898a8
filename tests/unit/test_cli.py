from __future__ import annotations

import subprocess
import sys

import pytest
from cli.options import GOLDEN, command_line, option_names, type_name
from support import REPOSITORY, environment, run_well

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


THREAD_IN_TORCH = """
import sys, threading, torch
torch.set_num_threads(1)
image = torch.zeros(1, 3, 600, 600, dtype=torch.uint8)
def resize():
    while True:
        torch.nn.functional.interpolate(image, size=(160, 160), mode="bilinear", antialias=True)
threading.Thread(target=resize, daemon=True).start()
sys.argv = ["job", "fitt"]
from job.__main__ import main
main()
"""


SIGNAL_AT_THE_END = """
import os, signal, sys
from job.process import temporary
temporary.remove_all = lambda: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["job", "fitt"]
from job.__main__ import main
main()
"""


@pytest.mark.parametrize("code", [THREAD_IN_TORCH, SIGNAL_AT_THE_END], ids=["thread", "signal"])
def test_what_happens_while_a_process_ends_does_not_change_its_exit_code(code: str) -> None:
    """Where Python finalizes while a thread is within torch, the process aborts with 134."""
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr
    assert "unknown command 'fitt'" in ended.stderr
    assert "terminate called" not in ended.stderr
    assert "while starting" not in ended.stderr
