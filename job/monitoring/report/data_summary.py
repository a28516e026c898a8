"""Summary of the data of a run."""

from __future__ import annotations

from job import redact
from job.data.datamodule import ImageDataModule
from job.data.index.index import Index
from job.monitoring.report.content import MOST_CLASSES, DataSummary, LeftOutFiles, PartSummary

MOST_KINDS = 100
TEXT_CHARACTERS = 1000


def summarise(data: ImageDataModule) -> DataSummary:
    """Sizes, classes and files left out, from the index."""
    return DataSummary(
        parts={name: _part(index) for name, index in data.parts.items()},
        left_out=[
            LeftOutFiles(each.kind, each.count, redact.identity(each.example)[:TEXT_CHARACTERS])
            for each in data.left_out[:MOST_KINDS]
        ],
        absent={part: redact.redact(reason)[:TEXT_CHARACTERS] for part, reason in data.absent_parts.items()},
        image_size=data.image_size,
        resize=data.resize,
    )


def _part(index: Index) -> PartSummary:
    counts = index.class_counts()
    return PartSummary(
        images=len(index),
        root=redact.identity(index.root)[:TEXT_CHARACTERS],
        mean_bytes=index.info.mean_bytes,
        images_per_class=counts.tolist() if len(counts) <= MOST_CLASSES else [],
        smallest_class=int(counts.min()) if len(counts) else 0,
        largest_class=int(counts.max()) if len(counts) else 0,
        fingerprint=index.fingerprint(),
    )
