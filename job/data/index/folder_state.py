"""Count and digest of the images in a folder, by which a saved index is compared with the folder later."""

from __future__ import annotations

import zlib
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

_ODD = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


class FolderState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The images below one folder.

    Attributes:
        source: its number in the index.
        images: how many there are.
        digest: sum of 64-bit hashes of their keys and versions, whatever the order.
    """

    source: Annotated[int, msgspec.Meta(ge=0)]
    images: Annotated[int, msgspec.Meta(ge=0)] = 0
    digest: Annotated[int, msgspec.Meta(ge=0)] = 0

    def including(self, keys: pa.Array, sizes: pa.Array, versions: pa.Array) -> FolderState:
        """The state with some more images.

        Args:
            keys: string [N].
            sizes: int64 [N]; used where there is no version.
            versions: uint64 [N].
        """
        checksums = np.fromiter(map(zlib.crc32, keys.cast(pa.binary()).to_pylist()), np.uint64, len(keys))
        version, size = versions.to_numpy(), sizes.to_numpy().view(np.uint64)
        hashes = _mixed(checksums * _ODD ^ np.where(version == 0, size, version))
        total = int(hashes.sum(dtype=np.uint64)) if len(hashes) else 0
        return FolderState(self.source, self.images + len(keys), (self.digest + total) & _MASK)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: each bit of a value changes half of the bits of its hash."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
