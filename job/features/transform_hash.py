"""Hash of an augmentation: of the code of its classes and functions, and of all that their objects hold.

The text of a transform, its ``repr``, lacks parameters that its author did not think of. Code of torch, torchvision and
numpy is known by their versions; code that a class or function calls elsewhere is not part of the hash.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pickle
import types
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Any

import numpy as np
import torch
import torchvision

LIBRARIES = {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}
"""Versions of packages, by which their code is known."""
PLAIN = (type(None), bool, int, float, complex, str, bytes)


def transform_hash(transform: object) -> str:
    """The same for the same code and parameters, in all processes: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for text in _described(transform, {}):
        digest.update(f"{len(text)} {text}".encode(errors="backslashreplace"))
    return digest.hexdigest()


def _described(value: object, seen: dict[int, object]) -> Iterator[str]:
    """Texts that together say what a value is; an object that came before is named by its number."""
    if isinstance(value, Enum):
        yield f"{type(value).__qualname__}.{value.name}"
        return
    if isinstance(value, PLAIN):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield f"again {list(seen).index(id(value))}"
        return
    seen[id(value)] = value
    if isinstance(value, type):
        yield from _code_of_class(value)
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        yield f"{array.dtype} {array.shape} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
    elif isinstance(value, Mapping):
        yield f"{type(value).__qualname__} {len(value)}"
        for key, each in value.items():
            yield from _described(key, seen)
            yield from _described(each, seen)
    elif isinstance(value, AbstractSet):
        yield f"{type(value).__qualname__} {len(value)}"  # in an order that is the same in all processes
        yield from sorted(" ".join(_described(each, dict(seen))) for each in value)
    elif isinstance(value, Sequence):
        yield f"{type(value).__qualname__} {len(value)}"
        for each in value:
            yield from _described(each, seen)
    elif isinstance(value, (types.FunctionType, types.MethodType)):
        yield from _function(value, seen)
    elif isinstance(value, functools.partial):
        yield "partial"
        yield from _described((value.func, value.args, value.keywords), seen)
    else:
        yield from _object(value, seen)


def _function(value: types.FunctionType | types.MethodType, seen: dict[int, object]) -> Iterator[str]:
    if isinstance(value, types.MethodType):
        yield from _described(value.__self__, seen)
        yield from _described(value.__func__, seen)
        return
    yield _code(value)
    yield from _described(value.__defaults__, seen)
    yield from _described(value.__kwdefaults__, seen)
    for cell in value.__closure__ or ():
        try:
            yield from _described(cell.cell_contents, seen)
        except ValueError:
            yield "empty"


def _object(value: object, seen: dict[int, object]) -> Iterator[str]:
    yield from _described(type(value), seen)
    slots = [name for base in type(value).__mro__ for name in _slots(base)]
    state: dict[str, Any] = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    state |= getattr(value, "__dict__", {})
    if state:
        yield from _described(state, seen)
        return
    try:
        yield hashlib.sha256(pickle.dumps(value, protocol=4)).hexdigest()
    except Exception:  # of any class: its type is all that is known
        return


def _slots(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _code_of_class(value: type) -> Iterator[str]:
    for base in value.__mro__:
        if base is not object:
            yield _code(base)


def _code(value: type | types.FunctionType) -> str:
    """Name of a class or function with its source, or the version of its library."""
    name = f"{value.__module__}.{value.__qualname__}"
    if version := LIBRARIES.get(value.__module__.partition(".")[0]):
        return f"{name} {version}"
    try:
        return f"{name} {inspect.getsource(value)}"
    except (OSError, TypeError):  # typed at a prompt, or built in
        code = value.__code__ if isinstance(value, types.FunctionType) else None
        return f"{name} {code.co_code.hex() if code else ''}"
