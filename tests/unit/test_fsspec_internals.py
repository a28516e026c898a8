"""Contract of job.storage.fsspec_internals with the private API of fsspec, gcsfs and s3fs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.http import HTTPFileSystem
from gcsfs import GCSFileSystem
from s3fs import S3FileSystem

import job


@pytest.mark.parametrize(
    ("method", "parameters", "is_coroutine"),
    [
        (GCSFileSystem._call, ["self", "method", "path", "args", "json_out", "info_out", "kwargs"], True),
        (GCSFileSystem._cat_file, ["self", "path", "start", "end", "kwargs"], True),
        (S3FileSystem._call_s3, ["self", "method", "akwarglist", "kwargs"], True),
        (AsyncFileSystem._cat_file, ["self", "path", "start", "end", "kwargs"], True),
        (HTTPFileSystem._raise_not_found_for_status, ["self", "response", "url"], False),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_the_signature_is_the_one_that_is_called(
    method: Callable[..., Any], parameters: list[str], is_coroutine: bool
) -> None:
    assert list(inspect.signature(method).parameters) == parameters
    assert inspect.iscoroutinefunction(method) == is_coroutine


def test_gcsfs_knows_its_endpoint() -> None:
    assert isinstance(inspect.getattr_static(GCSFileSystem, "_location"), property)


def test_the_private_api_is_used_in_one_module_only() -> None:
    private = re.compile(r"\b(?!self\b|cls\b)\w+\._(call|call_s3|cat_file|location|raise_not_found_for_status)\b")
    root = Path(job.__file__).parent
    users = {str(path.relative_to(root)) for path in root.rglob("*.py") if private.search(path.read_text())}
    assert users == {"storage/fsspec_internals.py"}
