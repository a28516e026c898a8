"""``audit.jsonl``, one finding per line, and ``audit.json``, their summary."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from job.audit.settings import Kind
from job.model.spec import TaskName

FORMAT = 1
"""Version of both files."""

Text = Annotated[str, Meta(max_length=65_536)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One image that is suspected for one reason.

    Attributes:
        kind: the reason.
        uri: of the image.
        part: train, val, test, …
        labels: class names that the data gives it.
        suggested: class names that it should have, as far as the audit can tell.
        score: how certain the finding is, from 0 to 1: of a label error 1 minus the probability of the given label,
            of copies the similarity to the most similar image of the group.
        group: number that all images of a group of copies share.
        detail: what was measured.
    """

    kind: Kind
    uri: Text
    part: Text
    labels: list[Text]
    suggested: list[Text] | None = None
    score: Share
    group: Count | None = None
    detail: Text = ""


class ClassSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One class.

    Attributes:
        name: of the class.
        images: number of images by part.
        label_errors: images of this label that are suspected to belong elsewhere.
        accuracy: share of its images that out-of-fold predictions assign to it; None where they were not checked.
    """

    name: Text
    images: dict[Text, Count]
    label_errors: Count
    accuracy: Share | None


class ConfusedClasses(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Two classes that the features hardly tell apart.

    Attributes:
        classes: their names.
        error: mean share of the images of each that are taken for the other, of those taken for one of the two; 0.5 is
            chance.
        images: number of images that are taken for the other class.
    """

    classes: tuple[Text, Text]
    error: Share
    images: Count


class ManifestSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table that leaves the suspects out.

    Attributes:
        uri: of the table.
        images: number of its rows.
        left_out: number of images left out, each by its gravest kind.
    """

    uri: Text
    images: Count
    left_out: dict[Kind, Count]


class AuditResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of ``audit.json``.

    Attributes:
        task: of the labels.
        backbone: that computed the features.
        images: number of images by part.
        findings: number of findings by kind.
        suspects: number of images with at least one finding.
        groups: number of groups of copies.
        labels_checked: images whose label was compared with out-of-fold predictions.
        labels_not_checked: images whose label was not, by reason.
        imbalance: images of the largest class in proportion to those of the smallest one, of the training part.
        classes: of the data.
        confused: pairs of classes, the worst first.
        manifest: the table that leaves the suspects out.
        seconds: time of the audit.
        format: version of this file.
    """

    task: TaskName
    backbone: Text
    images: dict[Text, Count]
    findings: dict[Kind, Count]
    suspects: Count
    groups: Count
    labels_checked: Count
    labels_not_checked: dict[Text, Count]
    imbalance: Annotated[float, Meta(ge=1)] | None
    classes: list[ClassSummary]
    confused: list[ConfusedClasses]
    manifest: ManifestSummary | None
    seconds: float
    format: int = FORMAT
