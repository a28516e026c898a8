"""Default arguments of the classes that a configuration names."""

from __future__ import annotations

import inspect
import sys
from typing import Any


def default_arguments(class_path: str) -> dict[str, Any]:
    """Default arguments of a class by name; none of one that is not imported, or was written in C."""
    module, _, name = class_path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    try:
        parameters = inspect.signature(kind).parameters if callable(kind) else {}
    except ValueError:  # a class written in C
        return {}
    return {name: each.default for name, each in parameters.items() if each.default is not each.empty}
