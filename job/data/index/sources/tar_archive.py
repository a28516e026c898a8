"""Tar files, and tar shards in the WebDataset convention: labels lie beside images."""

from __future__ import annotations

import os
import posixpath
from array import array
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa

from job import storage
from job.data.index.bounded import BoundedFile
from job.data.index.left_out import LeftOut
from job.data.index.names import printable
from job.data.index.ranges import (
    LARGEST_DISK_GAP,
    LARGEST_GAP,
    LARGEST_READ,
    LARGEST_STREAM_GAP,
    Ranges,
    fetch_from,
    run_without_waiting,
)
from job.data.index.sources.archive import LINKS_OUTSIDE, Archive, Member, unreadable
from job.data.index.sources.base import ListingContext, Source, is_image
from job.data.index.sources.tar_side_index import IndexedHeaders, read_side_index, side_index_uri
from job.data.index.sources.webdataset import Group, Labels, is_label, key_of, labelled, parse_label
from job.data.index.tar_ahead import WalksAhead
from job.data.index.tar_headers import Header, Kind, TarHeaders
from job.errors import DataError, JobError, StorageError

LARGEST_LABEL = 1 << 20
"""Bytes of the largest .cls or .json file beside an image."""
MOST_WAITING = 1 << 17
"""Links that are held in memory since their targets come later in the archive."""
LONGEST_CHAIN = 40
"""Links from one to the next, as Linux follows them."""
CACHED_LABELS = 4096
LEAST_LISTED = 64
"""Members that are listed of an archive after the time limit, too."""
ROWS_IN_MEMORY = 2048
"""Members that are held as Python objects per archive that is listed: hundreds are at once."""


class Tar(Archive):
    """A tar file; a compressed one is copied and unpacked once per node."""

    name = "tar"
    suffixes = (
        ".tar",
        *(".tar.gz", ".tgz"),
        *(".tar.bz2", ".tar.bz", ".tbz2", ".tbz", ".tb2"),
        *(".tar.xz", ".txz"),
        *(".tar.zst", ".tar.zstd", ".tzst"),
    )
    is_shard = True
    lists_async = True

    def members(self, uri: str, file: IO[bytes], left_out: LeftOut) -> Iterator[Member]:
        """See :func:`list_tar`."""
        return list_tar(uri, file, left_out)

    def has_side_index(self, source: Source) -> bool:
        """Whether an index file of NVIDIA DALI lies beside it."""
        try:
            return storage.exists(side_index_uri(source.uri))
        except StorageError:  # buckets deny, rather than miss, what an account may not list
            return False

    async def tables_async(
        self, source: Source, number: int, context: ListingContext, segments: int
    ) -> AsyncIterator[pa.Table]:
        """The members of the archive, from its headers and labels alone."""
        reader = storage.Reader(source.uri)
        details = await reader.fetch_info("")
        if source.version and storage.version(details) != source.version:
            raise DataError(f"{source.uri} was replaced while it was listed. Start again.")

        def fetch(offset: int, size: int, least: int) -> Awaitable[bytes]:
            context.tick()
            return reader.fetch("", offset, size)

        if not isinstance(size := details.get("size"), int):
            raise StorageError(f"cannot list {source.uri}: its server does not tell how large it is.")
        async with WalksAhead(fetch, size, segments) as walks:
            ranges = Ranges(walks.fetch if segments > 1 else fetch, size, LARGEST_GAP)
            indexed = await read_side_index(source.uri, fetch, size) if context.has_side_indexes else None
            members: list[Member] = []
            async for member in tar_members(source.uri, ranges, context.left_out, indexed):
                members.append(member)
                if len(members) == ROWS_IN_MEMORY:
                    yield self.table(source, number, members)
                    members = []
                elif len(members) >= LEAST_LISTED and context.time_limit.is_over():
                    break
            if members:
                yield self.table(source, number, members)


def list_tar(uri: str, file: IO[bytes], left_out: LeftOut | None = None) -> Iterator[Member]:
    """:func:`tar_members` of an open file."""
    bounded = BoundedFile(file, 2 * LARGEST_READ)
    size = bounded.seek(0, os.SEEK_END)
    gap = LARGEST_DISK_GAP if _is_on_disk(file) else LARGEST_STREAM_GAP
    members = tar_members(uri, Ranges(fetch_from(bounded), size, gap), left_out or LeftOut())
    try:
        yield from run_without_waiting(members)
    except DataError:
        if bounded.failure is not None:
            raise bounded.failure from None
        raise


