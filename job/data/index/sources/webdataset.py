"""The WebDataset convention: members of a tar that share a name up to its first dot are one sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from job import typed
from job.data.index.left_out import LeftOut
from job.data.index.sources.archive import Member
from job.data.index.sources.base import LONGEST_CLASS, MOST_LABELS, is_image
from job.errors import DataError

LABEL_SUFFIXES = (".cls", ".json")
"""Members that label the image of the same name; the first that has a label counts."""
LABEL_KEYS = ("label", "class", "cls", "labels")

Labels = tuple[str, ...] | str | None
"""Any number of labels of one sample, one, or null for a file that labels nothing."""


@dataclass
class Group:
    """Neighbours in a tar with the same key.

    Attributes:
        key: see :func:`key_of`.
        members: all files but labels.
        labels: by the name of the .cls or .json file; an error if it is none, which matters if an image needs it.
    """

    key: str = ""
    members: list[Member] = field(default_factory=list)
    labels: dict[str, Labels | DataError] = field(default_factory=dict)


def key_of(name: str) -> str:
    """The name up to the first dot of its last part: folders may have dots in their names."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def is_label(name: str) -> bool:
    """Whether a member may label the images beside it; hidden files (``._a.cls``) do not."""
    return name.lower().endswith(LABEL_SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def labelled(uri: str, group: Group, left_out: LeftOut) -> Iterator[Member]:
    """The members of a group, its images with their labels.

    A label belongs to the image whose name differs by the suffix alone, since names of samples may have dots
    themselves (``scan.000.jpg``, ``scan.000.cls``). Where no name does, the only label belongs to the only image.
    Other images beside a labelled one (``a.seg.png`` beside ``a.jpg``) are left out.

    Raises:
        DataError: a label is malformed, or fits several images.
    """
    labels = _by_stem(group.labels)
    images = [member for member in group.members if is_image(member.key)]
    if labels and not images and (lost := [n for n, label in labels.values() if not isinstance(label, DataError)]):
        left_out.add("labels with no image of their name beside them", lost[0], len(lost))
    if not labels or not images:
        yield from group.members
        return
    stems = {_stem(image.key) for image in images}
    labels_by_key = {image.key: labels[_stem(image.key)] for image in images if _stem(image.key) in labels}
    companions = {
        image.key for image in images if image.key not in labels_by_key and _is_companion(_stem(image.key), stems)
    }
    others = [image.key for image in images if image.key not in labels_by_key and image.key not in companions]
    unused = [stem for stem in labels if stem not in stems]
    if others and unused:
        if len(others) > 1 or len(unused) > 1 or labels_by_key:
            raise DataError(
                f"{uri}: {', '.join(others[:3])} and {', '.join(labels[stem][0] for stem in unused[:3])} share the key "
                f"{group.key}. Which label is meant? Name each label as its image, with the suffix .cls or .json."
            )
        labels_by_key[others[0]] = labels[unused[0]]
    for member in group.members:
        if member.key in companions:
            left_out.add("other images of WebDataset samples", member.key)
        elif member.key in labels_by_key:
            name, label = labels_by_key[member.key]
            if isinstance(label, DataError):
                raise DataError(f"{uri}: member {name} {label}. Pack it again.")
            yield member._replace(labels=label) if isinstance(label, tuple) else member._replace(label=label)
        else:
            yield member


def parse_label(content: bytes, *, is_json: bool) -> Labels:
    """The labels in a .cls or .json file; None where it has none.

    Raises:
        DataError: it is not UTF-8 or no JSON.
    """
    try:
        if not is_json:
            return _checked(content.decode().strip())
        value = typed.from_json(content)
        if isinstance(value, dict):
            value = next((value[key] for key in LABEL_KEYS if key in value), None)
        if isinstance(value, list):
            if len(value) > MOST_LABELS:
                raise DataError(f"has {len(value):,} labels, more than {MOST_LABELS:,}")
            several = [_checked(scalar_text(each)) for each in value]
            if None in several:
                raise DataError("holds an empty label")
            return tuple(label for label in several if label is not None)
        return _checked(scalar_text(value))
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"is no JSON: {error}") from error
    except UnicodeError as error:
        raise DataError("is not UTF-8") from error


def scalar_text(value: object) -> str:
    """A label of JSON as text: true for True, as JSON spells it; empty for objects and null."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None or isinstance(value, (dict, list)) else str(value)


def _checked(text: str) -> str | None:
    text.encode()
    if len(text) > LONGEST_CLASS:
        raise DataError(f"names a class of {len(text):,} characters, more than {LONGEST_CLASS:,}")
    return text or None


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _by_stem(labels: dict[str, Labels | DataError]) -> dict[str, tuple[str, Labels | DataError]]:
    """(name of the file, its labels) by the file's name without suffix."""
    files_by_stem: dict[str, tuple[str, Labels | DataError]] = {}
    for suffix in reversed(LABEL_SUFFIXES):
        for name, label in labels.items():
            if name.lower().endswith(suffix) and label is not None:
                files_by_stem[_stem(name)] = name, label
    return files_by_stem


def _is_companion(stem: str, stems: set[str]) -> bool:
    """Whether a shorter name, cut at a dot, is that of another image."""
    start = stem.rfind("/") + 1
    cuts = (place for place in range(start + 1, len(stem)) if stem[place] == ".")
    return any(stem[:place] in stems for place in cuts)
