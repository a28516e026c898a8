"""The tree of folders of a listing, with the number of images in each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from job.data.index.listing import Listing
from job.data.index.names import folder_of

MOST_FOLDERS = 1 << 20
MOST_CHARACTERS = 1 << 26
"""Folders that are distinguished, and characters of their paths; beyond, the deepest count as their parents."""
_DEEPEST = 32


@dataclass(slots=True)
class Folder:
    """One folder.

    Attributes:
        images: images that lie directly in it.
        total: images in it and in all folders below.
        children: folders directly in it, by name.
    """

    images: int = 0
    total: int = 0
    children: dict[str, Folder] = field(default_factory=dict)

    def with_images(self) -> list[str]:
        """Names of the folders directly in it that hold an image at any depth, in order."""
        return sorted(name for name, child in self.children.items() if child.total)

    def without_images(self) -> list[str]:
        """Names of the other folders directly in it."""
        return sorted(name for name, child in self.children.items() if not child.total)

    @property
    def is_nested(self) -> bool:
        """Whether all of its images lie in folders in it."""
        return self.total > 0 and not self.images


@dataclass
class FolderTree:
    """The folders of a listing.

    Attributes:
        root: the root.
        depth: levels that are distinguished.
    """

    root: Folder
    depth: int

    def folders(self, names: pa.ChunkedArray) -> pa.ChunkedArray:
        """The folder of each name, as far as the tree tells folders apart."""
        return _folder_of(names, self.depth)


def _folder_of(names: pa.ChunkedArray, depth: int) -> pa.ChunkedArray:
    """The folder of each name, cut after ``depth`` folders."""
    if depth < _DEEPEST:
        pattern = rf"(?s)^((?:[^/]*/){{0,{depth}}}).*"
        return pc.utf8_rtrim(pc.replace_substring_regex(names, pattern, r"\1"), "/")
    return folder_of(names)


def folder_tree(listing: Listing) -> FolderTree:
    """Count the images of a listing by folder, in one pass."""
    counts: dict[str, int] = {}
    depth, characters = _DEEPEST, 0
    for table in listing.tables():
        folders = _folder_of(table["name"], depth)
        for folder in pc.unique(folders).to_pylist():
            if folder not in counts:
                counts[folder] = 0
                characters += len(folder)
        for pair in pc.value_counts(folders.filter(table["image"])).to_pylist():
            counts[pair["values"]] += pair["counts"]
        while depth > 1 and (len(counts) > MOST_FOLDERS or characters > MOST_CHARACTERS):
            depth = min(depth, max(name.count("/") + 1 for name in counts)) - 1
            counts = _cut(counts, depth)
            characters = sum(map(len, counts))
    if depth == _DEEPEST and any(name.count("/") >= depth for name in counts):
        depth -= 1  # below it _folder_of would not cut
    root = Folder()
    for name, images in counts.items():
        if name.count("/") >= depth:
            name = "/".join(name.split("/")[:depth])
        folder = root
        folder.total += images
        for piece in name.split("/") if name else ():
            folder = folder.children.setdefault(piece, Folder())
            folder.total += images
        folder.images += images
    return FolderTree(root, depth)


def _cut(counts: dict[str, int], depth: int) -> dict[str, int]:
    cut: dict[str, int] = {}
    for name, images in counts.items():
        parent = "/".join(name.split("/")[:depth])
        cut[parent] = cut.get(parent, 0) + images
    return cut


def walk(folder: Folder, path: str) -> Iterator[tuple[str, Folder]]:
    """``folder`` and all folders below it, with their paths."""
    waiting = [(path, folder)]
    while waiting:
        name, each = waiting.pop()
        yield name, each
        waiting += [(f"{name}/{child}" if name else child, below) for child, below in each.children.items()]
