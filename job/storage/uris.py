"""Join and split URIs; the query of a web server's URI stays at the end."""

from __future__ import annotations

from job import redact


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` below it."""
    path, query = redact.split_query(uri)
    return "/".join([path.rstrip("/"), *(part.strip("/") for part in parts)]) + query


def split(uri: str) -> tuple[str, str]:
    """The URI of the folder of ``uri``, with the query, and the name of the file."""
    path, query = redact.split_query(uri)
    folder, _, name = path.rpartition("/")
    return (folder or ("/" if path.startswith("/") else ".")) + query, name


def basename(uri: str) -> str:
    """The last part of a URI, without a query string (``https://host/a.zip?alt=media`` → ``a.zip``)."""
    return redact.split_query(uri)[0].rstrip("/").rsplit("/", 1)[-1]
