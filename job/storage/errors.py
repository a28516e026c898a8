"""Classify and translate what filesystems raise: by type, by library and by HTTP status, not by message."""

from __future__ import annotations

import contextlib
import enum
import errno
import http.client
import json
import socket
import ssl
from collections.abc import Iterator

from job import redact
from job.errors import JobError, StorageError, StorageOutage, first_line
from job.storage.http_status import DENIED, MISSING, RETRYABLE, cause_of_not_found, causes, http_status
from job.storage.stores import STORES

_LIBRARIES = {
    *("asyncio", "fsspec", "http", "azure", "adlfs"),
    *(library for store in STORES for library in store.libraries),
}
"""Packages whose own exceptions report a remote store."""
_MISTAKES = {mistake for store in STORES for mistake in store.mistakes}
"""Exceptions of those packages that a retry does not help against: credentials or a URL are wrong."""
_TRANSIENT = {
    *(errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EPIPE, errno.ECONNRESET),
    *(errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETRESET, errno.ENOTCONN, getattr(errno, "EREMOTEIO", errno.EIO)),
}


class NotFound(StorageError):
    """There is no such object."""


class Kind(enum.Enum):
    """Kinds of storage failures."""

    DENIED = "the account may not do this"
    MISSING = "there is no such object"
    OUTAGE = "the store does not answer, or cannot now"
    MISTAKE = "the request cannot work"
    UNKNOWN = "not known from storage"


def classify(error: BaseException) -> Kind:
    """The kind of ``error``, as a filesystem raised it."""
    if (status := http_status(error)) is not None:
        if status in DENIED:
            return Kind.DENIED
        if status in MISSING:
            return Kind.MISSING
        return Kind.OUTAGE if status in RETRYABLE or status >= 500 else Kind.MISTAKE
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden")):
        return Kind.DENIED  # "Forbidden": gcsfs, without a code
    if any(type(cause).__name__ in _MISTAKES for cause in causes(error)):
        return Kind.MISTAKE
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, http.client.HTTPException)):
        return Kind.OUTAGE  # the answer is not the store's: a proxy's page, or cut short
    if isinstance(error, (TimeoutError, ConnectionError, socket.gaierror, ssl.SSLError)):
        return Kind.OUTAGE
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        return Kind.OUTAGE
    if any(kind.__module__.split(".")[0] in _LIBRARIES for kind in type(error).__mro__):
        return Kind.OUTAGE
    return Kind.MISTAKE if isinstance(error, (ValueError, OSError)) else Kind.UNKNOWN


@contextlib.contextmanager
def translate_errors(uri: str, action: str) -> Iterator[None]:
    """Translate what a filesystem raises to a :class:`~job.errors.StorageError` that names the URI.

    Args:
        action: what was tried, such as "read", for the message.
    """
    try:
        yield
    except JobError:
        raise
    except FileNotFoundError as error:
        if isinstance(error.__cause__, JobError):  # fsspec's http filesystem hides what its client raises
            raise error.__cause__ from None
        if (cause := cause_of_not_found(error)) is not error:
            raise _remote_error(uri, action, cause) from cause
        raise NotFound(
            f"cannot {action} {uri}: no such bucket, object or folder. Check the spelling; for a "
            "bucket, also that it exists in the project of your credentials."
        ) from error
    except (NotADirectoryError, IsADirectoryError) as error:
        raise StorageError(f"cannot {action} {uri}: {error.strerror or error}.") from error
    except ImportError as error:
        raise StorageError(f"cannot {action} {uri}: {error}.") from error
    except Exception as error:
        kind = classify(error)
        if kind in (Kind.DENIED, Kind.OUTAGE):
            raise _remote_error(uri, action, error) from error
        if kind is Kind.MISSING:
            raise NotFound(f"cannot {action} {uri}: {first_line(error)}") from error
        if kind is not Kind.UNKNOWN:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise StorageError(f"cannot {action} {uri}: {reason.removesuffix('.')}.") from error
        raise


def _remote_error(uri: str, action: str, error: BaseException) -> StorageError:
    kind = classify(error)
    if kind is not Kind.DENIED:
        raised = StorageOutage if kind is Kind.OUTAGE else StorageError
        return raised(f"cannot {action} {uri}: {type(error).__name__}: {first_line(error)}")
    advice = (
        "If it needs credentials (a signature, user:password), give the whole URI by the option that names it: "
        "credentials are saved nowhere, and a signature expires."
        if uri.startswith(redact.HTTP)
        else "Give the user that the job runs as the right to do this."
        if "::" not in uri and uri.partition("://")[0] in (uri, "file")
        else "Give the account the job runs as the right to do this (on Google Cloud: roles/storage.objectUser on the "
        "bucket)."
    )
    return StorageError(f"cannot {action} {uri}: permission denied ({first_line(error)}). {advice}")


@contextlib.contextmanager
def translate_unknown() -> Iterator[None]:
    """Let an exception of a kind that :func:`translate_errors` does not know end in a message, too."""
    try:
        yield
    except (JobError, OSError, ImportError, ValueError):
        raise
    except Exception as error:
        if classify(error) in (Kind.DENIED, Kind.OUTAGE):
            raise
        raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error
