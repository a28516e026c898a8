"""Which samples there are: class folders to (key, label), parts of a root, the validation split."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from job import storage
from job.data.source import is_image
from job.errors import DataError
from job.storage import Entry

log = logging.getLogger(__name__)

PART_FOLDERS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Index:
    """The samples of one part of a data set, in a fixed order: a sample's id is its place here.

    Attributes:
        root: URI that keys are relative to.
        keys: one key a sample, sorted.
        labels: one class number a sample; -1 where there is none (predict).
        classes: class names, sorted; a label is a place in this tuple.
    """

    root: str
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def fingerprint(self) -> str:
        """What tells this part from another: its size and a hash of keys and labels, but not where it lies."""
        digest = hashlib.sha256(repr((self.classes, self.labels)).encode())
        for key in self.keys:
            digest.update(key.encode() + b"\0")
        return f"{len(self):,} images, {digest.hexdigest()[:16]}"

    def uri(self, sample: int) -> str:
        """Where sample number ``sample`` lies."""
        return storage.join(self.root, self.keys[sample])


def index_unlabelled(uri: str) -> Index:
    """Every image under ``uri``, without labels.

    Raises:
        DataError: there is none.
    """
    keys = tuple(e.key for e in storage.list_files(uri) if is_image(e.key))
    if not keys:
        raise DataError(f"no image under {uri}.")
    return Index(uri, keys, (-1,) * len(keys), ())


def index_class_folders(uri: str) -> Index:
    """Index ``uri/CLASS/**/*.jpg`` (torchvision's ImageFolder layout).

    A single folder that wraps everything, as archives have it, is stepped into.

    Raises:
        DataError: no class folder, an empty one, or images beside the class folders.
    """
    return _index(uri, storage.list_files(uri))


def find_parts(uri: str) -> dict[str, Index]:
    """The parts under one root: ``train/``, ``validation/`` or ``val/``, ``test/``.

    Returns ``{"train": …}`` and what else there is; a root that holds class folders directly is its
    own train part.

    Raises:
        DataError: the layout is none of these.
    """
    root, entries = _unwrap(uri, storage.list_files(uri))
    parts = {}
    for part, folders in PART_FOLDERS.items():
        present = [folder for folder in folders if _below(entries, folder)]
        if len(present) > 1:
            raise DataError(f"{root} holds both {present[0]}/ and {present[1]}/: which one is meant? Remove one.")
        for folder in present:
            parts[part] = _index(storage.join(root, folder), _below(entries, folder))
    if parts and "train" not in parts:
        raise DataError(f"{root} holds {', '.join(parts)} but no train/ folder.")
    return parts or {"train": _index(root, entries)}


def split(index: Index, fraction: float, seed: int) -> tuple[Index, Index]:
    """Split into (train, validation), stratified, at least one sample of each class on both sides.

    Within a class the samples with the smallest hash of (seed, key) are held out. So the split is
    the same on every machine, and a sample added later does not move the others across.

    Raises:
        DataError: a class with fewer than two samples.
    """
    held_out: set[int] = set()
    for label, name in enumerate(index.classes):
        members = [i for i, found in enumerate(index.labels) if found == label]
        if len(members) < 2:
            raise DataError(
                f"class {name!r} in {index.root} has {len(members)} image: at least 2 are needed to hold one out "
                "for validation. Add images, or give --data.val."
            )
        members.sort(key=lambda i: hashlib.sha256(f"{seed}/{index.keys[i]}".encode()).digest())
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held_out.update(members[:count])
    return _subset(index, [i for i in range(len(index)) if i not in held_out]), _subset(index, sorted(held_out))


def require_same_classes(train: Index, other: Index) -> None:
    """Raise :class:`~job.errors.DataError`, naming the difference, unless both have the same classes."""
    if train.classes == other.classes:
        return
    missing, extra = sorted(set(train.classes) - set(other.classes)), sorted(set(other.classes) - set(train.classes))
    told = [f"only in {train.root}: {', '.join(missing)}"] if missing else []
    told += [f"only in {other.root}: {', '.join(extra)}"] if extra else []
    raise DataError(f"the class folders differ; {'; '.join(told)}. Make them agree.")


def _below(entries: list[Entry], folder: str) -> list[Entry]:
    """The entries under ``folder``, their keys relative to it."""
    prefix = folder + "/"
    return [
        Entry(e.key[len(prefix) :], e.size) for e in entries if e.key.startswith(prefix) and len(e.key) > len(prefix)
    ]


def _unwrap(root: str, entries: list[Entry]) -> tuple[str, list[Entry]]:
    """Step into a folder that is alone at its level (but for files), unless it is a part or a class folder."""
    known = {folder for folders in PART_FOLDERS.values() for folder in folders}
    while True:
        top = {_class_name(e) for e in entries if "/" in e.key and not e.key.startswith(".")}
        depth = min((e.key.count("/") for e in entries if is_image(e.key)), default=0)
        if len(top) != 1 or top & known or depth < 2:
            return root, entries
        (folder,) = top
        root, entries = storage.join(root, folder), _below(entries, folder)


def _index(root: str, entries: list[Entry]) -> Index:
    """Labels from the first folder of each key."""
    root, entries = _unwrap(root, entries)
    entries = [e for e in entries if not e.key.startswith(".")]
    images = sorted((e for e in entries if is_image(e.key)), key=lambda e: e.key)
    if not images:
        raise DataError(f"no image under {root}. Expected CLASS/*.jpg (or .png, .webp, …).")
    stray = [e.key for e in images if "/" not in e.key]
    if stray:
        raise DataError(
            f"{root} holds {len(stray)} image(s) outside any class folder, for example {stray[0]}. "
            "Expected CLASS/*.jpg: one folder a class."
        )
    classes = sorted({_class_name(e) for e in entries if "/" in e.key})
    empty = sorted(set(classes) - {_class_name(e) for e in images})
    if empty:
        raise DataError(f"no image in class folder(s) {', '.join(empty)} of {root}. Fill or remove them.")
    if len(classes) < 2:
        raise DataError(f"{root} has a single class folder ({classes[0]}): at least two classes are needed.")
    ignored = [e.key for e in entries if not e.is_dir and not is_image(e.key)]
    if ignored:
        log.warning("%s: %d file(s) are no images and are ignored, for example %s", root, len(ignored), ignored[0])
    number = {name: label for label, name in enumerate(classes)}
    return Index(root, tuple(e.key for e in images), tuple(number[_class_name(e)] for e in images), tuple(classes))


def _class_name(entry: Entry) -> str:
    return entry.key.split("/", 1)[0]


def _subset(index: Index, samples: list[int]) -> Index:
    keys, labels = tuple(index.keys[i] for i in samples), tuple(index.labels[i] for i in samples)
    return Index(index.root, keys, labels, index.classes)
