"""Documents that are too large or ambiguous."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.config import bounded_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
PIECES = [
    "a: ",
    "- ",
    "\n",
    "  ",
    "&a ",
    "*a",
    "{",
    "}",
    "[",
    "]",
    ",",
    "'",
    '"',
    "!!python/name:os.system ",
    "!x ",
    "<<: ",
]
PIECES += [
    "0x",
    "1:",
    "9" * 500,
    "? ",
    "|",
    ">",
    "---\n",
    "%YAML 1.1\n",
    "\x00",
    "\ud800",
    "\x85",
    "é",
    "#",
    "2001-99-99",
]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases stand for more than 1,000 values"),
        (
            "merged:\n"
            + "".join(
                f"  x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}]}}\n" if n else "  x0: &x0 {a: 1}\n"
                for n in range(9)
            ),
            "aliases stand",
        ),
        ("[" * 33 + "]" * 33, "more than 32 levels"),
        ("- x\n" * 50_001, "more than 50,000 values"),
        ("x" * (1 << 20) + "xx", "more than 1,048,576 bytes"),
        ("a: " + "1" * 401, "a number of 401 characters"),
        ("a: " + "1:" * 400 + "1", "a number of"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: the key 'c' occurs twice"),
        ("a: !!python/object/apply:os.system [true]", "tag"),
        ("? [a]\n: b", "cannot be a key"),
        ("a: &a 1\nb: &a 2", "defined twice"),
        ("a: &a [*a]", "stands for nothing"),
        ("a: 2001-99-99", "month must be in"),
        (f"a: {json.dumps(BOMB)}", "aliases stand"),
    ],
)
def test_refused(text: str, message: str) -> None:
    start = time.thread_time()
    with pytest.raises(yaml.YAMLError, match=message):
        bounded_yaml.load(text)
    assert time.thread_time() - start < 5


def test_ordinary_documents() -> None:
    text = "a: &a {b: [1, 2.5, true, null, 'x']}\nc: *a\nd: {<<: *a, e: 2024-01-01}\nf: gs://b/*.jpg\n"
    assert bounded_yaml.load(text) == yaml.safe_load(text)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30))
def test_any_document_gives_a_value_or_a_yaml_error(pieces: list[str]) -> None:
    with contextlib.suppress(yaml.YAMLError):
        bounded_yaml.load("".join(pieces))
