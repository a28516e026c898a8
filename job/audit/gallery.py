"""``audit.html``: the suspects as pictures, in one file without scripts or external references."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment

from job.audit.findings import Suspect, Suspects
from job.audit.result import AuditResult, Finding
from job.audit.settings import KINDS, Kind
from job.audit.terminal import NAMES
from job.data.datamodule import ImageDataModule
from job.monitoring.drawing.class_labels import shortened
from job.monitoring.drawing.html import html_environment
from job.monitoring.drawing.thumbnails import Thumbnails

SIZE = 128
"""Height and width of a thumbnail, in pixels."""
TOGETHER = 32
"""Thumbnails that are fetched together."""
MOST_CLASSES = 200
"""Rows of the table of classes."""
MOST_PAIRS = 30
LONGEST = 60
"""Characters of a name in a caption."""


@dataclass(frozen=True)
class Picture:
    """One image of the gallery.

    Attributes:
        finding: what is said about it.
        jpeg: its thumbnail; None for an image that cannot be read.
    """

    finding: Finding
    jpeg: bytes | None


def choose(suspects: Suspects, limit: int) -> dict[Kind, list[Suspect]]:
    """The suspects to show: every kind has its share, and what one does not need is for the others.

    Args:
        suspects: all of them, in order.
        limit: number over all kinds.
    """
    by_kind: dict[Kind, list[Suspect]] = {kind: [] for kind in KINDS}
    for each in suspects.found:
        by_kind[each.kind].append(each)
    chosen: dict[Kind, list[Suspect]] = {}
    remaining = limit
    kinds = sorted((kind for kind in KINDS if by_kind[kind]), key=lambda kind: len(by_kind[kind]))
    for number, kind in enumerate(kinds):
        chosen[kind] = by_kind[kind][: remaining // (len(kinds) - number)]
        remaining -= len(chosen[kind])
    return {kind: chosen[kind] for kind in KINDS if chosen.get(kind)}


def pictures_of(
    suspects: Suspects, chosen: Mapping[Kind, Sequence[Suspect]], data: ImageDataModule
) -> dict[Kind, list[Picture]]:
    """The chosen suspects with their thumbnails.

    Args:
        suspects: all of them.
        chosen: those to show.
        data: reads the images.
    """
    thumbnails = {part: Thumbnails(data, part, SIZE) for part in suspects.pool.parts}
    wanted: dict[str, list[int]] = {part: [] for part in suspects.pool.parts}
    for some in chosen.values():
        for each in some:
            part, sample = suspects.pool.part_of(each.sample)
            wanted[part].append(sample)
    jpegs: dict[tuple[str, int], bytes | None] = {}
    for part, samples in wanted.items():
        for start in range(0, len(samples), TOGETHER):
            block = thumbnails[part].jpegs(samples[start : start + TOGETHER])
            jpegs |= {(part, sample): jpeg for sample, jpeg in block.items()}
    return {
        kind: [
            Picture(finding, jpegs.get(suspects.pool.part_of(each.sample)))
            for each, finding in zip(some, suspects.findings(some), strict=True)
        ]
        for kind, some in chosen.items()
    }


def render(result: AuditResult, pictures: Mapping[Kind, Sequence[Picture]], run_dir: str) -> str:
    """The page.

    Args:
        result: the summary.
        pictures: by kind.
        run_dir: where the audit lies.
    """
    classes = sorted(result.classes, key=lambda each: -each.label_errors)
    page: str = (
        _environment()
        .get_template("audit.html.jinja")
        .render(
            result=result,
            run_dir=run_dir,
            images=sum(result.images.values()),
            names=NAMES,
            sections=[(kind, [_figure(each) for each in some]) for kind, some in pictures.items()],
            classes=classes[:MOST_CLASSES],
            confused=result.confused[:MOST_PAIRS],
        )
    )
    return page


def _figure(picture: Picture) -> dict[str, Any]:
    finding = picture.finding
    return {
        "image": None if picture.jpeg is None else f"data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}",
        "file": shortened("/".join(finding.uri.split("/")[-2:]), LONGEST),
        "uri": finding.uri,
        "part": finding.part,
        "labels": _joined(finding.labels),
        "suggested": None if finding.suggested is None else _joined(finding.suggested),
        "score": finding.score,
        "group": finding.group,
        "detail": shortened(finding.detail, 120),
    }


def _joined(names: Sequence[str]) -> str:
    return ", ".join(shortened(name, LONGEST) for name in names[:5]) or "none"


@functools.cache
def _environment() -> Environment:
    return html_environment("job.audit")
