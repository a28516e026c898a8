"""Agreement of the parts of a data set on their classes, which are those of the training part."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from job.data.index.layout import Part, class_order
from job.errors import DataError
from job.process.terminal import escape

log = logging.getLogger(__name__)

SHOWN = 10
"""Classes that a message names."""


def settle(parts: dict[str, list[Part]], *, test_given: bool) -> dict[str, str]:
    """Compare the classes of all parts with those of train, and remove a test part that cannot be used.

    A part that lacks a class is named in a warning: metrics of that class are not defined there.

    Args:
        parts: the contents of each part; changed in place.
        test_given: the test part was asked for by name: it must be usable.

    Returns:
        why a part was taken out, by part.

    Raises:
        DataError: a part has classes that train lacks, or there are fewer than two classes (one, where a sample may
            have several or none).
    """
    if "train" not in parts:
        return {}
    train = _images(parts["train"])
    if not train:
        raise DataError(f"no image of {parts['train'][0].root} has a label.")
    if len(train) < (1 if any(part.several_labels for part in parts["train"]) else 2):
        name = escape(next(iter(train)))
        raise DataError(f"{parts['train'][0].root} has a single class ({name}): at least two classes are needed.")
    if alike := _alike(train):
        log.warning("%s: the classes %s differ by upper and lower case only", parts["train"][0].root, ", ".join(alike))
    absent = {}
    for name in [each for each in parts if each != "train"]:
        subparts = parts[name]
        problem = next((part.problem for part in subparts if part.problem), None)
        images = _images(subparts)
        if problem is None and (unknown := class_order(images.keys() - train.keys())):
            count = sum(images[each] for each in unknown)
            problem = (
                f"{count:,} image(s) of {subparts[0].root} are of {_listed(unknown)}, of which "
                f"{parts['train'][0].root} has none"
            )
            if lacking := class_order(train.keys() - images.keys()):
                problem += f"; it has {_listed(lacking)} instead"
        if problem and (name != "test" or test_given):
            raise DataError(f"the {name} part cannot be used: {problem.rstrip('.')}. Make its classes those of train.")
        if problem:
            log.warning("the data has no test part: %s", problem)
            absent[name] = problem
            del parts[name]
        elif lacking := class_order(train.keys() - images.keys()):
            log.warning("the %s part has no image of %s, which its metrics leave out", name, _listed(lacking))
    return absent


def _alike(names: Iterable[str]) -> list[str]:
    """The first classes whose names differ by case only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    return next((sorted(group) for group in groups.values() if len(group) > 1), [])


def _images(subparts: list[Part]) -> Counter[str]:
    images: Counter[str] = Counter()
    for part in subparts:
        images.update(part.images)
    return images


def _listed(classes: list[str]) -> str:
    more = f" and {len(classes) - SHOWN:,} more" if len(classes) > SHOWN else ""
    word = "class" if len(classes) == 1 else "the classes"
    return f"{word} {', '.join(map(escape, classes[:SHOWN]))}{more}"
