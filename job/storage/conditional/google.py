"""Conditional writes on Google Cloud Storage, through gcsfs."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from fsspec.asyn import sync

from job.storage.conditional.base import Store, Versioned

_BOUNDARY = "job-conditional-write"


class GoogleCloudStorage(Store):
    """https://cloud.google.com/storage/docs/request-preconditions. A failed condition is FileExistsError in gcsfs."""

    def read(self) -> Versioned | None:
        """Read the object and its version; None if there is none."""
        try:
            headers, content = self._call("GET", self.fs.url(self.path))
        except FileNotFoundError:
            return None
        return Versioned(bytes(content), str(headers["X-Goog-Generation"]))

    def write(self, data: bytes, version: str | None) -> str | None:
        """Write it if it has this version; returns the new one, or None."""
        bucket, key, _ = self.fs.split_path(self.path)
        parts = (
            ("application/json; charset=UTF-8", json.dumps({"name": key}).encode()),
            ("application/octet-stream", data),
        )
        body = b"".join(
            f"--{_BOUNDARY}\r\nContent-Type: {kind}\r\n\r\n".encode() + part + b"\r\n" for kind, part in parts
        )
        try:
            answer = self._call(
                "POST",
                f"{self.fs._location}/upload/storage/v1/b/{quote(bucket)}/o",
                uploadType="multipart",
                ifGenerationMatch=version or "0",
                headers={"Content-Type": f'multipart/related; boundary="{_BOUNDARY}"'},
                data=body + f"--{_BOUNDARY}--".encode(),
                json_out=True,
            )
        except FileExistsError:
            return None
        except FileNotFoundError:
            if version is None:
                raise  # the bucket
            return None
        return str(answer["generation"])

    def remove(self, version: str) -> bool:
        """Delete it if it has this version; returns whether it did."""
        bucket, key, _ = self.fs.split_path(self.path)
        try:
            self._call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=version)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def _call(self, *args: Any, **options: Any) -> Any:
        return sync(self.fs.loop, self.fs._call, *args, **options)
