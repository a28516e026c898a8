from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from job.data.sampler import (
    BalancedBatchSampler,
    BatchIndices,
    FeatureBatchSampler,
    ResumableBatchSampler,
    permute,
    permute_each,
    permute_runs,
    sample_seed,
)


def samples_by_batch(size: int, batch: int, world_size: int, epoch: int = 0, shuffle: bool = True) -> list[list[int]]:
    """Return the valid samples of each global batch, with the ranks' slices concatenated."""
    orders = [
        ResumableBatchSampler(size, batch, rank=rank, world_size=world_size, seed=7, shuffle=shuffle)
        for rank in range(world_size)
    ]
    for order in orders:
        order.set_epoch(epoch)
    return [[int(s) for plan in plans for s in plan.samples[plan.valid]] for plans in zip(*orders, strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permutation_is_a_bijection(size: int) -> None:
    assert sorted(permute(np.arange(size), size, "k").tolist()) == list(range(size))


def test_permutation_looks_random() -> None:
    # Neighbours land far apart and every position is equally likely to hold a small sample.
    order = permute(np.arange(100_000), 100_000, "key")
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    halves = [(order[i : i + 10_000] < 50_000).mean() for i in range(0, 100_000, 10_000)]
    assert max(abs(h - 0.5) for h in halves) < 0.03


def test_permutation_takes_no_memory_per_sample() -> None:
    values = permute(np.arange(5), 10**12, "key")
    assert len(set(values.tolist())) == 5
    assert values.max() < 10**12


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 23, 24, 25, 47, 101])
def test_every_sample_exactly_once_per_epoch(size: int, world_size: int) -> None:
    batches = samples_by_batch(size, 24, world_size)
    assert sorted(s for batch in batches for s in batch) == list(range(size))


def test_global_batches_do_not_depend_on_the_world_size() -> None:
    expected = samples_by_batch(101, 24, 1, epoch=3)
    for world_size in (2, 3, 4, 8):
        assert samples_by_batch(101, 24, world_size, epoch=3) == expected


@pytest.mark.parametrize(("size", "run"), [(1, 4), (3, 4), (4, 4), (101, 4), (1000, 7), (1000, 1000)])
def test_runs_are_permuted_whole_and_every_sample_comes_once(size: int, run: int) -> None:
    order = permute_runs(np.arange(size), size, run, "key")
    assert sorted(order.tolist()) == list(range(size))
    full = size // run * run
    neighbours = (np.diff(order[:full].reshape(-1, run), axis=1) % size == 1) if full else np.array([True])
    assert neighbours.all()
    if size == 1000:
        assert order.tolist() != permute_runs(np.arange(size), size, run, "other").tolist()


def test_runs_do_not_depend_on_the_world_size() -> None:
    def batches(world_size: int) -> list[list[int]]:
        shares = [
            ResumableBatchSampler(101, 24, rank=r, world_size=world_size, seed=1, shuffle=True, run_length=3)
            for r in range(world_size)
        ]
        return [[int(s) for plan in plans for s in plan.samples[plan.valid]] for plans in zip(*shares, strict=True)]

    assert batches(1) == batches(3) == batches(8)
    assert sorted(s for batch in batches(1) for s in batch) == list(range(101))


def test_epochs_and_seeds_differ() -> None:
    assert samples_by_batch(101, 24, 1, epoch=0) != samples_by_batch(101, 24, 1, epoch=1)
    assert permute(np.arange(50), 50, "1/0").tolist() != permute(np.arange(50), 50, "2/0").tolist()


def test_every_rank_gets_batches_of_one_shape() -> None:
    order = ResumableBatchSampler(25, 24, rank=3, world_size=4, seed=0, shuffle=True)
    assert [len(plan.samples) for plan in order] == [6, 6]
    last = order.batch(0, 1)
    assert not last.valid.any()
    assert last.global_size == 1


def test_iteration_can_start_at_any_batch() -> None:
    order = ResumableBatchSampler(100, 10, rank=0, world_size=1, seed=0, shuffle=True)
    whole = [plan.samples.tolist() for plan in order]
    order.start_batch = 7
    assert [plan.samples.tolist() for plan in order] == whole[7:]


def test_sample_seed_depends_on_all_its_arguments() -> None:
    seeds = {sample_seed(s, e, i) for s in range(3) for e in range(3) for i in range(50)}
    assert len(seeds) == 450


