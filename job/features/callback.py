"""Cached backbone features: while the backbone is frozen, they are computed once, and the head trains from them.

The result is the same as without the cache, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from job import storage
from job.cluster import ranks
from job.cluster.xla import SPMDStrategy
from job.data.datamodule import image_data
from job.data.sampler import FeatureBatchSampler, ResumableBatchSampler
from job.errors import ConfigError, Preempted, StorageError
from job.features.compute import PartWork, compute_chunks
from job.features.disk_space import make_room
from job.features.key import content_hash, feature_key, weights_hash
from job.features.store import FOLDER, FeatureStore
from job.model.module import TransferLearningModel
from job.process.progress import Progress
from job.resilience.flags import AsyncFlags
from job.resilience.lease import Lease
from job.resilience.preemption import Preemption
from job.resilience.watchdog import Watchdog

log = logging.getLogger(__name__)

WORTH_A_HINT = 3
"""Frozen epochs from which on the log says why nothing is cached."""


@dataclass(frozen=True)
class FeatureSettings:
    """Computes the features of a frozen backbone once, and has the head trained and validated from them.

    Every rank computes its share of the chunks, and uploads them; each node fetches what others computed. A
    start finds what an earlier one, or another run with the same ``uri``, backbone, data, transform and precision
    has left. From the first milestone on, images are read again.

    Args:
        use: "auto" caches if that is less work than computing the features in each epoch; "always"; "never".
        max_gb: size of the features in --data.cache_dir, in 10^9 bytes. Features of other data or another backbone
            are deleted to make room; if a run needs more than this, nothing is cached.
        uri: folder of the features, which several runs may share. Default: features/ in run_dir.
    """

    use: Literal["auto", "always", "never"] = "auto"
    max_gb: float = 10.0
    uri: str | None = None

    def __post_init__(self) -> None:
        if self.max_gb <= 0:
            raise ConfigError(f"--features.max_gb must be above 0, not {self.max_gb}. Or set --features.use=never.")


class FeatureCache(Callback):
    """Computes the features of a frozen backbone once, and has the head trained and validated from them.

    Args:
        settings: whether, and where they are kept.
        preemption: says whether this process is to stop.
        watchdog: learns of each batch.
        lease: of this run.

    Attributes:
        seconds: time that it took to compute or fetch them.
    """

    def __init__(self, settings: FeatureSettings, preemption: Preemption, watchdog: Watchdog, lease: Lease) -> None:
        self.settings = settings
        self.max_bytes = int(settings.max_gb * 1e9)
        self.preemption = preemption
        self.watchdog = watchdog
        self.lease = lease
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute or find the features, on all ranks together, where the run is in its frozen epochs."""
        began = time.monotonic()
        module = cast("TransferLearningModel", pl_module)
        frozen = _frozen_epochs(trainer, module)
        if self.settings.use == "never":
            return
        if frozen < 1:
            if module.config.lora_rank and trainer.is_global_zero:
                log.info(
                    "backbone features are not cached: the adapters (--model.lora_rank) change them in each step. With "
                    "--model.milestones [N,N] the head trains alone for the first N epochs, from cached features."
                )
            return
        if isinstance(trainer.strategy, SPMDStrategy) and ranks.world_size() > 1:
            # Hosts compute batches of XLA's whole mesh together, and would have different numbers of chunks.
            log.info("backbone features are not cached: on XLA they are with one host only")
            return
        stores = self._stores(trainer, module, frozen)
        if isinstance(trainer.strategy, SPMDStrategy):
            # So that the graphs that follow are the same whether features are computed or found.
            trainer.strategy.run_pending()
        if stores:
            missing = self._missing(stores)
            while missing:
                self._compute(trainer, module, stores, missing)
                before, missing = missing, self._missing(stores)  # less, where a copy in the bucket was damaged
                if missing == before:
                    raise StorageError(f"{stores[next(iter(missing))].uri} lacks features that were just written.")
            data = image_data(trainer)
            for store in stores.values():
                data.report_bad(store.open())
            data.features = stores
        self.seconds = time.monotonic() - began

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read images again from the epoch on that unfreezes."""
        if trainer.current_epoch >= cast("TransferLearningModel", pl_module).constant_epochs:
            image_data(trainer).features = {}

    def _stores(self, trainer: pl.Trainer, module: TransferLearningModel, frozen: int) -> dict[str, FeatureStore]:
        """The parts whose features are worth keeping; the same on all ranks."""
        data, stores = image_data(trainer), {}
        if ranks.union(set() if data.is_cache_usable else {str(data.cache_dir)}):
            log.warning("backbone features are not cached: at least one node cannot write to --data.cache_dir")
            return {}
        bytes_each = 0
        weights = ranks.from_rank_zero(lambda: weights_hash(module.net.backbone))
        for part, batches in (("train", trainer.num_training_batches), ("val", _validation_batches(trainer))):
            if data.preprocessing(part).variants is None:
                if frozen >= WORTH_A_HINT and trainer.is_global_zero:
                    log.info(
                        "backbone features are not cached: --data.augment draws a new variant in each epoch. "
                        "To make frozen epochs faster, limit the variants by --data.augment_views=%d.",
                        max(frozen // 2, 1),
                    )
                continue
            if not bytes_each:
                image = torch.zeros(1, 3, data.image_size, data.image_size, dtype=torch.uint8, device=module.device)
                example = _features(trainer, module, image)
                bytes_each = example.nbytes
            key = self._key(trainer, module, part, weights)
            folder = data.cache_dir / FOLDER / key
            dataset = data.dataset(part, ResumableBatchSampler(1, 1, rank=0, world_size=1, seed=0, shuffle=False))
            root = self.settings.uri or storage.join(trainer.default_root_dir, FOLDER)
            store = FeatureStore(dataset, folder, storage.join(root, key), example.shape[1], example.dtype)
            finished = ranks.from_rank_zero(lambda store=store: len(store.published() | store.on_disk()))  # type: ignore[misc]
            work = len(store.index) * store.variants * (1 - finished / max(len(store), 1))
            if (
                self.settings.use == "auto"
                and work >= frozen * batches * data.global_batch_size
                and finished < len(store)
            ):
                continue
            stores[part] = store
        if not stores:
            return {}
        needed = bytes_each * sum(len(store.index) * store.variants for store in stores.values())
        if problem := self._no_room(data.cache_dir, {store.folder for store in stores.values()}, needed):
            log.warning("backbone features are not cached: %s", problem)
            return {}
        return stores

    def _key(self, trainer: pl.Trainer, module: TransferLearningModel, part: str, weights: str) -> str:
        """Hash of everything that the features depend on."""
        data = image_data(trainer)
        return ranks.from_rank_zero(
            lambda: feature_key(
                module.net,
                weights,
                content_hash(data.parts[part]),
                data.preprocessing(part),
                seed=data.seed,
                precision=str(trainer.precision),
                compiled=module.config.compile_backbone,
                device=trainer.strategy.device_kind if isinstance(trainer.strategy, SPMDStrategy) else None,
            )
        )

    def _no_room(self, cache_dir: Path, folders: set[Path], needed: int) -> str:
        """Delete older features to make room; returns the reason if that is not enough, the same on all ranks."""
        problem = None
        if ranks.local_rank() == 0:
            problem = make_room(cache_dir, folders, needed, self.max_bytes, "--features.max_gb")
        return " ".join(sorted(ranks.union({problem} if problem else set())))

    def _missing(self, stores: dict[str, FeatureStore]) -> dict[str, list[int]]:
        """Chunks to compute, by part; chunks only in the bucket or only on a disk are copied to the other.

        Raises:
            Preempted: on all ranks, where one of them is to stop.
        """
        missing = {}
        for part, store in stores.items():
            published = ranks.from_rank_zero(store.published)
            here = store.on_disk() if ranks.local_rank() == 0 else set()
            for chunk in self._until_stopped(here - published):
                store.publish(chunk, self.lease.require_held)
            missing_here = published - here if ranks.local_rank() == 0 else set()
            damaged = {
                chunk for chunk in self._until_stopped(missing_here) if not store.fetch(chunk, self.lease.require_held)
            }
            if ranks.union({"stop"} if self.preemption.requested else set()):
                raise _stopped()
            stored = published | {int(chunk) for chunk in ranks.union({str(chunk) for chunk in here})}
            damaged_anywhere = stored & {int(chunk) for chunk in ranks.union({str(chunk) for chunk in damaged})}
            if absent := sorted(set(range(len(store))) - stored | damaged_anywhere):
                missing[part] = absent
        return missing

    def _until_stopped(self, chunks: set[int]) -> Iterator[int]:
        """Chunks in order, until this process is to stop."""
        return itertools.takewhile(lambda _: not self.preemption.requested, sorted(chunks))

    def _compute(
        self,
        trainer: pl.Trainer,
        module: TransferLearningModel,
        stores: dict[str, FeatureStore],
        missing: dict[str, list[int]],
    ) -> None:
        """Compute the missing chunks, each rank its share, in step with one another so that all stop together."""
        world_size = ranks.world_size()
        batch_size = image_data(trainer).global_batch_size // world_size
        shares = [{part: chunks[rank::world_size] for part, chunks in missing.items()} for rank in range(world_size)]

        def batches(share: dict[str, list[int]]) -> int:
            total = 0
            for part, chunks in share.items():
                samples = [stores[part].samples(chunk) for chunk in chunks]
                total += len(FeatureBatchSampler(samples, stores[part].variants, batch_size))
            return total

        rounds = max(map(batches, shares))
        log.info(
            "computing the features of the frozen backbone once: %s",
            ", ".join(f"{part} {len(c)} of {len(stores[part])} chunks" for part, c in missing.items()),
        )
        images = sum(
            len(stores[part].samples(chunk)) * stores[part].variants
            for part, chunks in missing.items()
            for chunk in chunks
        )
        flags = AsyncFlags(1)
        work = self._batches(trainer, module, stores, shares[ranks.rank()])
        progress = Progress("features", "images", images, is_shown=trainer.is_global_zero)
        with contextlib.closing(work), progress:
            for number in range(rounds):
                next(work, None)
                self.watchdog.beat("computing features", trainer.global_step)
                self.lease.raise_if_lost()
                if any(flags.exchange([self.preemption.requested])):
                    flags.drain()
                    raise _stopped()
                progress.update(images * (number + 1) // rounds)
            next(work, None)  # the last chunk is saved when its last batch is over
            flags.drain()
        ranks.union(set())  # a barrier: no rank looks for chunks before all are written

    def _batches(
        self,
        trainer: pl.Trainer,
        module: TransferLearningModel,
        stores: dict[str, FeatureStore],
        share: dict[str, list[int]],
    ) -> Generator[int, None, None]:
        """Compute and upload this rank's chunks, and yield after each batch."""
        data = image_data(trainer)
        batch_size = data.global_batch_size // ranks.world_size()
        return compute_chunks(
            (
                PartWork(
                    stores[part],
                    chunks,
                    data.variant_loader(part, [stores[part].samples(chunk) for chunk in chunks], batch_size),
                )
                for part, chunks in share.items()
            ),
            lambda images: _features_of_batch(trainer, module, images),
            accept=lambda batch: data.on_before_batch_transfer(batch, 0),
            before_write=self.lease.require_held,
        )


def _features(trainer: pl.Trainer, module: TransferLearningModel, images: Tensor) -> Tensor:
    """Features as in a training step, at its precision: float [B, F]."""
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        return module.net.features(images)


def _stopped() -> Preempted:
    return Preempted(
        "stopped on request while the backbone's features were computed. The same command goes on from there."
    )


def _features_of_batch(trainer: pl.Trainer, module: TransferLearningModel, images: Tensor) -> Tensor:
    """Features of a batch in host memory."""
    if isinstance(trainer.strategy, SPMDStrategy):
        return trainer.strategy.forward_on_all_chips(lambda images: _features(trainer, module, images), images)
    return _features(trainer, module, images.to(module.device, non_blocking=True))


def _frozen_epochs(trainer: pl.Trainer, module: TransferLearningModel) -> int:
    """Epochs left, the current one included, in which the backbone is frozen."""
    last = module.constant_epochs
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        last = min(last, trainer.max_epochs)
    return last - trainer.current_epoch


def _validation_batches(trainer: pl.Trainer) -> float:
    return sum(trainer.num_val_batches) if isinstance(trainer.num_val_batches, list) else trainer.num_val_batches
