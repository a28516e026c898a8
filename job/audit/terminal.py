"""The summary of an audit on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from job.audit.confusion import IMBALANCE
from job.audit.result import AuditResult, Finding
from job.audit.settings import Kind
from job.process.terminal import print_table, say

SHOWN = 10
"""Label errors and pairs of classes on the terminal."""
NAMES: dict[Kind, str] = {
    "leakage": "copies in several parts",
    "placeholder": "one picture under many labels",
    "conflicting_labels": "copies with different labels",
    "exact_duplicate": "exact copies",
    "near_duplicate": "near copies",
    "label_error": "label errors",
    "outlier": "outliers",
    "blank": "blank images",
    "tiny": "tiny images",
    "odd_aspect": "odd shapes",
    "unreadable": "unreadable images",
}
"""Kinds of findings in words."""


def print_summary(result: AuditResult, examples: Sequence[Finding], label_errors: Sequence[Finding]) -> None:
    """Print the findings by kind, the most certain label errors and what concerns classes.

    Args:
        result: the summary.
        examples: the first finding of each kind.
        label_errors: the most certain ones.
    """
    images = sum(result.images.values())
    rows = [
        (each.kind, NAMES[each.kind], f"{result.findings[each.kind]:,}", each.uri)
        for each in examples
        if each.kind in result.findings
    ]
    title = f"{result.suspects:,} of {images:,} images are suspect"
    if rows:
        print_table(["kind", "", "images", "for example"], rows, title=title, right=["images"])
    else:
        say(f"{title}.")
    if label_errors:
        print_table(
            ["label", "rather", "score", "image"],
            [
                (", ".join(each.labels), ", ".join(each.suggested or []) or "none", f"{each.score:.3f}", each.uri)
                for each in label_errors
            ],
            title="most certain label errors",
            right=["score"],
        )
    if result.confused:
        print_table(
            ["class", "taken for", "error", "images"],
            [(*each.classes, f"{each.error:.0%}", f"{each.images:,}") for each in result.confused[:SHOWN]],
            title="classes that the features hardly tell apart (50%: chance)",
            right=["error", "images"],
        )
    if result.imbalance is not None and result.imbalance >= IMBALANCE:
        say(
            f"The largest class of the training part has {result.imbalance:,.0f} times as many images as the smallest "
            "one: see --data.sampling=balanced and --model.class_weights=balanced."
        )
    for reason, count in result.labels_not_checked.items():
        say(f"Labels of {count:,} image(s) were not checked: {reason}.")
    if result.manifest is not None:
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in result.manifest.left_out.items())
        say(
            f"{result.manifest.images:,} images in {result.manifest.uri}, for --data.root"
            + (f"; left out: {left_out}." if left_out else ".")
        )