@pytest.mark.parametrize(("views", "batch_size"), [(1, 4), (2, 4), (2, 5), (3, 7)])
def test_every_view_once_in_batches_that_lie_within_chunks(views: int, batch_size: int) -> None:
    chunks = [range(10, 20), range(10), range(40, 43)]
    order = FeatureBatchSampler(chunks, views, batch_size)
    plans = list(order)
    assert len(plans) == len(order) == sum(order.batches_in(chunk) for chunk in chunks)
    assert {len(plan.samples) for plan in plans} == {batch_size}
    rows = [row for plan in plans for row in zip(plan.samples, plan.variants, plan.valid, strict=True)]
    samples_and_variants = [(sample, variant) for sample, variant, valid in rows if valid]
    assert samples_and_variants == [(sample, view) for chunk in chunks for sample in chunk for view in range(views)]
    for plan in plans:
        assert any(set(plan.samples.tolist()) <= set(chunk) for chunk in chunks)
        assert plan.global_size == plan.valid.sum()


LONG_TAIL = np.repeat(np.array([0, 1, 3, 4, -1], np.int32), [700, 200, 90, 3, 10])
"""Classes of 1,003 samples: one has none, and one is of samples without a label."""


def balanced(rank: int = 0, world_size: int = 1, seed: int = 5) -> BalancedBatchSampler:
    return BalancedBatchSampler(1003, 24, classes=LONG_TAIL.copy, rank=rank, world_size=world_size, seed=seed)


def drawn(epoch: int, sampler: BalancedBatchSampler | None = None) -> list[int]:
    plans = (sampler or balanced()).batches(epoch, range(42))
    return [int(sample) for plan in plans for sample in plan.samples[plan.valid]]


def test_each_class_is_drawn_equally_often() -> None:
    for epoch in range(12):
        samples = drawn(epoch)
        assert len(samples) == 1003
        counts = np.bincount(LONG_TAIL[samples] + 1)
        assert counts[3] == 0
        assert set(np.delete(counts, 3).tolist()) <= {200, 201}


def test_classes_are_drawn_without_replacement() -> None:
    counts = np.zeros(1003, np.int64)
    for epoch in range(12):
        counts += np.bincount(drawn(epoch), minlength=1003)
        for label in (0, 1, 3, 4, -1):
            of_class = counts[label == LONG_TAIL]
            assert of_class.max() - of_class.min() <= 2  # one turn ends, and another one has begun
            assert epoch < 11 or of_class.min() > 0
    assert counts[LONG_TAIL == 4].min() >= 12 * 200 // 3


def test_balanced_batches_do_not_depend_on_the_world_size() -> None:
    expected = [plan.samples[plan.valid].tolist() for plan in balanced().batches(3, range(42))]
    for world_size in (2, 3, 8):
        shares = [balanced(rank, world_size).batches(3, range(42)) for rank in range(world_size)]
        joined = [
            [sample for plan in plans for sample in plan.samples[plan.valid].tolist()]
            for plans in zip(*shares, strict=True)
        ]
        assert joined == expected


def test_balanced_batches_can_start_anywhere() -> None:
    def content(plan: BatchIndices) -> list[list[int]]:
        assert plan.repeats is not None
        return [plan.samples.tolist(), plan.repeats.tolist()]

    sampler = balanced()
    sampler.set_epoch(2)
    whole = [content(plan) for plan in sampler]
    for start in (1, 17, 41):
        sampler.start_batch = start
        assert [content(plan) for plan in copy.copy(sampler)] == whole[start:]
    assert whole != [content(plan) for plan in balanced(seed=6).batches(2, range(42))]
    assert "_members" not in pickle.dumps(sampler).decode("latin1")  # other processes make it themselves


def test_repeated_samples_are_counted() -> None:
    pairs: set[tuple[int, int]] = set()
    for epoch in range(3):
        for plan in balanced().batches(epoch, range(42)):
            assert plan.repeats is not None
            for pair in zip(plan.samples[plan.valid].tolist(), plan.repeats[plan.valid].tolist(), strict=True):
                assert pair not in pairs
                pairs.add(pair)
    assert {repeat for sample, repeat in pairs if sample == 990} >= set(range(200))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permutations_of_any_size_each_are_bijections(size: int) -> None:
    sizes, keys = np.full(2 * size, size), np.repeat(np.array([1, 2], np.uint64), size)
    order = permute_each(np.tile(np.arange(size), 2), sizes, keys)
    assert sorted(order[:size].tolist()) == sorted(order[size:].tolist()) == list(range(size))
    assert size < 16 or order[:size].tolist() != order[size:].tolist()
