"""Find parts (train, val, test) and classes in the keys of a listing, or in the labels that it has.

Everything is computed column-wise on the listing on disk, some ten thousand rows at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from job import storage
from job.data.index.listing import Listing
from job.data.index.sources.base import IMAGE_PATTERN, LISTING
from job.errors import DataError

log = logging.getLogger(__name__)

CLASS_COLUMNS = ("class", "classes")
PART_FOLDERS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Part:
    """One part of a data set.

    Attributes:
        root: URI to name in messages.
        classes: class names in order.
        tables: returns its samples, whenever it is called, in tables of :data:`LISTING` with a ``class``.
        several_labels: some samples have ``classes``, and not exactly one of them.
    """

    root: str
    classes: list[str]
    tables: Callable[[], Iterator[pa.Table]]
    several_labels: bool = False


def find_parts(listing: Listing) -> dict[str, Part]:
    """The parts under one root.

    Labels of the data (WebDataset, a table) are used, and its ``split`` column gives the
    parts. Otherwise: ``train/``, ``validation/`` or ``val/``, ``test/``, each of class folders; or class
    folders alone, which are the train part. A single folder that wraps everything, as archives have it,
    is stepped into.

    Raises:
        DataError: the layout is none of these, or some images have no label.
    """
    if _has_labels(listing):
        labelled = _labelled_parts(listing)
        if "train" not in labelled:
            raise DataError(f"{listing.uri} names no training image.")
        return labelled
    prefix, survey = _unwrapped(listing, "")
    parts = {}
    for part, folders in PART_FOLDERS.items():
        present = [folder for folder in folders if folder in survey.folders]
        if len(present) > 1:
            raise DataError(
                f"{listing.uri} holds both {present[0]}/ and {present[1]}/: which one is meant? Remove one."
            )
        for folder in present:
            parts[part] = _class_folders(listing, f"{prefix}{folder}/")
    if parts and "train" not in parts:
        raise DataError(f"{listing.uri} holds {', '.join(parts)} but no train/ folder.")
    return parts or {"train": _class_folders(listing, prefix)}


def class_folders(listing: Listing) -> Part:
    """One part alone: class folders (torchvision's ImageFolder layout), or images with labels of their own.

    Raises:
        DataError: no class folder, an empty one, or images beside the class folders.
    """
    if _has_labels(listing):
        parts = _labelled_parts(listing)
        if len(parts) > 1:
            raise DataError(f"{listing.uri} has a split column with {', '.join(parts)}: give it by --data.root.")
        return next(iter(parts.values()))
    return _class_folders(listing, "")


def all_images(listing: Listing) -> Part:
    """Every image, without labels.

    Raises:
        DataError: there is none.
    """

    def tables() -> Iterator[pa.Table]:
        for batch in listing.batches():
            table = pa.table(batch)
            yield table.filter(pc.match_substring_regex(table["key"], IMAGE_PATTERN))

    if not any(len(table) for table in tables()):
        raise DataError(f"no image under {listing.uri}.")
    return Part(listing.uri, [], tables)


def class_order(names: set[str]) -> list[str]:
    """Class names in order: of their numbers if all are numbers, else of the alphabet."""
    return sorted(sorted(names), key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _has_labels(listing: Listing) -> bool:
    return any(batch.column(name).null_count < len(batch) for batch in listing.batches() for name in CLASS_COLUMNS)


def _labelled_parts(listing: Listing) -> dict[str, Part]:
    def tables(part: str) -> Iterator[pa.Table]:
        for batch in listing.batches():
            table = pa.table(batch)
            # Every row of a table is a sample; an archive may also hold files that are not images.
            meant = pc.or_(pc.less(table["offset"], 0), pc.match_substring_regex(table["key"], IMAGE_PATTERN))
            yield table.filter(pc.and_(meant, pc.equal(pc.fill_null(table["part"], "train"), part)))

    parts = {}
    for part in PART_FOLDERS:
        names: set[str] = set()
        several, samples = False, 0
        for table in tables(part):
            without = pc.and_(pc.is_null(table["class"]), pc.is_null(table["classes"]))
            if pc.any(without).as_py():
                key = table.filter(without)["key"][0].as_py()
                raise DataError(f"{listing.uri}: {key} has no label, others have. Add its .cls or .json file.")
            names |= set(pc.unique(table["class"].filter(pc.is_null(table["classes"]))).to_pylist())
            names |= set(pc.unique(pc.list_flatten(table["classes"])).to_pylist())
            several |= bool(pc.any(pc.not_equal(pc.list_value_length(table["classes"]), 1)).as_py())
            samples += len(table)
        if samples:
            classes = class_order(names - {None})
            _require_enough(listing.uri, classes, 1 if several else 2)
            parts[part] = Part(listing.uri, classes, lambda part=part: tables(part), several)  # type: ignore[misc]
    return parts


@dataclass
class _Survey:
    """Summary of the keys below one prefix."""

    folders: set[str] = field(default_factory=set)
    image_folders: set[str] = field(default_factory=set)
    images: int = 0
    least_depth: int = 1 << 30
    stray: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    strays: int = 0
    other_count: int = 0


def _below(listing: Listing, prefix: str) -> Iterator[pa.Table]:
    """The rows below a prefix, less hidden ones, with the columns rest (of the key), first (folder), image."""
    for batch in listing.batches():
        table = pa.table(batch)
        table = table.filter(pc.starts_with(table["key"], prefix)) if prefix else table
        rest = pc.utf8_slice_codeunits(table["key"], start=len(prefix))
        table = table.append_column("rest", rest)
        hidden = pc.or_(pc.starts_with(rest, "."), pc.match_substring(table["key"], "__MACOSX/"))
        table = table.filter(pc.and_(pc.invert(hidden), pc.not_equal(rest, "")))
        table = table.append_column("first", pc.replace_substring_regex(table["rest"], "(?s)/.*", ""))
        yield table.append_column("image", pc.match_substring_regex(table["rest"], IMAGE_PATTERN))


def _survey(listing: Listing, prefix: str) -> _Survey:
    survey = _Survey()
    for table in _below(listing, prefix):
        slashes = pc.count_substring(table["rest"], "/")
        nested, image = pc.greater(slashes, 0), table["image"]
        survey.folders |= set(pc.unique(table.filter(nested)["first"]).to_pylist())
        survey.image_folders |= set(pc.unique(table.filter(pc.and_(image, nested))["first"]).to_pylist())
        survey.images += pc.sum(image).as_py() or 0
        depth = pc.min(slashes.filter(image)).as_py()
        survey.least_depth = survey.least_depth if depth is None else min(survey.least_depth, depth)
        stray = table.filter(pc.and_(image, pc.invert(nested)))["key"]
        other = table.filter(pc.and_(pc.invert(image), pc.invert(pc.ends_with(table["rest"], "/"))))["key"]
        survey.strays, survey.other_count = survey.strays + len(stray), survey.other_count + len(other)
        survey.stray += stray[:1].to_pylist()
        survey.others += other[:1].to_pylist()
    return survey


def _unwrapped(listing: Listing, prefix: str) -> tuple[str, _Survey]:
    """Step into a folder that is alone at its level (but for files), unless it is a part or a class folder.

    Returns the prefix where that ends, and what lies there.
    """
    known = {folder for folders in PART_FOLDERS.values() for folder in folders}
    while True:
        survey = _survey(listing, prefix)
        if len(survey.folders) != 1 or survey.folders & known or not survey.images or survey.least_depth < 2:
            return prefix, survey
        prefix += f"{next(iter(survey.folders))}/"


def _class_folders(listing: Listing, prefix: str) -> Part:
    """Labels from the first folder of each key."""
    prefix, survey = _unwrapped(listing, prefix)
    root = storage.join(listing.uri, prefix) if prefix else listing.uri
    if not survey.images:
        raise DataError(f"no image under {root}. Expected CLASS/*.jpg (or .png, .webp, …).")
    if survey.strays:
        raise DataError(
            f"{root} holds {survey.strays} image(s) outside any class folder, for example {survey.stray[0]}. "
            "Expected CLASS/*.jpg: one folder per class."
        )
    if empty := sorted(survey.folders - survey.image_folders):
        raise DataError(f"no image in class folder(s) {', '.join(empty)} of {root}. Fill or remove them.")
    classes = sorted(survey.folders)
    _require_enough(root, classes, 2)
    if survey.other_count:
        log.warning(
            "%s: %d file(s) are no images and are ignored, for example %s", root, survey.other_count, survey.others[0]
        )

    def tables() -> Iterator[pa.Table]:
        for table in _below(listing, prefix):
            table = table.filter(table["image"])
            yield table.set_column(table.column_names.index("class"), "class", table["first"]).select(LISTING.names)

    return Part(root, classes, tables)


def _require_enough(root: str, classes: list[str], least: int) -> None:
    if not classes:
        raise DataError(f"no image of {root} has a label.")
    if len(classes) < least:
        raise DataError(f"{root} has a single class folder ({classes[0]}): at least two classes are needed.")
