"""Computation of chunks of cached features, with or without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, cast

import torch
from torch import Tensor

from job import storage
from job.data.dataset import Batch
from job.data.loader import BatchLoader
from job.data.sampler import FeatureBatchSampler
from job.errors import DivergedError
from job.features.store import FeatureStore


class PartWork(NamedTuple):
    """Chunks of one part to compute.

    Attributes:
        store: of the part.
        chunks: their numbers.
        loader: of all variants of their samples, by a :class:`~job.data.sampler.FeatureBatchSampler`.
    """

    store: FeatureStore
    chunks: list[int]
    loader: BatchLoader


def compute_chunks(
    parts: Iterable[PartWork],
    features: Callable[[Tensor], Tensor],
    *,
    accept: Callable[[Batch], Batch],
    before_write: Callable[[], None] = storage.unconditionally,
) -> Generator[int, None, None]:
    """Compute chunks, save them on this node, and upload them; however it ends, uploads do, too.

    An upload that fails ends the computation at the next chunk.

    Args:
        parts: the chunks; each part's loader is made when its turn comes.
        features: from images, uint8 [B, 3, S, S], to features, float [B, F].
        accept: raises the error of a batch, or returns it.
        before_write: called immediately before each upload; raises if this job may not write there.

    Yields:
        the number of variants computed, after each batch.

    Raises:
        DivergedError: features are not finite.
        StorageError: a chunk cannot be written.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="features") as uploads:
        pending: list[Future[None]] = []
        for store, chunks, loader in parts:
            sampler = cast("FeatureBatchSampler", loader.images.sampler)
            iterator = iter(loader)
            for chunk in chunks:
                computed: list[Tensor] = []
                valid: list[Tensor] = []
                bad: dict[int, str] = {}
                for _ in range(sampler.batches_in(store.samples(chunk))):
                    batch = accept(next(iterator))
                    rows = batch["global_size"]
                    mask = batch["mask"][:rows]
                    values = features(batch["image"]).cpu()[:rows]  # XLA would compile each number of rows
                    _require_finite(values, batch, store)
                    computed.append(values)
                    valid.append(mask)
                    bad |= {sample: line for _, sample, line in batch["bad"]}
                    yield rows
                while pending and pending[0].done():
                    pending.pop(0).result()
                store.save(chunk, torch.cat(computed), torch.cat(valid), bad)
                pending.append(uploads.submit(store.publish, chunk, before_write))
        for upload in pending:
            upload.result()


def _require_finite(values: Tensor, batch: Batch, store: FeatureStore) -> None:
    wrong = (~values.isfinite().all(dim=1) & batch["mask"][: len(values)]).nonzero().flatten().tolist()
    if wrong:
        uri = store.index.uri(int(batch["sample"][wrong[0]]))
        raise DivergedError(
            f"the backbone's features of {uri} are not finite: its weights have diverged, or they need another "
            "precision. Use other weights, or compute in 32 bits."
        )
