"""Parsers of all commands: aliases, suggestions, limits on values, no credentials in saved files."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from job import redact
from job.argparse_internals import actions, option_names
from job.cli import messages
from job.cli.arguments import FLAGS, canonical_arguments
from job.config import bounded_yaml
from job.config.import_policy import denied_message, require_permitted, set_parsing_rules
from job.config.recipes import resolve_config
from job.errors import ConfigError
from job.process.terminal import escape

ENV_PREFIX = "JOB"
CONFIG_VARIABLE = f"{ENV_PREFIX}_CONFIG"
"""The environment variable that does what ``--config`` does, with the lowest precedence."""


class ParserMixin(ArgumentParser):
    """Additions to a parser of jsonargparse.

    Options have aliases and cannot be abbreviated, errors suggest the nearest option, and no class may be named that
    :mod:`job.config.import_policy` denies. Credentials in URIs are kept by :mod:`job.redact`; the values of options
    are without them.

    Args:
        aliases: option by alias.
        positional: options that may be given without their name.
    """

    def __init__(
        self, *args: Any, aliases: Mapping[str, str] | None = None, positional: Sequence[str] = (), **kwargs: Any
    ) -> None:
        self.aliases = dict(aliases or {})
        self.positional = tuple(positional)
        self._arguments: list[str] = []
        set_parsing_rules()
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message, in plain words and with a suggestion.

        Raises:
            ConfigError: always.
        """
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            key = re.search(r'Parser key "([^"]+)"', message)
            raise ConfigError(denied_message(denied[1], key[1] if key else ""))
        options = {action.dest: action for action in actions(self)}
        raise ConfigError(f"{messages.explain(message, options, self._arguments, self.aliases)}\nSee --help.")

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse and check options; credentials are removed from URIs."""
        args = sys.argv[1:] if args is None else list(args)
        self._check_limits(args)
        self._arguments = canonical_arguments(
            args, options=option_names(self), aliases=self.aliases, positional=self.positional
        )
        with _config_variable_resolved():
            return self._checked(super().parse_args(self._arguments, *more, **kwargs))

    def parse_object(self, *args: Any, **kwargs: Any) -> Namespace:
        """Parse and check a mapping of options; credentials are removed from URIs."""
        self._check_limits([])
        with _config_variable_resolved():
            return self._checked(super().parse_object(*args, **kwargs))

    def _checked(self, config: Namespace) -> Namespace:
        require_permitted(config.as_dict())
        for key, value in list(config.items()):
            config[key] = redact.walk(value, _without_credentials, key)
        return config

    def format_help(self, *args: Any) -> str:
        """The text of ``--help``."""
        return messages.without_unions(super().format_help(*args))

    def _check_limits(self, args: Sequence[Any]) -> None:
        """Check the limits of all values as YAML: jsonargparse reads each of them with two loaders."""
        values = [("a value on the command line", str(arg).partition("=")[2] or str(arg)) for arg in args]
        values += [(name, value) for name, value in os.environ.items() if name.startswith(f"{ENV_PREFIX}_")]
        for name, value in values:
            try:
                bounded_yaml.check_limits(value)
            except bounded_yaml.LimitExceeded as error:
                raise ConfigError(f"{name} is refused: {error}.") from error

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """The options as text, without credentials."""
        namespace = namespace.clone()
        for key, value in list(namespace.items()):
            namespace[key] = redact.walk(value, lambda _, text: redact.saved_form(text))
        text: str = super().dump(namespace, *args, **kwargs)
        return text


class Parser(ParserMixin):
    """The parser of commands that take the parameters of one function."""


@contextlib.contextmanager
def _config_variable_resolved() -> Iterator[None]:
    """Let :data:`CONFIG_VARIABLE` name a recipe while jsonargparse reads it.

    Raises:
        ConfigError: there is no recipe of this name.
    """
    value = os.environ.get(CONFIG_VARIABLE)
    if value is None:
        yield
        return
    os.environ[CONFIG_VARIABLE] = resolve_config(value)
    try:
        yield
    finally:
        os.environ[CONFIG_VARIABLE] = value


def _without_credentials(key: str, text: str) -> str:
    """The value of an option without credentials, for configurations and indexes.

    Raises:
        ConfigError: it is not UTF-8, or its credentials were removed when it was saved.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--{key}: {escape(text)} is not UTF-8. Rename the file or folder.") from error
    if redact.is_redacted(text):
        raise ConfigError(f"{text} was saved without its credentials. Give the complete URI by --{key}.")
    return redact.remember(text)


def call_with_options(
    command: str, function: Callable[..., None], args: list[str], *, positional: Sequence[str] = ()
) -> None:
    """Call ``function`` with its parameters as options.

    Args:
        positional: parameters that may be given without their name, in this order; the last may end with "+", for a
            list of all that remain.
    """
    parser = function_parser(command, function, positional)
    function(**parser.instantiate_classes(parser.parse_args(args)).as_dict())


def function_parser(command: str, function: Callable[..., None], positional: Sequence[str] = ()) -> Parser:
    """The parser of a command whose options are the parameters of ``function``."""
    names = [f"{name.removesuffix('s+')}…" if name.endswith("+") else name for name in positional]
    words = ["python -m job", command, *(name.upper() for name in names), "[options]"]
    parser = Parser(
        prog=f"python -m job {command}",
        usage=" ".join(words),
        default_env=True,
        env_prefix=ENV_PREFIX,
        positional=positional,
    )
    parser.add_function_arguments(function)
    for action in actions(parser):
        if action.dest in FLAGS and action.default is False:
            action.nargs, action.const = "?", True  # --json alone, as well as --json=false
    return parser
