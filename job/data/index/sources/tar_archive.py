"""Tar files, and tar shards in the WebDataset convention: labels lie beside images."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, cast

import msgspec

from job.data.index.bounded import BoundedFile
from job.data.index.sources.archive import Archive, Member, printable, unreadable
from job.data.index.sources.base import LONGEST_CLASS, is_image
from job.errors import DataError

LABEL_SUFFIXES = (".cls", ".json")
"""Members that label the image of the same name: the WebDataset convention."""
LABEL_KEYS = ("label", "class", "cls")
LARGEST_LABEL = 1 << 20
"""Bytes of the largest .cls or .json file beside an image, and of the largest header in a tar."""
_BLOCK = tarfile.BLOCKSIZE
_RECORD = 20 * _BLOCK


class Tar(Archive):
    """A tar file; compressed by gzip it is copied and unpacked once per node."""

    name = "tar"
    suffixes = (".tar", ".tar.gz", ".tgz")
    is_shard = True

    def members(self, uri: str, file: IO[bytes]) -> Iterator[Member]:
        """See :func:`list_tar`."""
        return list_tar(uri, file)


def list_tar(uri: str, file: IO[bytes]) -> Iterator[Member]:
    """The plain files of a tar archive in their order; links and devices are left out.

    An image's label is taken from the .cls or .json file of the same name next to it, on either side.

    Raises:
        DataError: it is no tar archive, cut short or damaged, or it has sparse members or a label that is none.
    """
    bounded = BoundedFile(file, LARGEST_LABEL)
    try:
        yield from _labelled(uri, bounded)
    except DataError:
        raise
    except Exception as error:
        raise unreadable(uri, bounded, error) from error


def _labelled(uri: str, file: BoundedFile) -> Iterator[Member]:
    group: list[Member] = []
    label: str | None = None
    problem: DataError | None = None  # of a label file; some .json files are not labels, and lie beside no image
    stem = ""
    end = 0
    with tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:") as archive:
        while (item := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else it would remember all of them
            if item.size < 0 or archive.offset <= item.offset:
                raise tarfile.ReadError("a member's size is negative")
            end = archive.offset
            if not item.isfile():
                continue
            name = printable(item.name)
            if _stem(name) != stem:
                yield from _group(group, label, problem)
                group, label, problem, stem = [], None, None, _stem(name)
            if name.endswith(LABEL_SUFFIXES):
                try:
                    label = _label_of(archive, item) or label
                except DataError as error:
                    problem = DataError(f"{uri}: member {name} {error}. Pack it again.")
            elif item.issparse() and is_image(name):
                raise DataError(f"{uri}: member {name} is a sparse file. Pack it again without --sparse.")
            else:
                group.append(Member(name, item.offset_data, item.size, 0, None))
        yield from _group(group, label, problem)
    _require_end(file, end)


def _group(members: list[Member], label: str | None, problem: DataError | None) -> Iterator[Member]:
    """The members of one stem, labelled."""
    if problem is not None and any(is_image(member.key) for member in members):
        raise problem
    yield from (member._replace(label=label) for member in members)


def _require_end(file: BoundedFile, end: int) -> None:
    """Tell the end of a tar, which is zeros, from a damaged header, at which tarfile ends without an error."""
    file.seek(end)
    if file.read(_RECORD).strip(b"\0"):
        raise tarfile.ReadError(f"bytes that are no header follow member data at byte {end:,}")
    # POSIX ends a tar archive by zeros; tarfile takes a cut between two members for the end.
    size = file.seek(0, 2)
    file.seek(max(size - _BLOCK, 0))
    if file.read().strip(b"\0"):
        raise tarfile.ReadError("it is cut short")


def _stem(name: str) -> str:
    """The name up to the first dot of its last part, which members of one sample share."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def _label_of(archive: tarfile.TarFile, item: tarfile.TarInfo) -> str | None:
    """The class in a .cls or .json member.

    Raises:
        DataError: it is too large, sparse, not UTF-8 or no JSON.
    """
    if item.size > LARGEST_LABEL or item.issparse():
        raise DataError(f"is sparse or larger than {LARGEST_LABEL:,} bytes, and no label")
    content = archive.extractfile(item)
    assert content is not None
    return _label(content.read(), is_json=item.name.endswith(".json"))


def _label(content: bytes, *, is_json: bool) -> str | None:
    try:
        if is_json:
            value = msgspec.json.decode(content)
            if isinstance(value, dict):
                value = next((value[key] for key in LABEL_KEYS if key in value), None)
            text = "" if value is None or isinstance(value, (dict, list)) else str(value)
        else:
            text = content.decode().strip()
        text.encode()
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"is no JSON: {error}") from error
    except UnicodeError as error:
        raise DataError("is not UTF-8") from error
    if len(text) > LONGEST_CLASS:
        raise DataError(f"names a class of {len(text):,} characters, more than {LONGEST_CLASS:,}")
    return text or None
