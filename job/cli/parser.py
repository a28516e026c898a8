"""The parser of all verbs: suggestions, limits on values, no credentials in what is saved."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from job import redact
from job.config import bounded_yaml
from job.config.import_policy import denied_message, require_permitted
from job.errors import (
    ConfigError,
)
from job.process.terminal import escape

ENV_PREFIX = "JOB"


class Parser(LightningArgumentParser):
    """jsonargparse's parser, whose errors suggest the nearest right option.

    Options cannot be abbreviated, and no class may be named that :mod:`job.config.import_policy` denies. Credentials in
    URIs are kept by :mod:`job.redact`; the values of options are without them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, without a traceback, and exit with 2."""
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            key = re.search(r'Parser key "([^"]+)"', message)
            raise ConfigError(denied_message(denied[1], key[1] if key else ""))
        raise ConfigError(f"{message.strip()}{self._suggestion(message)}\nSee --help.")

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """The options, checked, with the credentials of their URIs kept aside."""
        self._check_limits(sys.argv[1:] if not args or args[0] is None else args[0])
        return self._checked(super().parse_args(*args, **kwargs))

    def parse_object(self, *args: Any, **kwargs: Any) -> Namespace:
        """The options of a mapping, checked, with the credentials of their URIs kept aside."""
        self._check_limits([])
        return self._checked(super().parse_object(*args, **kwargs))

    def _checked(self, config: Namespace) -> Namespace:
        require_permitted(config.as_dict())
        for key, value in list(config.items()):
            config[key] = redact.walk(value, _without_credentials, key)
        return config

    def _check_limits(self, args: Any) -> None:
        """Refuse values that would be too large as YAML: jsonargparse reads each of them by two loaders."""
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

    def _suggestion(self, message: str) -> str:
        known = [action.dest for action in self._actions]
        for wrong in re.findall(r"(?:--|[\"'])([A-Za-z_][\w.]*)", message):
            close = difflib.get_close_matches(wrong, [k for k in known if k != wrong], n=1, cutoff=0.75)
            if close and wrong not in known:
                return f"\nDid you mean --{close[0]}?"
        return ""


def _without_credentials(key: str, text: str) -> str:
    """The value of an option as configurations and indexes may hold it.

    Raises:
        ConfigError: it is no text, or its credentials were removed when it was saved.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--{key}: {escape(text)} is not UTF-8. Rename the file or folder.") from error
    if redact.is_redacted(text):
        raise ConfigError(
            f"{text} was saved without its credentials, which this command needs again: give the whole URI by --{key}."
        )
    return redact.remember(text)


def call_with_options(verb: str, function: Callable[..., None], args: list[str], *, positional: bool = False) -> None:
    """Call ``function`` with its parameters as options, or those it requires by position."""
    parser = Parser(
        prog=f"python -m job {verb}",
        default_env=True,
        env_prefix=ENV_PREFIX,
        description=(function.__doc__ or "").split("\n")[0],
    )
    parser.add_function_arguments(function, as_positional=positional)
    function(**parser.parse_args(args).as_dict())
