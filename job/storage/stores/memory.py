"""``memory://``: objects in the memory of this process."""

from __future__ import annotations

from job.storage.stores.base import Store


class Memory(Store):
    """fsspec's memory filesystem."""

    protocols = ("memory",)
    in_memory = True

    def conditional_write_weakness(self, path: str) -> str | None:
        """None: no other process can write here."""
        return None
