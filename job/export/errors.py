"""The error of an export."""

from __future__ import annotations

from job.errors import JobError


class ExportError(JobError):
    """A model that cannot be exported: its architecture, its size, or outputs that differ from the checkpoint's."""
