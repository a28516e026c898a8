"""Folder names that mean a part of a data set: ``train``, ``Validation``, ``seg_test``, ``val2017``, …"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PARTS = ("train", "val", "test")
_WORDS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "devel": "val",
    "development": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
    "eval": "test",
    "evaluation": "test",
}
"""As Hugging Face datasets has them, and their usual abbreviations."""
_NEUTRAL = frozenset(
    re.findall(
        r"\w+",
        "data dataset datasets set sets split splits part image images img imgs pic pics picture pictures photo photos "
        "sample samples folder dir class classes category categories by all the raw final original jpg jpeg png",
    )
)
"""Words that add nothing to the name of a part."""
_NUMBERED = frozenset(("fold", "folds", "kfold", "split", "part", "set", "subset", "batch", "cv"))
"""Words that, with a number, name a part of some other scheme."""
_GLUED = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))})({'|'.join(sorted(_NEUTRAL, key=len))})$")


@dataclass(frozen=True)
class Recognised:
    """Parts among the folders of one level.

    Attributes:
        folders: folders by the part that they mean; more than one folder is one too many.
        unclear: folders whose names sound like parts, but of which it is not clear which.
    """

    folders: dict[str, list[str]]
    unclear: list[str]


def part_of(folder: str) -> str | None:
    """The part that a folder's name means by itself; None for any other name."""
    words = _words(folder)
    parts = [_WORDS[word] for word in words if word in _WORDS]
    neutral = all(word in _WORDS or word in _NEUTRAL or word.isdecimal() for word in words)
    return parts[0] if len(parts) == 1 and neutral else None


def part_of_path(path: str) -> str | None:
    """The part of the first folder in a path that names one, or None."""
    return next((part for folder in path.split("/") if (part := part_of(folder))), None)


def recognise(folders: Iterable[str]) -> Recognised:
    """The parts among folders that lie side by side.

    A word that is not neutral (``seg_train``) is accepted if several parts share it (``seg_train``, ``seg_test``).
    """
    folders_by_part: dict[str, list[str]] = {}
    affixed: dict[tuple[str, ...], dict[str, list[str]]] = {}
    unclear = []
    for folder in sorted(folders):
        part, words = part_of(folder), _words(folder)
        if part is not None:
            folders_by_part.setdefault(part, []).append(folder)
            continue
        parts = [_WORDS[word] for word in words if word in _WORDS]
        if len(parts) == 1:
            rest = tuple(word for word in words if word not in _WORDS)
            affixed.setdefault(rest, {}).setdefault(parts[0], []).append(folder)
        elif parts or (_NUMBERED & set(words) and any(word.isdecimal() for word in words)):
            unclear.append(folder)
    schemes = [group for group in affixed.values() if len(group) > 1]
    accepted = schemes[0] if len(schemes) == 1 and not folders_by_part.keys() & schemes[0].keys() else {}
    for part, names in accepted.items():
        folders_by_part.setdefault(part, []).extend(names)
    for group in affixed.values():
        if group is not accepted:
            unclear += [name for names in group.values() for name in names]
    return Recognised({part: folders_by_part[part] for part in PARTS if part in folders_by_part}, sorted(unclear))


def _words(folder: str) -> list[str]:
    """The words of a name in lower case: parts of camelCase, numbers, and ``traindata`` as two."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[^\W\d_])|(?<=[^\W\d_])(?=\d)", " ", folder)
    words = re.findall(r"[^\W_]+", spaced.lower())
    return [part for word in words for part in _split(word)]


def _split(word: str) -> list[str]:
    glued = _GLUED.match(word) if word not in _WORDS else None
    return [glued[1], glued[2]] if glued else [word]
