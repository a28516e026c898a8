"""Error messages of the parser in plain words, with suggestions."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, such as [1, 2]",
    "tuple": "a list, such as [1, 2]",
    "dict": "a mapping, such as {a: 1}",
    "NoneType": "null",
}
_SYNONYMS = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "max_epoch": "epochs",
    "bs": "batch_size",
    "global_batch_size": "data.global_batch_size",
    "output": "run_dir",
    "output_dir": "run_dir",
    "out": "run_dir",
    "default_root_dir": "run_dir",
    "data": "data.root",
    "data_dir": "data.root",
    "dataset": "data.root",
    "workers": "data.num_workers",
    "arch": "model.backbone",
    "model": "model.backbone",
    "pretrained": "model.weights",
    "checkpoint": "ckpt",
    "ckpt_path": "ckpt",
    "seed": "seed_everything",
    "hflip": "tta",
    "amp": "trainer.precision",
}
"""Names of options in other programs, with the option here."""
_CLASS = "the name of a class"
_NO_CLASS = re.compile(r"Expected a dot import path string: (.*)")
_NO_CALLABLE = re.compile(r"Type typing\.Callable\[.*\] expects a function or a callable class: (.*)\. Got value: .*")
_RESTRICTION = re.compile(r"does not conform to restriction v\s*(>=|>|<=|<)\s*([\d.]+)")
_NESTED = re.compile(r"NestedArg\(key='([\w.]+)', val='(.*)'\)")
"""An argument of a class that an option names, as jsonargparse writes it."""
_RESTRICTIONS = {">": "above", ">=": "at least", "<": "below", "<=": "at most"}


def explain(
    message: str, options: Mapping[str, argparse.Action | None], arguments: Sequence[str], aliases: Mapping[str, str]
) -> str:
    """The message of jsonargparse, without Python's types.

    Args:
        options: the parser's actions by option; None where no parser was built.
        arguments: the canonical arguments that were parsed.
        aliases: option by alias.
    """
    message = message.strip()
    if match := re.match(r'Parser key "(?P<key>[^"]+)":(?P<body>.*)', message, re.DOTALL):
        return _explain_value(match["key"], match["body"], options, arguments)
    if match := re.match(r"Option '(\w+)' is not accepted", message):
        close = difflib.get_close_matches(match[1], options, n=1, cutoff=0.6)
        return f"the class has no argument {match[1]!r}.{f' Did you mean {close[0]}?' if close else ''}"
    return f"{message}{_suggest_options(message, {*options, *aliases})}"


def _explain_value(key: str, body: str, actions: Mapping[str, argparse.Action | None], arguments: Sequence[str]) -> str:
    value = re.search(r"^\s*Given value: (.*)|Got value: (.*)", body, re.MULTILINE)
    value_text = _value_of(key, arguments) if value is None else (value[1] or value[2] or "").strip()
    expected, other = _expectations(body)
    if nested := _NESTED.fullmatch(value_text):
        start = f"{nested[1]} {nested[2]}: "
        own = [line.removeprefix(start) for line in other if line.startswith(start)]
        if own:  # the other alternatives of the option take no argument
            return f"--{key}.{start}{' '.join(own)}"
    class_name = next(iter(_NO_CLASS.findall(body)), None)
    if class_name is not None:
        value_text = value_text or class_name.strip()
    # Without arguments of its own the parser is that of a class, of which the key is an argument.
    text = f"{'--' if arguments else ''}{key}{f' {value_text}' if value_text else ''}:"
    if expected:
        text += f" expected {_alternatives(expected)}."
    text += "".join(f" {line.rstrip('.')}." for line in other)
    if _CLASS in expected:
        text += suggest_class(class_name or value_text, actions.get(key))
    return text if expected or other else f"--{key}: {' '.join(body.split())}"


def _value_of(name: str, arguments: Sequence[str]) -> str:
    return next((arg.partition("=")[2] for arg in reversed(arguments) if arg.startswith(f"--{name}=")), "")


def _expectations(body: str) -> tuple[list[str], list[str]]:
    """What the value may be, and further sentences."""
    kinds: list[str] = []
    other: list[str] = []
    for line in (line.strip().removeprefix("- ") for line in body.splitlines()):
        if match := re.match(r"Expected an? <class '([\w.]+)'>", line):
            kinds.append(match[1])
        elif match := re.match(r"Expected an? (?:typing\.)?Literal\[(.*?)\](?:\. Got value.*)?$", line):
            kinds.append(_literal(match[1]))
        elif _NO_CLASS.match(line):
            kinds.append(_CLASS)
        elif match := _NO_CALLABLE.match(line):
            kinds.append(_CLASS)
            other.append(match[1])
        elif match := re.match(r"Not of type \w+: (.*)", line):
            other.append(_restriction(match[1]))
        elif line and not _is_noise(line):
            other.append(line.removesuffix("See --help.").strip())
    if "float" in kinds:  # a tensor where a number is possible is not for a command line
        kinds = [kind for kind in kinds if kind not in ("int", _CLASS)]
    if _CLASS in kinds:
        other = [line for line in other if "class_path" not in line]
    if "null" not in kinds and "NoneType" in kinds:  # the last alternative
        kinds = [kind for kind in kinds if kind != "NoneType"] + ["NoneType"]
    return list(dict.fromkeys(_KINDS.get(kind, kind) for kind in kinds)), list(dict.fromkeys(other))


def _is_noise(line: str) -> bool:
    beginnings = (
        "See --help.",
        "Does not validate against any",
        "Subtypes:",
        "Errors:",
        "Given value",
        "Expected a path but",
        "Got ",
    )
    return line.startswith(beginnings)


def _literal(values: str) -> str:
    try:
        words = [str(value) for value in ast.literal_eval(f"[{values}]")]
    except (ValueError, SyntaxError):
        return f"one of {values}"
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _restriction(text: str) -> str:
    if match := _RESTRICTION.search(text):
        return f"it must be {_RESTRICTIONS[match[1]]} {match[2]}"
    return text


def _alternatives(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def suggest_class(name: str, action: argparse.Action | None) -> str:
    """A line that names the supported class that is spelt most similarly, or nothing."""
    extra_help = getattr(action, "extra_help", None)
    if extra_help is None:
        return ""
    paths = re.findall(r"[\w.]+\.[A-Z]\w*", extra_help())
    by_name = {path.rpartition(".")[2].lower(): path for path in paths}
    close = difflib.get_close_matches(name.rpartition(".")[2].lower(), by_name, n=1, cutoff=0.6)
    return f"\nDid you mean {by_name[close[0]]}?" if close else ""


def without_unions(text: str) -> str:
    """Text with ``A | B`` in the place of ``Union[A, B]``, which may be wrapped over lines."""
    while (start := text.find("Union[")) >= 0:
        depth, pieces = 0, []
        begin = position = start + len("Union[")
        while position < len(text) and not (depth == 0 and text[position] == "]"):
            if depth == 0 and text[position] == ",":
                pieces.append(text[begin:position])
                begin = position + 1
            depth += {"[": 1, "]": -1}.get(text[position], 0)
            position += 1
        pieces.append(text[begin:position])
        text = text[:start] + " |".join(pieces) + text[position + 1 :]
    return text


def _suggest_options(message: str, options: Collection[str]) -> str:
    for misspelt in re.findall(r"(?:--|[\"'])([A-Za-z_][\w.-]*)", message):
        if misspelt not in options and (close := closest_option(misspelt, options)):
            return f"\nDid you mean --{close}?"
    return ""


def closest_option(misspelt: str, options: Iterable[str]) -> str | None:
    """The option that a wrong name most likely means, or None."""
    options = list(options)
    name = misspelt.replace("-", "_")
    if (synonym := _SYNONYMS.get(name)) in options:
        return synonym
    below = {option.rpartition(".")[2]: option for option in reversed(options)}
    if name in below:
        return below[name]
    if close := difflib.get_close_matches(name, options, n=1, cutoff=0.75):
        return close[0]
    close = difflib.get_close_matches(name, below, n=1, cutoff=0.8)
    return below[close[0]] if close else None
