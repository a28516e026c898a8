"""Recipes: the configurations that the package ships."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from job.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "recipes"
_NAME = re.compile(r"[A-Za-z][\w-]*")


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        ConfigError: there is no recipe of this name; the message lists all.
    """
    path = FOLDER / f"{name}.yaml"
    if path.stem not in recipe_names():
        raise ConfigError(
            f"there is no file and no recipe {name!r}. The recipes are {', '.join(recipe_names())}; give --config one "
            "of them or a file."
        )
    return path


def resolve_config(value: str) -> str:
    """The file that a value of ``--config`` refers to: a file of that name, else the recipe of that name."""
    if _NAME.fullmatch(value) and not Path(value).is_file():
        return str(recipe_file(value))
    return value


def local_config(value: str) -> str:
    """The text of the recipe or local file that a value of ``--config`` refers to; empty if it cannot be read.

    Raises:
        ConfigError: there is no recipe of this name.
    """
    file = Path(resolve_config(value))
    with contextlib.suppress(OSError, ValueError):
        return file.read_text()
    return ""
