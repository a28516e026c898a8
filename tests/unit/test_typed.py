"""Decoding to declared types, in threads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest
from support import environment

from job import typed

DECODED_IN_THREADS = """
import sys, threading, typing
import msgspec
from job import typed

sys.setswitchinterval(1e-6)
for _ in range(100):
    inner = msgspec.defstruct("Inner", [(f"a{i}", typing.Annotated[int, msgspec.Meta(ge=-i)]) for i in range(10)])
    outer = msgspec.defstruct("Outer", [(f"b{i}", inner) for i in range(3)])
    value = {f"b{i}": {f"a{j}": j for j in range(10)} for i in range(3)}
    read = {
        "typed.from_json": lambda: typed.from_json(msgspec.json.encode(value), outer),
        "typed.from_msgpack": lambda: typed.from_msgpack(msgspec.msgpack.encode(value), outer),
        "typed.from_builtins": lambda: typed.from_builtins(value, outer),
        "typed.decoder": lambda: typed.decoder(outer).decode(msgspec.json.encode(value)),
        "msgspec.json.decode": lambda: msgspec.json.decode(msgspec.json.encode(value), type=outer),
    }[sys.argv[1]]
    together, results = threading.Barrier(4), []
    threads = [threading.Thread(target=lambda: (together.wait(), results.append(read()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [msgspec.to_builtins(each) for each in results] == [value] * 4
"""


def decode_in_threads(function: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DECODED_IN_THREADS, function]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("function", ["typed.from_json", "typed.from_msgpack", "typed.from_builtins", "typed.decoder"])
def test_threads_decode_a_type_for_the_first_time(function: str) -> None:
    ended = decode_in_threads(function)
    assert ended.returncode == 0, ended.stderr


def test_msgspec_alone_is_not_thread_safe() -> None:
    """When this fails, msgspec prepares types safely: job/typed.py may become plain calls."""
    assert any(decode_in_threads("msgspec.json.decode").returncode != 0 for _ in range(50))


@pytest.mark.parametrize(
    ("kind", "value"), [(Any, {"a": [1]}), (list[int], [1, 2]), (dict[str, Any], {"a": None}), (int | str, "x")]
)
def test_types_other_than_structs(kind: Any, value: object) -> None:
    assert typed.from_json(msgspec.json.encode(value), kind) == value
    assert typed.from_msgpack(msgspec.msgpack.encode(value), kind) == value
    assert typed.from_builtins(value, kind) == value


def test_another_type_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        typed.from_json(b'{"a": 1}', list[int])
    with pytest.raises(msgspec.ValidationError):
        typed.from_msgpack(msgspec.msgpack.encode("x"), int)
    with pytest.raises(msgspec.ValidationError):
        typed.from_builtins("x", int)
    assert typed.from_json(b'{"a": 1}') == {"a": 1}
