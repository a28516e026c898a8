"""Uses of jsonargparse's private API, held to jsonargparse 4 in setup.cfg.

``tests/unit/test_arguments.py`` fails where a release changes it.
"""

from __future__ import annotations

from typing import Any

from jsonargparse import _typehints as typehints

from job.config.class_defaults import default_arguments

_discard_invalid: Any = typehints.discard_init_args_on_class_path_change


def use_defaults_of_chosen_class() -> None:
    """Let arguments of a class have their own defaults where an option names another class than its default.

    jsonargparse keeps the defaults of the class before, where the new one has such arguments:
    ``--model.optimizer AdamW`` would have Adam's weight decay. https://github.com/mauvilsa/jsonargparse/issues/460
    """
    typehints.discard_init_args_on_class_path_change = _discard


def _discard(parser_or_action: Any, before: Any, chosen: Any) -> None:
    """Remove arguments of the class before that have its defaults, and those that the chosen class does not take."""
    if before and "init_args" in before and before["class_path"] != chosen["class_path"]:
        defaults = default_arguments(before["class_path"])
        for name, value in list(dict(before["init_args"]).items()):
            if name in defaults and defaults[name] == value:
                before["init_args"].pop(name)
    _discard_invalid(parser_or_action, before, chosen)
