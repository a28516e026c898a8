"""Templates of HTML files whose names and messages others may have written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from job.monitoring.drawing.class_labels import shortened
from job.process.terminal import clean_lines


def html_environment(package: str, **filters: Callable[..., Any]) -> Environment:
    """Jinja's environment of the templates in ``package``; all text is cleaned and escaped, ``short`` is a filter.

    Args:
        package: that has the folder ``templates``.
        filters: more filters, by name.
    """
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": shortened, **filters}
    return environment


def _visible(value: Any) -> Any:
    """Text without control characters and credentials; it is escaped as HTML afterwards."""
    return clean_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value
