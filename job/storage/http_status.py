"""HTTP status codes in the exceptions of storage libraries."""

from __future__ import annotations

from collections.abc import Iterator

import aiohttp

DENIED = (401, 403, 407)
MISSING = (404, 410)
RETRYABLE = (408, 425, 429)


def http_status(error: BaseException) -> int | None:
    """HTTP status of a failed request, from the exceptions of gcsfs, aiohttp, botocore, google and requests."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        candidates = [getattr(cause, name, None) for name in ("status", "code", "status_code")]
        if isinstance(response, dict):  # botocore
            metadata = response.get("ResponseMetadata")
            candidates.append(metadata.get("HTTPStatusCode") if isinstance(metadata, dict) else None)
        else:
            candidates.append(getattr(response, "status_code", None))
        for candidate in candidates:
            if str(candidate).isdecimal() and 400 <= int(str(candidate)) < 600:
                return int(str(candidate))
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and the exceptions that it was raised from, at most five."""
    current: BaseException | None = error
    for _ in range(5):
        if current is None:
            return
        yield current
        current = current.__cause__


def cause_of_not_found(error: BaseException) -> BaseException:
    """The failure that fsspec's HTTP filesystem reports as "not found", as it does all; else the error itself."""
    cause = error.__cause__
    if isinstance(cause, aiohttp.ClientResponseError) and cause.status in MISSING:
        return error
    return cause if isinstance(cause, (aiohttp.ClientError, TimeoutError)) else error
