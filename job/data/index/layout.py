"""Find parts (train, val, test) and classes in the names of a listing, or in the labels that it has.

Decisions are made on the tree of folders. Rows are computed column-wise on the listing on disk, some ten thousand at a
time.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from job import storage
from job.data.index.folders import Folder, FolderTree, folder_tree, walk
from job.data.index.left_out import NO_IMAGES, LeftOut
from job.data.index.listing import Listing
from job.data.index.part_names import PARTS, Recognised, part_of, recognise
from job.data.index.sources.base import LISTING
from job.errors import DataError
from job.process.terminal import escape

log = logging.getLogger(__name__)

_TABLE = r"(?i)\.(csv|tsv|jsonl|ndjson|parquet)(\.gz|\.bz2|\.xz|\.zst)?$"
_SEPARATELY = "Give the parts by --data.train, --data.val and --data.test."


@dataclass(frozen=True)
class Part:
    """One part of a data set.

    Attributes:
        root: URI to name in messages.
        images: number of images by class.
        tables: returns its samples, whenever it is called, in tables with the columns of :data:`LISTING`; ``class`` is
            set where ``images`` has classes, in :func:`labelled_images` of the images that have a label.
        problem: why its images have no usable labels; None: they have.
        several_labels: some samples have ``classes``, and not exactly one of them.
    """

    root: str
    images: dict[str, int]
    tables: Callable[[], Iterator[pa.Table]]
    problem: str | None = None
    several_labels: bool = False

    @property
    def classes(self) -> list[str]:
        """Class names in order."""
        return class_order(set(self.images))


def find_parts(listing: Listing, left_out: LeftOut) -> dict[str, Part]:
    """The parts under one root.

    Labels of the data (WebDataset, a table) are used, and its ``split`` column gives the parts. Otherwise folders do:
    ``train/``, ``val/`` and ``test/`` in any spelling of :mod:`job.data.index.part_names`, each of class folders; or
    class folders, which are the train part, or which each hold a folder per part. A folder that wraps everything, as
    archives have it, is stepped into.

    Args:
        listing: of the root.
        left_out: counts images and folders that are in no part.

    Raises:
        DataError: the layout is none of these, or some images have no label.
    """
    if _has_labels(listing):
        labelled = _labelled_parts(listing)
        if "train" not in labelled:
            raise DataError(f"{listing.uri} names no training image.")
        return labelled
    tree = folder_tree(listing)
    level = _level_of_parts(listing, tree)
    if level is None:
        return _without_part_folders(listing, tree, left_out)
    path, folder, folders = level
    root = _root(listing, path)
    if "train" not in folders:
        named = [name for names in folders.values() for name in names]
        has_others = len(folder.with_images()) > len(named)
        as_classes = f" If its folders are classes, give {root} by --data.train." if has_others else ""
        raise DataError(f"{root} holds {_listed(named)} but no train/ folder. {_SEPARATELY}{as_classes}")
    parts: dict[str, Part] = {}
    used = 0
    for part, names in folders.items():
        class_names = set(parts["train"].images) if "train" in parts else set()
        try:
            if len(names) > 1:
                raise DataError(f"{root} holds both {_listed(names)}: which one is the {part} part? {_SEPARATELY}")
            child = folder.children[names[0]]
            parts[part] = _class_folders(listing, tree, _join(path, names[0]), child, left_out, class_names)
            used += child.total
        except DataError as error:
            if part != "test":
                raise
            total = sum(folder.children[name].total for name in names)
            left_out.add("images of a test part that cannot be used", f"{_join(path, names[0])}/", total)
            parts[part] = Part(root, {}, lambda: iter(()), str(error))
            used += total
    beside = [name for name in folder.with_images() if all(name not in names for names in folders.values())]
    if "val" not in folders:
        for name in beside:
            if len(parts["train"].images.keys() & set(folder.children[name].with_images())) > 1:
                raise DataError(
                    f"{root} holds {_listed([folders['train'][0], name])} with folders of the same names: what is "
                    f"{escape(name)}/ for? {_SEPARATELY}"
                )
    example = f"{_join(path, beside[0])}/" if beside else root
    left_out.add("images outside the folders of the parts", example, tree.root.total - used)
    return parts


def class_folders(listing: Listing, left_out: LeftOut) -> Part:
    """One part alone: class folders (torchvision's ImageFolder layout), or images with labels of their own.

    Raises:
        DataError: no class folder, or images beside the class folders.
    """
    if _has_labels(listing):
        parts = _labelled_parts(listing)
        if len(parts) > 1:
            raise DataError(f"{listing.uri} has a split column with {', '.join(parts)}: give it by --data.root.")
        return next(iter(parts.values()))
    tree = folder_tree(listing)
    path, folder = _unwrapped("", tree.root, set())
    if _has_train(folder) and all(folder.children[name].is_nested for name in folder.with_images()):
        raise DataError(f"{_root(listing, path)} holds {_listed(folder.with_images())}: give it by --data.root.")
    return _class_folders(listing, tree, "", tree.root, left_out, set())


def all_images(listing: Listing) -> Part:
    """Every image, without labels.

    Raises:
        DataError: there is none.
    """

    def tables() -> Iterator[pa.Table]:
        for table in listing.tables():
            yield table.filter(table["image"]).select(LISTING.names)

    if not any(len(table) for table in tables()):
        raise DataError(f"no image under {listing.uri}.")
    return Part(listing.uri, {}, tables)


def labelled_images(listing: Listing, known: Collection[str]) -> Part:
    """Every image, with its label where the data has one.

    Labels of the data (WebDataset, a table) are used. Otherwise folders are classes if any has the name of a known one:
    all folders of that level at which most images lie in known ones. So an image may have a class that is not known.

    Args:
        listing: the images.
        known: names of classes.

    Raises:
        DataError: there is no image.
    """
    if _has_labels(listing):
        images: Counter[str] = Counter()
        each = [_count_labels(table.filter(table["image"]), images) for table in listing.tables()]
        return Part(listing.uri, dict(images), all_images(listing).tables, several_labels=any(each))
    tree = folder_tree(listing)
    paths = {path: folder.images for path, folder in walk(tree.root, "") if path and folder.images}
    level = _level_of_classes(paths, frozenset(known))
    if level is None:
        return all_images(listing)
    names = {path: path.split("/")[level] for path in paths if path.count("/") >= level}
    images = Counter()
    for path, name in names.items():
        images[name] += paths[path]

    def tables() -> Iterator[pa.Table]:
        folders, classes = (pa.array(column, pa.string()) for column in (names.keys(), names.values()))
        for table in listing.tables():
            table = table.filter(table["image"])
            places = pc.index_in(tree.folders(table["name"]), folders)
            table = table.set_column(table.column_names.index("class"), "class", pc.take(classes, places))
            yield table.select(LISTING.names)

    return Part(listing.uri, dict(images), tables)


def class_order(names: set[str]) -> list[str]:
    """Class names in order: of their numbers if all are numbers, else of the alphabet."""
    return sorted(sorted(names), key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _has_labels(listing: Listing) -> bool:
    return any(table[column].null_count < len(table) for table in listing.tables() for column in ("class", "classes"))


def _labelled_parts(listing: Listing) -> dict[str, Part]:
    def tables(part: str) -> Iterator[pa.Table]:
        for table in listing.tables():
            in_part = pc.equal(pc.fill_null(table["part"], "train"), part)
            yield table.filter(pc.and_(table["image"], in_part)).select(LISTING.names)

    parts = {}
    for part in PARTS:
        images: Counter[str] = Counter()
        unlabelled, example, is_several, samples = 0, "", False, 0
        for table in tables(part):
            without = pc.and_(pc.is_null(table["class"]), pc.is_null(table["classes"]))
            if missing := pc.sum(without).as_py() or 0:
                unlabelled, example = unlabelled + missing, example or table.filter(without)["key"][0].as_py()
            samples += len(table)
            is_several |= _count_labels(table, images)
        problem = f"{unlabelled:,} of its images have no label, for example {example}" if unlabelled else None
        if problem and part != "test":
            raise DataError(
                f"{listing.uri}: {example} has no label, others have. Label it in the table, or by a .cls or .json "
                "file in the archive, or remove it."
            )
        if samples:
            parts[part] = Part(listing.uri, dict(images), functools.partial(tables, part), problem, is_several)
    return parts


def _count_labels(table: pa.Table, images: Counter[str]) -> bool:
    """Count the images of each class; returns whether one of them has several labels, or an empty list of them."""
    lists = table["classes"]
    for labels in (table["class"].filter(pc.is_null(lists)), pc.list_flatten(lists)):
        for pair in pc.value_counts(labels.drop_null()).to_pylist():
            images[pair["values"]] += pair["counts"]
    return bool(pc.any(pc.not_equal(pc.list_value_length(lists), 1)).as_py())


def _level_of_classes(images: Mapping[str, int], known: frozenset[str]) -> int | None:
    """The level of folders at which most images lie in a folder of a known name, the uppermost of equals.

    Args:
        images: number of images by the folder in which they lie.
        known: names of classes.

    Returns:
        0 for the uppermost folders; None where no folder has such a name.
    """
    matches: Counter[int] = Counter()
    for path, count in images.items():
        for level, name in enumerate(path.split("/")):
            if name in known:
                matches[level] += count
    return min(matches, key=lambda level: (-matches[level], level), default=None)


def _level_of_parts(listing: Listing, tree: FolderTree) -> tuple[str, Folder, dict[str, list[str]]] | None:
    """Where the folders of the parts lie side by side: (path, folder, names of folders by part); None: nowhere.

    Raises:
        DataError: folders sound like parts, but it is not clear which.
    """
    path, folder = "", tree.root
    while True:
        folders = _part_folders(listing, path, folder)
        inside = folder.with_images()
        only = folder.children[inside[0]] if len(inside) == 1 else None
        if folders and not (only and _has_train(only)):
            return path, folder, folders
        if only is None:
            return None
        path, folder = _join(path, inside[0]), only


def _has_train(folder: Folder) -> bool:
    """Whether a folder holds several parts, train among them."""
    recognised = recognise(folder.with_images()).folders
    return len(recognised) > 1 and "train" in recognised


def _part_folders(listing: Listing, path: str, folder: Folder) -> dict[str, list[str]]:
    """Names of the folders of the parts in one folder, by part; empty if there are none."""
    full = folder.with_images()
    recognised = recognise(full)
    root = _root(listing, path)
    nested = [name for name in full if folder.children[name].is_nested]
    named = [name for names in recognised.folders.values() for name in names]
    if len(named) == 1 and len(full) > 1 and named[0] not in nested:
        if named[0].lower() != "train":
            raise DataError(
                f"{root} holds {escape(named[0])}/ beside {_listed([name for name in full if name != named[0]])}, "
                f"which may be classes: is it one, too? {_SEPARATELY}"
            )
        log.warning("%s: %s/ is taken for a class, since it holds images, as other folders do", root, named[0])
        recognised, named = Recognised({}, []), []
    unclear = [name for name in recognised.unclear if name in nested]
    questionable = unclear if named or len(unclear) > 1 else []
    # A test part is not needed beside the others.
    complete = {"train", "val"} <= recognised.folders.keys() and all("test" in name.lower() for name in unclear)
    if questionable and not complete:
        raise DataError(
            f"{root} holds {_listed([*named, *questionable])}: which of them are for training, and which for "
            f"validation? {_SEPARATELY}"
        )
    folders = dict(recognised.folders)
    if folders:  # a part whose folder is empty is no part, but its absence is to be explained
        for part, names in recognise(folder.without_images()).folders.items():
            folders.setdefault(part, names[:1])
    return {part: folders[part] for part in PARTS if part in folders}


def _without_part_folders(listing: Listing, tree: FolderTree, left_out: LeftOut) -> dict[str, Part]:
    """Class folders alone, or class folders that hold a folder per part each."""
    path, folder = _unwrapped("", tree.root, set())
    below: dict[str, set[str]] = {}
    for name in folder.with_images():
        for inner in folder.children[name].with_images():
            below.setdefault(inner, set()).add(name)
    parts: dict[str, list[str]] = {}
    for inner in sorted(below):
        if (part := part_of(inner)) is not None:
            parts.setdefault(part, []).append(inner)
    if len(parts) < 2:
        _require_classes(listing, path, folder)
        return {"train": _class_folders(listing, tree, path, folder, left_out, set())}
    root = _root(listing, path)
    others = sorted(below.keys() - {inner for names in parts.values() for inner in names})
    beside = folder.images + sum(folder.children[name].images for name in folder.with_images())
    if others or beside or "train" not in parts or any(len(names) > 1 for names in parts.values()):
        raise DataError(
            f"the folders in {root} hold {_listed(sorted(below))}: which images are for training, and which for "
            f"validation? Expected CLASS/train/*.jpg and CLASS/val/*.jpg, and no image beside them. {_SEPARATELY}"
        )
    _count_empty(path, folder, left_out)
    labelled = {}
    for part in PARTS:
        if part in parts:
            (inner,) = parts[part]
            part_folders = {name: folder.children[name].children[inner] for name in sorted(below[inner])}
            classes = {_join(path, f"{name}/{inner}"): (name, each) for name, each in part_folders.items()}
            labelled[part] = _part(f"{root} ({inner}/)", listing, tree, classes)
    return labelled


def _require_classes(listing: Listing, path: str, folder: Folder) -> None:
    """Refuse a few folders that all hold the same folders: these may be the classes, and those the parts."""
    names = folder.with_images()
    inner = {tuple(folder.children[name].with_images()) for name in names}
    if 2 <= len(names) <= 3 and len(inner) == 1 and all(folder.children[name].is_nested for name in names):
        (same,) = inner
        if len(same) > 1:
            raise DataError(
                f"{_root(listing, path)} holds {_listed(names)}, and each of them {_listed(list(same))}: which are the "
                f"classes? Give {_listed(names)} by --data.train and --data.val if they are parts, and "
                f"{_root(listing, path)} by --data.train if they are classes."
            )


def _class_folders(
    listing: Listing, tree: FolderTree, path: str, folder: Folder, left_out: LeftOut, class_names: set[str]
) -> Part:
    """Labels from the folders in one folder.

    Args:
        listing: the listing.
        tree: its folders.
        path: of the folder.
        folder: the folder.
        left_out: counts folders without images.
        class_names: classes, whose folders wrap nothing.
    """
    path, folder = _unwrapped(path, folder, class_names)
    root = _root(listing, path)
    if unreadable := [each for each in listing.unreadable if each.startswith(_join(path, ""))]:
        raise DataError(
            f"{storage.join(listing.uri, unreadable[0])} cannot be read (permission denied, or its name is not UTF-8), "
            "and may be a class. Make it readable, rename it, or move it away."
        )
    if not folder.total:
        raise DataError(f"no image under {root}. Expected CLASS/*.jpg (or .png, .webp, …).")
    if folder.images:
        raise DataError(
            f"{root} holds {folder.images:,} image(s) outside any class folder, for example "
            f"{_example(listing, tree, path)}. Expected CLASS/*.jpg: one folder per class.{_table_hint(listing)}"
        )
    _count_empty(path, folder, left_out)
    return _part(
        root, listing, tree, {_join(path, name): (name, folder.children[name]) for name in folder.with_images()}
    )


def _part(root: str, listing: Listing, tree: FolderTree, classes: dict[str, tuple[str, Folder]]) -> Part:
    """The images in some folders and below them.

    Args:
        root: URI to name in messages.
        listing: the listing.
        tree: its folders.
        classes: (class, folder) by path.
    """
    images: Counter[str] = Counter()
    for name, folder in classes.values():
        images[name] += folder.total

    def tables() -> Iterator[pa.Table]:
        # Made when it is needed, since a listing may have very many folders.
        pairs = [
            (path, name) for top, (name, folder) in classes.items() for path, each in walk(folder, top) if each.images
        ]
        paths, names = (pa.array(column, pa.string()) for column in zip(*pairs, strict=True))
        for table in listing.tables():
            table = table.filter(table["image"])
            places = pc.index_in(tree.folders(table["name"]), paths)
            table = table.set_column(table.column_names.index("class"), "class", pc.take(names, places))
            yield table.filter(pc.is_valid(places)).select(LISTING.names)

    return Part(root, dict(images), tables)


def _unwrapped(path: str, folder: Folder, class_names: set[str]) -> tuple[str, Folder]:
    """Step into a folder that alone holds images at its level, unless it is a class folder.

    Args:
        path: of the folder to begin with.
        folder: the folder.
        class_names: classes.
    """
    while folder.is_nested:
        inside = folder.with_images()
        if len(inside) > 1 or inside[0] in class_names or not folder.children[inside[0]].is_nested:
            break
        path, folder = _join(path, inside[0]), folder.children[inside[0]]
    return path, folder


def _count_empty(path: str, folder: Folder, left_out: LeftOut) -> None:
    if empty := folder.without_images():
        left_out.add(NO_IMAGES, f"{_join(path, empty[0])}/", len(empty))


def _example(listing: Listing, tree: FolderTree, path: str) -> str:
    """Key of an image that lies directly in a folder."""
    for table in listing.tables():
        keys = table.filter(pc.and_(table["image"], pc.equal(tree.folders(table["name"]), path)))["key"]
        if len(keys):
            return str(keys[0].as_py())
    return path


def _table_hint(listing: Listing) -> str:
    """How to use a table among the files of a listing, the uppermost one; none if there is no table."""
    names: list[str] = []
    for table in listing.tables():
        is_table = pc.and_(pc.match_substring_regex(table["name"], _TABLE), pc.less(table["offset"], 0))
        names += table["key"].filter(is_table).to_pylist()
        names = sorted(names, key=lambda name: (name.count("/"), name))[:1]
    if not names:
        return ""
    return (
        f" If {storage.join(listing.uri, names[0])} has their labels, give it as the data: one row per image, with its "
        "path from the table's folder, and its label (--data.columns names the columns)."
    )


def _root(listing: Listing, path: str) -> str:
    return storage.join(listing.uri, f"{path}/") if path else listing.uri


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _listed(names: list[str]) -> str:
    shown = [f"{escape(name)}/" for name in names[:6]] + (["…"] if len(names) > 6 else [])
    return ", ".join(shown[:-1]) + f" and {shown[-1]}" if len(shown) > 1 else shown[0]
