"""Access control for URIs in tables and indexes: files written by others must not choose what this host reads."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver

from job import redact, storage
from job.errors import ConfigError, DataError

OBJECT_STORES = frozenset({"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "hf", "oss"})
"""Protocols whose ``//`` is followed by a bucket's name, not by a host."""
WEB = frozenset({"http", "https"})
METADATA_HOSTS = frozenset({"metadata.google.internal", "metadata.goog", "metadata"})
METADATA_ADDRESSES = frozenset(
    map(ipaddress.ip_address, ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"))
)
"""Metadata services outside the link-local networks: Alibaba Cloud, Azure, Oracle, AWS and Google over IPv6."""
_THIS_HOST = ipaddress.ip_network("0.0.0.0/8")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Access:
    """URIs that tables and indexes may name, besides object stores and public web servers.

    Attributes:
        allow: hosts (``HOST`` or ``HOST:PORT``) and URI prefixes that the user allows by ``--data.allow``.
        typed: URIs of the command line; what they name is allowed.
        unrestricted: check nothing, for programs that read an index of their own.
    """

    allow: tuple[str, ...] = ()
    typed: tuple[str, ...] = ()
    unrestricted: bool = False

    def problem(self, uri: str, *, local: bool, filesystem_of: str = "") -> str | None:
        """Reason for which ``uri`` must not be read, or None.

        Args:
            uri: an absolute URI, or a local path.
            local: the table or index that names it is a local file, which may name local files.
            filesystem_of: URI of that table or index, whose own filesystem it may name.
        """
        if self.unrestricted or self.permitted_prefix(uri) is not None:
            return None
        if is_chained(uri):
            return "chains filesystems"
        scheme, authority = split_scheme(uri)
        if scheme in ("", "file", "local"):
            return None if local else "is a local file, and the table or index that names it is not"
        if scheme in OBJECT_STORES:
            return None
        if not local and scheme not in WEB and split_scheme(filesystem_of) != (scheme, authority):
            return f"is neither in an object store nor on a web server ({scheme}://)"
        return None if scheme == "memory" else self._host_problem(uri, scheme)

    def problem_of_host(self, uri: str, *, local: bool, filesystem_of: str = "") -> str | None:
        """:meth:`problem`, and reason for which a web server's present addresses must not be connected to."""
        if (reason := self.problem(uri, local=local, filesystem_of=filesystem_of)) or split_scheme(uri)[0] not in WEB:
            return reason
        host, port = _host_and_port(uri)
        if self.permits_host(host, port):
            return None
        with contextlib.suppress(OSError):  # a name without an address fails when it is read
            for _, _, _, _, where in socket.getaddrinfo(host, port):
                if reason := internal(ipaddress.ip_address(str(where[0]).split("%")[0])):
                    return reason
        return None

    def require_sources(self, uris: list[str], origin: str, *, local: bool) -> None:
        """Check the sources of an index.

        Args:
            uris: URIs of its sources.
            origin: URI of the index.
            local: it may name local files.

        Raises:
            DataError: one of them must not be read.
        """
        for uri in uris:
            if reason := self.problem(uri, local=local, filesystem_of=origin):
                raise DataError(refusal(f"{origin} names {uri}, which {reason}"))

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """While the context lasts, web servers are looked up by filesystems that check each address they connect to.

        It covers what no check of a URI can: names that resolve to an internal address, and redirects to one.
        """
        with contextlib.nullcontext() if self.unrestricted else storage.http_client(self.client):
            yield

    async def client(self, **settings: Any) -> aiohttp.ClientSession:
        """A session that connects to public addresses and to what is allowed; for fsspec's ``get_client``."""
        sockets = _Sockets(self)
        connector = aiohttp.TCPConnector(
            limit=storage.CONNECTIONS, resolver=_Resolver(self, sockets), socket_factory=sockets
        )
        return aiohttp.ClientSession(connector=connector, **{k: v for k, v in settings.items() if k != "connector"})

    def permits_host(self, host: str, port: int | None) -> bool:
        """Whether connections to a host are allowed: as a whole, or for what lies below a URI prefix."""
        prefixes = (entry for entry in self.allow if "://" in entry)
        return self._permits_whole_host(host, port) or any(
            _host_and_port(prefix) == (_normal(host), port) for prefix in prefixes
        )

    def _permits_whole_host(self, host: str, port: int | None) -> bool:
        """Whether a host is allowed by name, or named on the command line."""
        name = _normal(host)
        for entry in self.allow:
            if "://" not in entry and not entry.startswith("/"):
                allowed, allowed_port = _host_and_port(f"http://{entry}", default=None)
                if allowed == name and allowed_port in (None, port):
                    return True
        return any(split_scheme(uri)[0] in WEB and _host_and_port(uri) == (name, port) for uri in self.typed)

    def permitted_prefix(self, uri: str) -> str | None:
        """The prefix of ``uri`` that the user allows, or has named on the command line; None where there is none."""
        path = uri.removeprefix("file://")
        prefixes = [entry for entry in self.allow if "://" in entry or entry.startswith("/")]
        prefixes += [_folder_of_pattern(typed) for typed in self.typed]
        return next((p for p in (prefix.removeprefix("file://") for prefix in prefixes) if _is_below(path, p)), None)

    def _host_problem(self, uri: str, scheme: str) -> str | None:
        try:
            host, port = _host_and_port(uri)
        except ValueError:
            return "names no host that can be parsed"
        if not host:
            return "names no host" if scheme in WEB else None
        if self._permits_whole_host(host, port):
            return None
        if host in METADATA_HOSTS:
            return "is the metadata server of a cloud's machines"
        if host == "localhost" or host.endswith(".localhost"):
            return "is on this machine"
        address = literal_address(host)
        return internal(address) if address is not None else None


def from_options(allow: str | list[str] | None, typed: list[str], option: str = "--data.allow") -> Access:
    """Access as the command line gives it.

    Args:
        allow: hosts and URI prefixes.
        typed: URIs of the command line.
        option: name of the option.

    Raises:
        ConfigError: an entry is neither a host nor a URI prefix.
    """
    entries = [allow] if isinstance(allow, str) else list(allow or [])
    for entry in entries:
        try:
            valid = entry.startswith("/") or bool(_ABSOLUTE.match(entry) or _host_of(entry))
        except ValueError:
            valid = False
        if not valid or is_chained(entry) or re.search(r"\s", entry):
            raise ConfigError(f"{option} takes hosts (HOST or HOST:PORT) and URI prefixes, not {entry!r}.")
    return Access(tuple(entries), tuple(map(redact.identity, typed)))


def refusal(problem: str) -> str:
    """A message that ends with the option to allow it."""
    return f"{problem}. If it is meant, allow its host or a URI prefix by --data.allow (--allow of predict and index)."


def split_scheme(uri: str) -> tuple[str, str]:
    """(scheme in lower case, authority); two empty strings for a path."""
    match = _ABSOLUTE.match(uri)
    return (match[1].lower(), match[2]) if match else ("", "")


def is_local_uri(uri: str) -> bool:
    """Whether ``uri`` is a path or a ``file://`` URI, by its spelling alone."""
    return split_scheme(uri)[0] in ("", "file", "local") and not is_chained(uri)


def is_chained(uri: str) -> bool:
    """Whether fsspec takes ``uri`` for several filesystems, one on top of the other."""
    return "::" in re.sub(r"\[[0-9A-Za-z:.%_-]*\]", "", uri, count=1)


def has_parent_part(path: str) -> bool:
    """Whether ``..`` is a part of a path."""
    return ".." in path and ".." in path.split("?", 1)[0].split("/")


def leaves_folder(key: str, scheme: str) -> bool:
    """Whether a key, joined to a folder of that protocol, names something outside the folder."""
    path = key
    if scheme in ("http", "https"):
        path = key.split("?", 1)[0].split("#", 1)[0].lower().replace("%2e", ".")
    return path.startswith("/") or ".." in path.split("/")


def literal_address(host: str) -> Address | None:
    """The address that a host's name spells, in any spelling that the C library takes; None for other names."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.split("%")[0])
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))  # decimal, octal, hexadecimal, fewer than four parts
    except (OSError, ValueError):
        return None


def internal(address: Address) -> str | None:
    """Reason for which nothing at ``address`` may be read, or None."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and (address in _NAT64 or (int(address) >> 32 == 0 and int(address) > 1)):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return internal(inner)
    if address.is_loopback or address.is_unspecified or address in _THIS_HOST:
        return f"is on this machine ({address})"
    if address in METADATA_ADDRESSES:
        return f"is the metadata server of a cloud's machines ({address})"
    if address.is_link_local:
        return f"has a link-local address ({address})"
    return f"has a multicast address ({address})" if address.is_multicast else None


class _Sockets:
    """Socket factory that only connects to public addresses, and to those of allowed hosts."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.permitted: set[tuple[str, int]] = set()

    def __call__(self, info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, protocol, _, place = info
        host, port = str(place[0]), int(place[1])
        reason = internal(ipaddress.ip_address(host.split("%")[0]))
        if reason and (host, port) not in self.permitted and not self.access.permits_host(host, port):
            raise DataError(refusal(f"refused to connect to {host}:{port}, which {reason}"))
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        return connection


class _Resolver(AbstractResolver):
    """Resolver that records the addresses of allowed hosts, and refuses internal ones of others."""

    def __init__(self, access: Access, sockets: _Sockets) -> None:
        self._access, self._sockets = access, sockets
        self._resolver = DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = await self._resolver.resolve(host, port, family)
        if self._access.permits_host(host, port):
            self._sockets.permitted |= {(each["host"], port) for each in addresses}
            return addresses
        if _normal(host) in METADATA_HOSTS:
            raise DataError(refusal(f"refused to connect to {host}, the metadata server of a cloud's machines"))
        for each in addresses:
            if reason := internal(ipaddress.ip_address(each["host"].split("%")[0])):
                raise DataError(refusal(f"refused to connect to {host}, which {reason}"))
        return addresses

    async def close(self) -> None:
        await self._resolver.close()


def _normal(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()


def _host_of(entry: str) -> str:
    return _host_and_port(f"http://{entry}")[0]


def _host_and_port(uri: str, default: int | None = 0) -> tuple[str, int | None]:
    """Host and port as aiohttp finds them; without a port that of the scheme, or ``default`` where that is None."""
    url = yarl.URL(uri)
    port = url.explicit_port if default is None else url.port
    return _normal(url.raw_host or ""), port


def _folder_of_pattern(uri: str) -> str:
    """``uri``, or the folder in which a pattern's matches lie."""
    match = re.search(r"[{*?\[]", uri)
    if match is None or (match[0] == "?" and split_scheme(uri)[0] in WEB):
        return uri
    return uri[: match.start()].rpartition("/")[0] or "/"


def _is_below(uri: str, prefix: str) -> bool:
    folder = f"{prefix.rstrip('/')}/"
    return uri == prefix or (uri.startswith(folder) and not has_parent_part(uri.removeprefix(folder)))
