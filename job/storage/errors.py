"""Classify what filesystems raise: by type, by the library that raised it and by HTTP status, not by message."""

from __future__ import annotations

import enum
import errno
import http.client
import json
import socket
import ssl
from collections.abc import Iterator

_REMOTE = (
    *("aiohttp", "gcsfs", "google", "botocore", "aiobotocore", "s3fs", "requests", "urllib3", "asyncio", "fsspec"),
    *("azure", "adlfs", "http"),
)
"""Packages whose own exceptions report a remote store."""
_MISTAKES = {
    *("DefaultCredentialsError", "MalformedError", "InvalidURL", "MissingSchema", "InvalidSchema"),
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError", "ParamValidationError"),
    *("UnknownServiceError", "InvalidRegionError", "ClientConnectorCertificateError", "SSLCertVerificationError"),
}
"""Exceptions of those packages that no retry mends: credentials or a URL are wrong."""
_TRANSIENT = {
    *(errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EPIPE, errno.ECONNRESET),
    *(errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETRESET, errno.ENOTCONN, getattr(errno, "EREMOTEIO", errno.EIO)),
}


class Kind(enum.Enum):
    """What kind of failure an exception reports."""

    DENIED = "the account may not do this"
    MISSING = "there is no such object"
    OUTAGE = "the store does not answer, or cannot now"
    MISTAKE = "the request cannot work"
    UNKNOWN = "not known from storage"


def classify(error: BaseException) -> Kind:
    """The kind of ``error``, as a filesystem raised it."""
    if (status := http_status(error)) is not None:
        if status in (401, 403, 407):
            return Kind.DENIED
        if status in (404, 410):
            return Kind.MISSING
        return Kind.OUTAGE if status in (408, 425, 429) or status >= 500 else Kind.MISTAKE
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden")):
        return Kind.DENIED  # "Forbidden": gcsfs, without a code
    if any(type(each).__name__ in _MISTAKES for each in _causes(error)):
        return Kind.MISTAKE
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, http.client.HTTPException)):
        return Kind.OUTAGE  # the answer is not the store's: a proxy's page, or cut short
    if isinstance(error, (TimeoutError, ConnectionError, socket.gaierror, ssl.SSLError)):
        return Kind.OUTAGE
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        return Kind.OUTAGE
    if any(kind.__module__.split(".")[0] in _REMOTE for kind in type(error).__mro__):
        return Kind.OUTAGE
    return Kind.MISTAKE if isinstance(error, (ValueError, OSError)) else Kind.UNKNOWN


def http_status(error: BaseException) -> int | None:
    """HTTP status of a failed request, from the exceptions of gcsfs, aiohttp, botocore, google and requests."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        candidates = [getattr(each, name, None) for name in ("status", "code", "status_code")]
        if isinstance(response, dict):  # botocore
            metadata = response.get("ResponseMetadata")
            candidates.append(metadata.get("HTTPStatusCode") if isinstance(metadata, dict) else None)
        else:
            candidates.append(getattr(response, "status_code", None))
        for candidate in candidates:
            if str(candidate).isdecimal() and 400 <= int(str(candidate)) < 600:
                return int(str(candidate))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from, at most five."""
    current: BaseException | None = error
    for _ in range(5):
        if current is None:
            return
        yield current
        current = current.__cause__
