"""Storage errors are classified by type, origin and HTTP status."""

from __future__ import annotations

import errno
import json
import socket
import ssl

import aiohttp
import botocore.exceptions
import gcsfs.retry
import google.auth.exceptions
import pytest
import requests
import s3fs.errors

from job import storage
from job.errors import StorageError, StorageOutage
from job.storage.errors import Kind, classify


def client_error(code: str, status: int) -> botocore.exceptions.ClientError:
    response = {"Error": {"Code": code, "Message": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(response, "GetObject")  # type: ignore[arg-type]


def http_error(code: object) -> gcsfs.retry.HttpError:
    return gcsfs.retry.HttpError({"code": code, "message": "x"})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (json.JSONDecodeError("Expecting value", "<html>502", 0), Kind.OUTAGE),
        (requests.exceptions.ProxyError(), Kind.OUTAGE),  # gcsfs for a 502
        (http_error(503), Kind.OUTAGE),
        (http_error("429"), Kind.OUTAGE),
        (http_error(408), Kind.OUTAGE),
        (http_error(401), Kind.DENIED),
        (http_error(400), Kind.MISTAKE),
        (http_error(None), Kind.OUTAGE),
        (OSError("Forbidden: b/o"), Kind.DENIED),
        (ValueError("Bad Request: b/o\ninvalid bucket name"), Kind.MISTAKE),
        (ValueError("Protocol not known: gz"), Kind.MISTAKE),
        (client_error("SlowDown", 503), Kind.OUTAGE),
        (s3fs.errors.translate_boto_error(client_error("SlowDown", 503)), Kind.OUTAGE),
        (s3fs.errors.translate_boto_error(client_error("InternalError", 500)), Kind.OUTAGE),
        (s3fs.errors.translate_boto_error(client_error("InvalidBucketName", 400)), Kind.MISTAKE),
        (s3fs.errors.translate_boto_error(client_error("AccessDenied", 403)), Kind.DENIED),
        (botocore.exceptions.NoCredentialsError(), Kind.MISTAKE),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), Kind.OUTAGE),
        (google.auth.exceptions.DefaultCredentialsError("none"), Kind.MISTAKE),
        (google.auth.exceptions.TransportError("x"), Kind.OUTAGE),
        (aiohttp.InvalidURL("x"), Kind.MISTAKE),
        (aiohttp.ServerDisconnectedError(), Kind.OUTAGE),
        (aiohttp.ClientPayloadError("cut"), Kind.OUTAGE),
        (socket.gaierror(-2, "Name or service not known"), Kind.OUTAGE),
        (ssl.SSLCertVerificationError("self-signed certificate"), Kind.MISTAKE),
        (TimeoutError(), Kind.OUTAGE),
        (ConnectionResetError(), Kind.OUTAGE),
        (OSError(errno.EIO, "Input/output error"), Kind.OUTAGE),
        (OSError(errno.ENOSPC, "No space left on device"), Kind.MISTAKE),
        (PermissionError(errno.EACCES, "Permission denied"), Kind.DENIED),
        (AttributeError("x"), Kind.UNKNOWN),
        (RuntimeError("Session is closed"), Kind.UNKNOWN),
    ],
    ids=lambda value: value.name if isinstance(value, Kind) else f"{type(value).__name__} {value}"[:40],
)
def test_the_kind_of_a_failure(error: Exception, kind: Kind) -> None:
    assert classify(error) is kind


def test_an_error_page_of_a_proxy_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = storage.filesystem("memory://x")[0]

    def answer(path: str) -> bytes:
        return json.loads("<html>502 Bad Gateway</html>")

    monkeypatch.setattr(type(fs), "cat_file", lambda self, path, **_: answer(path))
    with pytest.raises(StorageOutage, match="cannot read memory://x/a: JSONDecodeError"):
        storage.read_bytes("memory://x/a")


def test_a_protocol_that_does_not_exist_is_a_mistake() -> None:
    with pytest.raises(StorageError, match="cannot open gz://x") as excinfo:
        storage.read_bytes("gz://x")
    assert not isinstance(excinfo.value, StorageOutage)
