"""Findings of all checks, and which images a manifest leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from job.audit.copies import Copies
from job.audit.image_faults import ImageFaults
from job.audit.label_errors import LabelErrors
from job.audit.pixels import Records
from job.audit.pool import ROWS, ImagePool
from job.audit.result import Finding
from job.audit.search import Samples
from job.audit.settings import KINDS, Kind

PLACEHOLDER = 3
"""Images of one picture under several labels, none of which most have, from which on it is a placeholder."""
MAJORITY = 2 / 3
"""Share of a group's images whose label is that of the picture."""
MANY_COPIES = 20
"""Images of one picture from which on it is a placeholder whatever their labels."""
KEPT_PARTS = ("test", "val")
"""Parts whose image stays, of a group over several parts: those that results are measured on."""


@dataclass(frozen=True)
class Suspect:
    """A finding before its names are looked up.

    Attributes:
        kind: the reason.
        sample: sample id.
        score: from 0 to 1.
        suggested: class numbers that it should have; None: no suggestion.
        group: number of the group of copies, from 1.
        detail: what was measured.
    """

    kind: Kind
    sample: int
    score: float
    suggested: tuple[int, ...] | None = None
    group: int | None = None
    detail: str = ""


@dataclass
class Suspects:
    """All findings.

    Attributes:
        pool: the images.
        found: the findings.
        kept: samples that represent their group of copies, which a manifest keeps.
        groups: number of groups of copies.
    """

    pool: ImagePool
    found: list[Suspect] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    groups: int = 0

    def add_copies(self, copies: Copies) -> None:
        """Add the groups of copies: leakage first."""
        numbers = self.pool.part_numbers()
        preference = np.array([_preference(part) for part in self.pool.parts])
        groups = copies.groups()
        members = np.concatenate([np.empty(0, np.int64), *groups])
        keys = dict(zip(members.tolist(), self.pool.label_keys(members), strict=True))
        # Groups over several parts come first, then large ones.
        order = sorted(groups, key=lambda group: (len(np.unique(numbers[group])) == 1, -len(group), int(group[0])))
        for number, group in enumerate(order, start=1):
            parts = np.unique(numbers[group])
            labels = [keys[sample] for sample in group.tolist()]
            kinds, majority = _kinds_of(labels, spans_parts=len(parts) > 1, exact=bool(copies.exact[group].all()))
            if not {"placeholder", "conflicting_labels"} & set(kinds):
                self.kept.add(int(group[np.lexsort((group, preference[numbers[group]]))[0]]))
            names = ", ".join(self.pool.parts[part] for part in parts.tolist())
            for sample, label in zip(group.tolist(), labels, strict=True):
                how = "same content" if copies.exact[sample] else "near copy"
                for kind in kinds:
                    detail = f"{how}, {len(group)} images" + (f" in {names}" if kind == "leakage" else "")
                    suggested = None
                    if kind == "conflicting_labels" and majority is not None and label != majority:
                        suggested = tuple(self.pool.classes.index(name) for name in majority)
                    score = float(np.clip(copies.similarity[sample], 0, 1))
                    self.found.append(Suspect(kind, sample, score, suggested, number, detail))
        self.groups = len(groups)

    def add_label_errors(self, errors: LabelErrors) -> None:
        """Add images of one label each."""
        for sample, suggested, confidence, margin in zip(
            errors.samples.tolist(),
            errors.suggested.tolist(),
            errors.self_confidence.tolist(),
            errors.normalized_margin.tolist(),
            strict=True,
        ):
            detail = f"probability {confidence:.3f}, margin {margin:.3f}"
            self.found.append(Suspect("label_error", sample, 1 - confidence, (suggested,), detail=detail))

    def add_wrong_classes(self, wrong: LabelErrors) -> None:
        """Add images of any number of labels, each of which comes once per wrong class."""
        order = np.argsort(wrong.samples, kind="stable")
        samples, starts = np.unique(wrong.samples[order], return_index=True)
        for sample, rows in zip(samples.tolist(), np.split(order, starts[1:]), strict=False):
            given = np.flatnonzero(self.pool.multi_hot_of(np.array([sample]))[0]).tolist()
            changed = wrong.suggested[rows].tolist()
            suggested = tuple(sorted(set(given) ^ set(changed)))
            score = 1 - float(wrong.self_confidence[rows].min())
            detail = f"{len(changed)} class(es) too many or missing"
            self.found.append(Suspect("label_error", sample, score, suggested, detail=detail))

    def add_outliers(self, samples: Samples, similarity: npt.NDArray[np.float32]) -> None:
        """Add images that resemble no others; of a placeholder that has been said already."""
        placeholders = {each.sample for each in self.found if each.kind == "placeholder"}
        for sample, value in zip(samples.tolist(), similarity.tolist(), strict=True):
            if sample in placeholders:
                continue
            score = float(np.clip(1 - value, 0, 1))
            self.found.append(Suspect("outlier", sample, score, detail=f"mean similarity {value:.3f}"))

    def add_faults(self, records: Records, faults: ImageFaults) -> None:
        """Add blank, tiny and odd images."""
        for sample in np.flatnonzero(faults.blank).tolist():
            deviation = float(records["deviation"][sample])
            score = float(np.clip(1 - deviation / 255, 0, 1))
            self.found.append(Suspect("blank", sample, score, detail=f"standard deviation {deviation:.1f} of 255"))
        for sample in np.flatnonzero(faults.tiny).tolist():
            width, height = int(records["width"][sample]), int(records["height"][sample])
            score = float(np.clip(1 - min(width, height) / 256, 0, 1))
            self.found.append(Suspect("tiny", sample, score, detail=f"{width} x {height} pixels"))
        for sample in np.flatnonzero(faults.odd).tolist():
            ratio = float(faults.ratio[sample])
            self.found.append(Suspect("odd_aspect", sample, 1 - 1 / ratio, detail=f"sides as {ratio:.1f} to 1"))

    def add_unreadable(self, errors: Mapping[int, str]) -> None:
        """Add images that cannot be read, and why."""
        for sample, reason in sorted(errors.items()):
            self.found.append(Suspect("unreadable", sample, 1.0, detail=reason[:1000]))

    def finish(self) -> None:
        """Order the findings: by kind, by group, the most certain first."""
        places = {kind: place for place, kind in enumerate(KINDS)}
        self.found.sort(key=lambda each: (places[each.kind], each.group or 0, -each.score, each.sample))

    def counts(self) -> dict[Kind, int]:
        """Number of findings by kind."""
        counted = Counter(each.kind for each in self.found)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    def left_out(self, kinds: frozenset[Kind]) -> dict[int, Kind]:
        """Samples that a manifest leaves out, each with its gravest kind.

        Args:
            kinds: kinds of findings to leave out.
        """
        samples: dict[int, Kind] = {}
        of_copies = {"leakage", "exact_duplicate", "near_duplicate"}
        for each in self.found:
            if each.kind in kinds and not (each.kind in of_copies and each.sample in self.kept):
                samples.setdefault(each.sample, each.kind)
        return samples

    def findings(self, suspects: Sequence[Suspect] | None = None) -> Iterator[Finding]:
        """Findings with their names, of all suspects or of some."""
        chosen = self.found if suspects is None else suspects
        for start in range(0, len(chosen), ROWS):
            block = chosen[start : start + ROWS]
            samples = np.array([each.sample for each in block], np.int64)
            named = zip(block, self.pool.uris(samples), self.pool.label_names(samples), strict=True)
            for each, uri, labels in named:
                suggested = each.suggested
                yield Finding(
                    kind=each.kind,
                    uri=uri,
                    part=self.pool.part_of(each.sample)[0],
                    labels=labels,
                    suggested=None if suggested is None else [self.pool.classes[number] for number in suggested],
                    score=round(each.score, 6),
                    group=each.group,
                    detail=each.detail,
                )


def _preference(part: str) -> int:
    """Order in which parts keep the image of a group over several parts; training comes last."""
    return KEPT_PARTS.index(part) if part in KEPT_PARTS else len(KEPT_PARTS) + (part == "train")


def _kinds_of(
    labels: Sequence[tuple[str, ...]], *, spans_parts: bool, exact: bool
) -> tuple[list[Kind], tuple[str, ...] | None]:
    """Kinds of findings of a group of copies, and the label that most of its images have."""
    counts = Counter(label for label in labels if label).most_common()
    kinds: list[Kind] = ["leakage"] if spans_parts else []
    majority = counts[0][0] if counts and counts[0][1] > MAJORITY * sum(count for _, count in counts) else None
    if len(labels) >= MANY_COPIES or (len(labels) >= PLACEHOLDER and len(counts) > 1 and majority is None):
        kinds.append("placeholder")
    elif len(counts) > 1:
        kinds.append("conflicting_labels")
    elif not spans_parts:
        kinds.append("exact_duplicate" if exact else "near_duplicate")
    return kinds, majority
