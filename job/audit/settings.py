"""Settings of an audit, and the kinds of its findings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, get_args

from job.errors import ConfigError

Kind = Literal[
    "leakage",
    "placeholder",
    "conflicting_labels",
    "exact_duplicate",
    "near_duplicate",
    "label_error",
    "outlier",
    "blank",
    "tiny",
    "odd_aspect",
    "unreadable",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of findings, the gravest first."""
DEFAULT_LEFT_OUT = "leakage,placeholder,conflicting_labels,exact_duplicate,near_duplicate,label_error,blank,unreadable"
"""Kinds that a manifest leaves out by default: outliers, tiny and odd images are often rare, and right."""
MANIFEST_SUFFIXES = (".csv", ".jsonl", ".parquet")
MOST_FOLDS = 100
MOST_THUMBNAILS = 2000


@dataclass(frozen=True)
class AuditSettings:
    """What an audit looks for, and what it writes besides its report.

    Args:
        write_manifest: URI of a table (.csv, .jsonl or .parquet) of the images without those of ``leave_out``, for
            --data.root of a fit.
        leave_out: kinds of findings that the manifest leaves out, separated by commas; all; or none. Default: all but
            outlier, tiny and odd_aspect. One image of each group of copies stays.
        labels: auto takes the labels that the data has, as fit does; none audits images of any layout without labels.
        folds: folds of the cross-validation that finds label errors. 0 leaves this check out.
        similarity: least cosine of the centred features of near duplicates, from 0 to 1. 1 compares pixels only.
        thumbnails: number of images in audit.html, over all kinds of findings.
    """

    write_manifest: str | None = None
    leave_out: list[str] | str = DEFAULT_LEFT_OUT
    labels: Literal["auto", "none"] = "auto"
    folds: int = 5
    similarity: float = 0.85
    thumbnails: int = 240

    def __post_init__(self) -> None:
        if self.folds != 0 and not 2 <= self.folds <= MOST_FOLDS:
            raise ConfigError(
                f"--audit.folds must be between 2 and {MOST_FOLDS}, or 0 for no check of labels, not {self.folds}."
            )
        if not 0 < self.similarity <= 1:
            raise ConfigError(f"--audit.similarity must be above 0 and at most 1, not {self.similarity}.")
        if not 0 <= self.thumbnails <= MOST_THUMBNAILS:
            raise ConfigError(f"--audit.thumbnails must be between 0 and {MOST_THUMBNAILS:,}, not {self.thumbnails}.")
        if self.write_manifest is not None and self.labels == "none":
            raise ConfigError("--audit.write_manifest is a table for a fit, which needs labels. Leave out one of them.")
        if self.write_manifest is not None:
            suffix = PurePosixPath(self.write_manifest).suffix.lower()
            if suffix not in MANIFEST_SUFFIXES:
                raise ConfigError(
                    f"--audit.write_manifest {self.write_manifest} must end with {', '.join(MANIFEST_SUFFIXES)}."
                )
        self.left_out_kinds()

    def left_out_kinds(self) -> frozenset[Kind]:
        """Kinds that the manifest leaves out.

        Raises:
            ConfigError: there is no such kind.
        """
        entries = self.leave_out.split(",") if isinstance(self.leave_out, str) else self.leave_out
        names = [name.strip() for name in entries if name.strip()]
        if names == ["all"]:
            return frozenset(KINDS)
        if names == ["none"]:
            return frozenset()
        for name in names:
            if name not in KINDS:
                raise ConfigError(f"--audit.leave_out {name!r} is no kind of finding. Use {', '.join(KINDS)}, or all.")
        return frozenset(kind for kind in KINDS if kind in names)