async def tar_members(
    uri: str, ranges: Ranges, left_out: LeftOut, indexed: IndexedHeaders | None = None
) -> AsyncIterator[Member]:
    """The files of a tar archive, in their order; those behind links come when their targets are known.

    An image's label is taken from the .cls or .json file of the same name next to it, on either side. A link to a file
    of the archive is that file under another name. Other links, devices and pipes are left out.

    Args:
        uri: of the archive, for messages.
        ranges: its content.
        left_out: counts members that are no files.
        indexed: the members as an index file names them; None: they are found by the headers.

    Raises:
        DataError: it is no tar archive, cut short or damaged, or it has sparse images or a label that is none.
    """
    try:
        async for member in _Listing(uri, indexed.ranges if indexed else ranges, left_out).members(indexed):
            yield member
    except JobError:
        raise
    except Exception as error:
        raise unreadable(uri, None, error) from error


class _Link(NamedTuple):
    name: str
    target: int  # hash of the target's name


@dataclass
class _TarGroup(Group):
    """A group of which some files are links."""

    links: list[_Link] = field(default_factory=list)


class _Listing:
    """One pass over the headers of a tar."""

    def __init__(self, uri: str, ranges: Ranges, left_out: LeftOut) -> None:
        self._uri = uri
        self._ranges = ranges
        self._left_out = left_out
        self._places = _Places()
        self._waiting: list[_TarGroup] = []
        self._waiting_links = 0
        self._labels: dict[int, Labels | DataError] = {}

    async def members(self, indexed: IndexedHeaders | None) -> AsyncIterator[Member]:
        group, headers = _TarGroup(), indexed or TarHeaders(self._ranges)
        while (item := await headers.next()) is not None:
            name = printable(item.name)
            # Files that macOS puts between the others (._a.jpg) belong to no sample.
            key = key_of(name) if name[name.rfind("/") + 1 :][:1] != "." else group.key
            if key != group.key and item.kind is not Kind.FOLDER:
                for member in await self._finished(group):
                    yield member
                group = _TarGroup(key)
            if item.kind is Kind.FILE:
                self._places.add(item.name, item.offset, item.size)
                if is_label(name):
                    group.labels[name] = await self._read_label(name, item.offset, item.size)
                else:
                    group.members.append(Member(name, item.offset, item.size, 0, None))
            else:
                self._add_special(group, name, item)
        for member in await self._finished(group):
            yield member
        await headers.require_end()
        for member in await self._resolved(final=True):
            yield member

    def _add_special(self, group: _TarGroup, name: str, item: Header) -> None:
        if item.kind in (Kind.HARD_LINK, Kind.SYMBOLIC_LINK):
            if (target := _target(item)) is None:
                self._left_out.add(LINKS_OUTSIDE, name)
            else:
                group.links.append(_Link(name, target))
        elif item.kind is Kind.SPARSE:
            if is_image(name):
                raise DataError(f"{self._uri}: member {name} is a sparse file. Pack it again without --sparse.")
            if is_label(name):
                group.labels[name] = _no_label()
            else:
                self._left_out.add("sparse files", name)
        elif item.kind is Kind.DEVICE:
            self._left_out.add("devices and pipes", name)

    async def _finished(self, group: _TarGroup) -> Iterable[Member]:
        """The members of a group, unless it has links."""
        if not group.links:
            if len(group.members) == len(group.labels) == 1 and (member := _labelled_alone(group)) is not None:
                return (member,)
            return labelled(self._uri, group, self._left_out)
        self._waiting.append(group)
        self._waiting_links += len(group.links)
        return await self._resolved(final=False) if self._waiting_links > MOST_WAITING else ()

    async def _resolved(self, *, final: bool) -> list[Member]:
        """The members of the waiting groups whose links lead to known files; at the end of all groups."""
        waiting, self._waiting, self._waiting_links = self._waiting, [], 0
        links = {_name_hash(link.name): link.target for group in waiting for link in group.links}
        places = self._places.find(list(links.values()))
        members: list[Member] = []
        for group in waiting:
            unresolved = []
            for link in group.links:
                target, steps = link.target, 0
                while target not in places and target in links and steps < LONGEST_CHAIN:
                    target, steps = links[target], steps + 1
                if target in places:
                    await self._add_target(group, link.name, *places[target])
                else:
                    unresolved.append(link)
            group.links = unresolved
            if not unresolved or final:
                for link in unresolved:
                    self._left_out.add(LINKS_OUTSIDE, link.name)
                members += labelled(self._uri, group, self._left_out)
            else:
                self._waiting.append(group)
                self._waiting_links += len(unresolved)
        if self._waiting_links > MOST_WAITING // 2:
            raise DataError(
                f"{self._uri} has more than {MOST_WAITING // 2:,} links whose targets are not in the archive, or come "
                "later in it. Pack it again with --dereference."
            )
        return members

    async def _add_target(self, group: Group, name: str, offset: int, size: int) -> None:
        self._places.add(name, offset, size)
        if is_label(name):
            if offset not in self._labels:
                if len(self._labels) >= CACHED_LABELS:
                    self._labels.clear()
                self._labels[offset] = await self._read_label(name, offset, size)
            group.labels[name] = self._labels[offset]
        else:
            group.members.append(Member(name, offset, size, 0, None))

    async def _read_label(self, name: str, offset: int, size: int) -> Labels | DataError:
        if size > LARGEST_LABEL:
            return _no_label()
        if (content := self._ranges.held(offset, size)) is None:
            content = await self._ranges.read(offset, size)
        try:
            return parse_label(content, is_json=name.lower().endswith(".json"))
        except DataError as error:  # it may lie beside no image: not all .json files are labels
            return error


