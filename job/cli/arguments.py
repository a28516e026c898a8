"""Rewrite command-line arguments to the options of a parser: aliases, hyphens, positional arguments and recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from job.config.recipes import resolve_config

TRAINING_ALIASES = {
    "lr": "model.lr",
    "epochs": "trainer.max_epochs",
    "max_epochs": "trainer.max_epochs",
    "batch_size": "data.global_batch_size",
    "patience": "early_stopping",
}
"""Short names of common options of fit and check."""
SWEEP_ALIASES = {
    **{name: f"sweep.{name}" for name in ("lr", "weight_decay", "hidden", "label_smoothing", "class_weights")},
    **{name: f"sweep.{name}" for name in ("dropout", "samples", "folds", "epochs", "batch_size")},
}
"""Short names of options of sweep."""
AUDIT_ALIASES = {
    "batch_size": "data.global_batch_size",
    **{name: f"audit.{name}" for name in ("write_manifest", "leave_out", "labels", "folds")},
    **{name: f"audit.{name}" for name in ("similarity", "thumbnails")},
}
"""Short names of options of audit."""
DATA_ALIASES = {"batch_size": "data.global_batch_size"}
"""Short names of common options of tune, validate and test."""
FIT_COMMANDS = frozenset(["fit", "check"])
"""Commands with the options of a fit."""

FLAGS = frozenset({"help", "help-all", "version", "print_config", "profile", "json", "compile", "from_stdin"})
FLAGS |= {"spot", "vertex", "dry_run", "replace", "overwrite"}
"""Options without a value; every other option takes the next argument, unless its value follows an equals sign."""
_SHORT = {"-c": "--config", "-h": "--help"}


def canonical_arguments(
    args: Sequence[str],
    *,
    options: Collection[str],
    aliases: Mapping[str, str] | None = None,
    positional: Sequence[str] = (),
) -> list[str]:
    """The arguments with every option under the name that the parser knows.

    Args:
        args: arguments of a command, without its name.
        options: names of the parser's options, without dashes.
        aliases: option by alias; an option of the parser itself takes precedence.
        positional: options that may be given without their name, in this order. The first ones are skipped if
            the command line gives them by name. A name that ends with "+", the last, takes all that remain.
    """
    aliases = aliases or {}
    canonical: list[str] = []
    bare: list[str] = []
    named: set[str] = set()
    remaining = list(args)
    while remaining:
        arg = remaining.pop(0)
        arg = _SHORT.get(arg, arg)
        if arg.startswith("-c") and len(arg) > 2:  # -cFILE, -c=FILE
            arg = f"--config={arg[2:].removeprefix('=')}"
        if arg == "--" or not arg.startswith("--"):
            bare.append(arg)
            continue
        written, equals, value = arg[2:].partition("=")
        name = _option_name(written, options, aliases)
        named.add(name)
        if not equals and name not in FLAGS and remaining and not _is_option(remaining[0]):
            equals, value = "=", remaining.pop(0)
        if name == "config" and equals:
            value = resolve_config(value)
        canonical.append(f"--{name}{equals}{value}")
    names = [name for name in positional if name.rstrip("+") not in named]
    if names and names[-1].endswith("+"):  # jsonargparse appends to a list by the same sign
        names += names[-1:] * (len(bare) - len(names))
    canonical += [f"--{name}={value}" for name, value in zip(names, bare, strict=False)]
    return canonical + bare[len(names) :]


def aliases_of(command: str) -> dict[str, str]:
    """Short names of common options of a command that builds a Trainer."""
    if command == "sweep":
        return SWEEP_ALIASES
    if command == "audit":
        return AUDIT_ALIASES
    return TRAINING_ALIASES if command in FIT_COMMANDS else DATA_ALIASES


def option_value(args: Sequence[str], name: str) -> str | None:
    """The last value that canonical arguments give to an option, or None."""
    values = [arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}=")]
    return values[-1] if values else None


def _option_name(written: str, options: Collection[str], aliases: Mapping[str, str]) -> str:
    if written == "help-all" and written not in options:
        return "help"
    if written in options or written in FLAGS:
        return written
    # Only the name: keys of a nested value, as in --trainer.strategy.KEY, are the class's own.
    name = written.replace("-", "_")
    return name if name in options else aliases.get(name, name if name.rpartition(".")[0] in options else written)


def _is_option(arg: str) -> bool:
    return arg.startswith("--") and len(arg) > 2 and arg[2].isalpha()
