"""Batch samplers: the global order of samples is a pure function of (seed, epoch).

No worker has a state of its own. Rank r of W takes its slice of every global batch, so that the same batches are
trained on with any number of processes, and a run can resume at any batch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_ROUNDS = 6

SHUFFLED_TOGETHER = 64
"""Batches whose samples are permuted at once: numpy takes as long for 32 samples as for 2,000."""


@dataclass(frozen=True)
class BatchIndices:
    """The samples of one rank's share of one global batch.

    Attributes:
        epoch: epoch the augmentation is drawn for.
        batch: number of the global batch in it.
        samples: int64 [global_batch_size / world_size], sample ids. Past the end of the data set they
            repeat this batch's samples, so that every batch has the same shape.
        valid: bool, same shape; False for such padding, which is masked out.
        global_size: valid samples of the global batch, over all ranks.
        variants: int64, same shape: the variant of each sample; None: the one of the epoch.
        repeats: int64, same shape: how often each sample came before, where one comes several times; None: never.
    """

    epoch: int
    batch: int
    samples: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    global_size: int
    variants: npt.NDArray[np.int64] | None = None
    repeats: npt.NDArray[np.int64] | None = None


class ResumableBatchSampler:
    """Sampler of one rank's batches, for a DataLoader with ``batch_size=None``.

    Iterating yields a :class:`BatchIndices` for each global batch of the epoch that
    :meth:`set_epoch` chose, from batch ``start_batch`` on.

    Args:
        size: samples in the data set.
        global_batch_size: samples per step, over all ranks; a multiple of ``world_size``.
        rank: of this process.
        world_size: number of processes.
        seed: of the permutation.
        shuffle: permute by (seed, epoch), else in order of sample id.
        run_length: neighbours that stay together, since one read fetches them; see :func:`permute_runs`.
    """

    def __init__(
        self,
        size: int,
        global_batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        run_length: int = 1,
    ) -> None:
        if global_batch_size % world_size:
            raise ValueError(f"global_batch_size {global_batch_size} is not a multiple of world_size {world_size}")
        self.size = size
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.run_length = run_length
        self.epoch = 0
        self.start_batch = 0

    @property
    def share(self) -> int:
        """Samples of a batch that are this rank's."""
        return self.global_batch_size // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next (Lightning calls this)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.global_batch_size)

    def __iter__(self) -> Iterator[BatchIndices]:
        return self.from_batch(self.epoch, self.start_batch)

    def from_batch(self, epoch: int, start: int) -> Iterator[BatchIndices]:
        """The batches of ``epoch`` from number ``start`` on."""
        return (
            indices
            for first in range(start, len(self), SHUFFLED_TOGETHER)
            for indices in self.batches(epoch, range(first, min(first + SHUFFLED_TOGETHER, len(self))))
        )

    def batch(self, epoch: int, number: int) -> BatchIndices:
        """This rank's slice of global batch ``number`` of ``epoch``."""
        return self.batches(epoch, range(number, number + 1))[0]

    def batches(self, epoch: int, batches: range) -> list[BatchIndices]:
        """:meth:`batch` of several neighbouring batches, which takes hardly longer than for one."""
        numbers = np.arange(batches.start, batches.stop)[:, None]
        sizes = np.minimum(self.global_batch_size, self.size - numbers * self.global_batch_size)
        within = np.arange(self.rank * self.share, (self.rank + 1) * self.share)
        samples, repeats = self._samples_at(numbers * self.global_batch_size + within % sizes, epoch)
        valid = within < sizes
        return [
            BatchIndices(
                epoch,
                number,
                samples[row],
                valid[row],
                int(sizes[row, 0]),
                repeats=None if repeats is None else repeats[row],
            )
            for row, number in enumerate(batches)
        ]

    def _samples_at(
        self, positions: npt.NDArray[np.int64], epoch: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
        """Sample ids at ``positions`` of an epoch, and how often each came before."""
        if self.shuffle:
            positions = shuffled(positions, self.size, self.run_length, self.seed, epoch)
        return positions, None


class SuccessiveEpochs:
    """The batches of the epoch that ``sampler`` would iterate next, and of those that follow it.

    Args:
        sampler: of one epoch; :meth:`set_epoch` sets its.
        follows: whether there is an epoch of this number.
    """

    def __init__(self, sampler: ResumableBatchSampler, follows: Callable[[int], bool]) -> None:
        self.sampler = sampler
        self.follows = follows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next (Lightning calls this)."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[BatchIndices]:
        epoch, start = self.sampler.epoch, self.sampler.start_batch
        yield from self.sampler.from_batch(epoch, start)
        while self.follows(epoch := epoch + 1):
            yield from self.sampler.from_batch(epoch, 0)


class BalancedBatchSampler(ResumableBatchSampler):
    """Sampler of epochs in which classes are equally frequent, for long tails.

    An epoch has as many samples as the data set. All epochs together are one sequence in which classes take turns, and
    a class's turns go through its samples in a new random order each time: so a class is drawn equally often, plus or
    minus one, in each epoch, and a sample of a class is drawn again once all of them were. The order within an epoch is
    a permutation. Everything is a pure function of (seed, epoch, position).

    Memory holds a sample id and a class number per sample.

    Args:
        size: samples in the data set, and per epoch.
        global_batch_size: samples per step, over all ranks; a multiple of ``world_size``.
        classes: returns the class of each sample, int [size]; samples with -1 are one class more. Other processes call
            it again.
        rank: of this process.
        world_size: number of processes.
        seed: of all permutations.
    """

    def __init__(
        self,
        size: int,
        global_batch_size: int,
        *,
        classes: Callable[[], npt.NDArray[np.int32]],
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        super().__init__(size, global_batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=True)
        self.classes = classes

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_members"}

    @functools.cached_property
    def _members(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Size of each class that has samples, the place of its first one, and the sample ids by class."""
        classes = self.classes()
        ids = np.argsort(classes, kind="stable").astype(np.uint32 if self.size < 1 << 32 else np.int64)
        counts = np.bincount(classes + 1)
        counts = counts[counts > 0].astype(np.int64)
        return counts, counts.cumsum() - counts, ids

    def _samples_at(
        self, positions: npt.NDArray[np.int64], epoch: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
        counts, firsts, ids = self._members
        turn, number = np.divmod(epoch * self.size + permute(positions, self.size, f"{self.seed}/{epoch}"), len(counts))
        repeats, place = np.divmod(turn, counts[number])
        keys = mix64(mix64(_hash64(f"{self.seed}/balanced") + number.astype(np.uint64)) + repeats.astype(np.uint64))
        samples = ids[firsts[number] + permute_each(place, counts[number], keys)]
        return samples.astype(np.int64), repeats


class SelectedBatchSampler(ResumableBatchSampler):
    """Sampler of some samples, once, in the given order; the last batch is padded.

    Args:
        samples: int64 [N], sample ids.
        batch_size: samples per batch.
    """

    def __init__(self, samples: npt.NDArray[np.int64], batch_size: int) -> None:
        super().__init__(len(samples), batch_size, rank=0, world_size=1, seed=0, shuffle=False)
        self.samples = samples

    def _samples_at(self, positions: npt.NDArray[np.int64], epoch: int) -> tuple[npt.NDArray[np.int64], None]:
        return self.samples[positions], None


class FeatureBatchSampler(ResumableBatchSampler):
    """Sampler of every variant of some samples, once: chunk by chunk, in batches of one shape.

    A batch lies within a chunk; the last one of a chunk is padded. The variants of a sample are neighbours.

    Args:
        chunks: sample ids.
        variants: variants per sample.
        batch_size: variants per batch.
    """

    def __init__(self, chunks: Sequence[range], variants: int, batch_size: int) -> None:
        size = variants * sum(map(len, chunks))
        super().__init__(size, batch_size, rank=0, world_size=1, seed=0, shuffle=False)
        self.chunks = chunks
        self.variants = variants
        self._ends = np.cumsum([self.batches_in(chunk) for chunk in chunks])

    def batches_in(self, chunk: range) -> int:
        """Number of batches of a chunk."""
        return -(-len(chunk) * self.variants // self.global_batch_size)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def batches(self, epoch: int, batches: range) -> list[BatchIndices]:
        """Several batches, numbered through all chunks."""
        return [self._batch(epoch, batch) for batch in batches]

    def _batch(self, epoch: int, batch: int) -> BatchIndices:
        number = int(np.searchsorted(self._ends, batch, side="right"))
        chunk = self.chunks[number]
        first = (batch - (int(self._ends[number - 1]) if number else 0)) * self.global_batch_size
        rows = first + np.arange(self.global_batch_size)
        valid = rows < len(chunk) * self.variants
        sample, variant = np.divmod(rows % (len(chunk) * self.variants), self.variants)
        return BatchIndices(epoch, batch, (chunk.start + sample).astype(np.int64), valid, int(valid.sum()), variant)


def shuffled(
    positions: npt.NDArray[np.int64], size: int, run_length: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Sample ids at ``positions`` of the order of an epoch: a pure function of its arguments."""
    return permute_runs(positions, size, run_length, key=f"{seed}/{epoch}")


def permute_runs(positions: npt.NDArray[np.int64], size: int, run_length: int, key: str) -> npt.NDArray[np.int64]:
    """Sample ids at ``positions`` of an order that permutes runs of ``run_length`` neighbours.

    The place where runs begin depends on ``key``, too, so that different neighbours meet in different epochs; samples
    that do not fill a run come last. A run of 1 is a permutation of samples.
    """
    runs = size // run_length
    if run_length == 1 or not runs:
        return permute(positions, size, key)
    start = int(mix64(_hash64(key))[0] % np.uint64(size))
    run, within = positions // run_length, positions % run_length
    permuted = permute(np.minimum(run, runs - 1), runs, key) * run_length + within
    return (np.where(run < runs, permuted, positions) + start) % size


def permute(positions: npt.NDArray[np.int64], size: int, key: str) -> npt.NDArray[np.int64]:
    """Sample ids at ``positions`` of the pseudo-random permutation of ``range(size)`` chosen by ``key``.

    A Feistel network over the next even power of two, walked until it falls inside the range
    (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Memory does not grow
    with ``size``: the permutation is never stored.
    """
    half_bits = np.uint64(max(((size - 1).bit_length() + 1) // 2, 1))
    mask = np.uint64((1 << int(half_bits)) - 1)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    round_keys = np.frombuffer(digest, dtype="<u8")

    def encrypt(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> half_bits, values & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        return (left << half_bits) | right

    result = encrypt(positions.astype(np.uint64))
    while (outside := result >= np.uint64(size)).any():
        result[outside] = encrypt(result[outside])
    return result.astype(np.int64)


def permute_each(
    positions: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """As :func:`permute`, each position by a permutation of its own size and key."""
    bits = np.frexp((sizes - 1).astype(np.float64))[1]
    half_bits = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    result = positions.astype(np.uint64)
    outside = np.ones(result.shape, np.bool_)
    while outside.any():
        shift, key = half_bits[outside], keys[outside]
        mask = (np.uint64(1) << shift) - np.uint64(1)
        left, right = result[outside] >> shift, result[outside] & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix64(right ^ mix64(key + np.uint64(number))) & mask)
        result[outside] = (left << shift) | right
        outside &= result >= sizes.astype(np.uint64)
    return result.astype(np.int64)


def _hash64(text: str) -> npt.NDArray[np.uint64]:
    """A 64-bit hash, uint64 [1]."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u8")


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sample_seed(seed: int, epoch: int, sample: int, repeat: int = 0) -> int:
    """The seed of one sample's augmentation, a 63-bit pure function of its arguments."""
    text = f"{seed}/{epoch}/{sample}/{repeat}" if repeat else f"{seed}/{epoch}/{sample}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
