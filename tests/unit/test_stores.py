"""The class of a storage is found by its protocol; a disk without locks is reported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from job.storage import conditional
from job.storage.filesystems import store_of
from job.storage.stores import Store
from job.storage.stores.google import GoogleCloudStorage
from job.storage.stores.local import LocalDisk
from job.storage.stores.memory import Memory
from job.storage.stores.s3 import S3
from job.storage.stores.web import WebServer


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("/folder/a", LocalDisk),
        ("file:///folder/a", LocalDisk),
        ("https://host/a", WebServer),
        ("s3://bucket/a", S3),
        ("memory://folder/a", Memory),
        ("data:,a", Store),
    ],
)
def test_a_uri_leads_to_its_store(uri: str, kind: type[Store]) -> None:
    assert type(store_of(uri)[0]) is kind


def test_both_protocols_of_google_lead_to_its_store() -> None:
    class FileSystem:
        protocol = ("gs", "gcs")

    assert GoogleCloudStorage.serves(FileSystem())
    assert not S3.serves(FileSystem())


def test_a_system_without_posix_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    uri = str(tmp_path / "lease.json")
    assert "cannot be locked" in str(conditional.weakness(uri))
    version = conditional.write_if(uri, b"a", None)
    assert version is not None
    assert conditional.write_if(uri, b"b", None) is None
    assert conditional.remove_if(uri, version)
