"""Settings of a bucket that decide what happens to objects which are overwritten or deleted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BucketSettings:
    """What a store says of one of its buckets.

    Attributes:
        name: of the bucket.
        region: where it is, in lower case, as the store names it; None: not found out.
        retention: why objects cannot be deleted or overwritten for some time, as a clause; None: they can.
        soft_delete_seconds: time for which deleted objects are kept, and paid for.
        versioning: superseded and deleted objects are kept as noncurrent versions.
        storage_class: class of new objects; None: not found out, or the store has none.
        unknown: settings that could not be read, with the reason, by name.
    """

    name: str
    region: str | None = None
    retention: str | None = None
    soft_delete_seconds: int = 0
    versioning: bool = False
    storage_class: str | None = None
    unknown: dict[str, str] = field(default_factory=dict)