class _Places:
    """Where the files of an archive lie, by hash of their names: 24 bytes per file."""

    def __init__(self) -> None:
        self._hashes, self._offsets, self._sizes = array("q"), array("q"), array("q")

    def add(self, name: str, offset: int, size: int) -> None:
        self._hashes.append(_name_hash(name))
        self._offsets.append(offset)
        self._sizes.append(size)

    def find(self, hashes: list[int]) -> dict[int, tuple[int, int]]:
        """(offset, size) by hash; of files with the same name the last one."""
        if not hashes or not self._hashes:
            return {}
        all_hashes = np.array(self._hashes, np.int64)
        order = np.argsort(all_hashes, kind="stable")
        wanted = np.unique(np.asarray(hashes, np.int64))
        rows = order[np.searchsorted(all_hashes, wanted, "right", sorter=order) - 1]
        places = rows[all_hashes[rows] == wanted].tolist()
        return {self._hashes[place]: (self._offsets[place], self._sizes[place]) for place in places}


def _name_hash(name: str) -> int:
    """64 bits that nobody can foresee, so that no archive is made of names that collide."""
    return hash(_normal(name))


def _normal(name: str) -> str:
    plain = "./" not in name and "//" not in name and name[:1] != "/"
    return name if plain else posixpath.normpath(name).lstrip("/")


def _target(link: Header) -> int | None:
    """Hash of the name of a link's target; None if it lies outside of the archive."""
    target = link.target
    if link.kind is Kind.SYMBOLIC_LINK:
        if target.startswith("/"):
            return None
        target = posixpath.normpath(posixpath.join(posixpath.dirname(_normal(link.name)), target))
    return None if target.split("/", 1)[0] == ".." else _name_hash(target)


def _labelled_alone(group: Group) -> Member | None:
    """The only image of a group, with its only label of the same name: what :func:`labelled` yields, sooner."""
    member = group.members[0]
    ((name, label),) = group.labels.items()
    key = member.key
    if isinstance(label, str) and key.rpartition(".")[0] == name.rpartition(".")[0] and is_image(key):
        return Member(key, member.offset, member.size, 0, label)
    return None


def _is_on_disk(file: IO[bytes]) -> bool:
    """Whether a read from another place costs next to nothing: from a disk or memory."""
    try:
        file.fileno()
    except (AttributeError, OSError):
        return hasattr(file, "getbuffer")
    return True


def _no_label() -> DataError:
    return DataError(f"is sparse or larger than {LARGEST_LABEL:,} bytes, and no label")
