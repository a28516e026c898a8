"""The checks of an audit by themselves: label errors as cleanlab finds them, copies in any orientation, outliers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from support import index_of, picture_files, write_files
from test_shards import run_on_two_ranks

from job.audit import pixels
from job.audit.confusion import confused_pairs, confusion_of
from job.audit.copies import Forest, find_copies, orientation_free, orientations, standardised
from job.audit.image_faults import find_faults
from job.audit.label_errors import find_label_errors, find_wrong_classes
from job.audit.outliers import find_outliers
from job.audit.pixels import GREY, RECORD
from job.audit.pool import ImagePool
from job.audit.search import similar_pairs

CPU = torch.device("cpu")

CLEANLAB = {
    0: [29, 32, 39, 18],
    1: [15, 53, 45, 38, 21, 35, 16],
    3: [39, 92, 100, 29, 44, 106, 96, 20, 55, 73, 77, 16, 65, 2, 33, 14],
    6: [6, 113, 103, 51, 37, 100, 24, 119, 63, 147, 150, 67, 123, 108, 14, 60, 161, 109, 177, 40, 168, 139, 85],
}
"""Samples that ``cleanlab.filter.find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence")``
of cleanlab 2.9.0 returns for :func:`noisy_labels` of these seeds."""


def noisy_labels(seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Labels of which some are wrong, and probabilities that mostly know."""
    generator = np.random.default_rng(seed)
    classes, count = 2 + seed, 60 + 20 * seed
    truth = generator.integers(0, classes, count)
    labels = np.where(generator.random(count) < 0.15, generator.integers(0, classes, count), truth)
    logits = generator.normal(size=(count, classes))
    logits[np.arange(count), truth] += 2.5
    probabilities = np.exp(logits)
    return labels, probabilities / probabilities.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", CLEANLAB)
def test_label_errors_are_those_of_cleanlab(seed: int) -> None:
    labels, probabilities = noisy_labels(seed)

    def predict(samples: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        for block in np.array_split(samples[::-1], 3):
            yield block, probabilities[block]

    errors = find_label_errors(predict, np.arange(len(labels)), labels, probabilities.shape[1])
    assert errors.samples.tolist() == CLEANLAB[seed]
    assert (errors.suggested == probabilities[errors.samples].argmax(1)).all()
    np.testing.assert_allclose(errors.self_confidence, probabilities[errors.samples, labels[errors.samples]])
    others = probabilities[errors.samples].max(1)
    np.testing.assert_allclose(errors.normalized_margin, errors.self_confidence - others)


def test_several_labels_are_checked_class_by_class() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random((200, 3)) < 0.4
    targets = truth.astype(np.uint8)
    wrong = [(3, 0), (3, 2), (50, 1), (120, 2)]
    for sample, number in wrong:
        targets[sample, number] ^= 1
    probabilities = np.clip(np.where(truth, 0.9, 0.1) + generator.normal(0, 0.03, truth.shape), 0, 1)
    errors = find_wrong_classes(
        lambda rows: [(rows, probabilities[rows])], np.arange(200), lambda rows: targets[rows], np.array([0, 2])
    )
    found = sorted(zip(errors.samples.tolist(), errors.suggested.tolist(), strict=True))
    assert found == [(3, 0), (3, 2), (120, 2)]  # class 1 is not checked


def pictures(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, GREY, GREY), dtype=np.uint8)


def test_orientations_have_the_same_vector() -> None:
    grey = pictures(5)
    expected = orientation_free(grey)
    seen = []
    for each in orientations(grey):
        torch.testing.assert_close(orientation_free(each), expected)
        seen.append(each.tobytes())
    assert len(set(seen)) == 8
    noisy = (grey.astype(np.float64) + np.random.default_rng(1).normal(0, 12, grey.shape)).clip(0, 255).astype(np.uint8)
    own = (standardised(grey) * standardised(noisy)).sum(1)
    free = (expected * orientation_free(noisy)).sum(1).numpy()
    assert (free >= own - 1e-5).all()  # sorting brings copies closer


def pool_of(values: npt.NDArray[np.float32], *sizes: int) -> ImagePool:
    """Images of some features in one part, or in several of these sizes."""
    parts: dict[str, Any] = {}
    start = 0
    for number, size in enumerate(sizes or (len(values),)):
        rows = values[start : start + size]
        index = SimpleNamespace(has_several_labels=False)

        class Part(SimpleNamespace):
            def __len__(self) -> int:
                return len(self.values)

        parts[f"part{number}"] = Part(
            values=rows, labels=np.zeros(size, np.int64), valid=np.ones(size, np.bool_), classes=("a",), index=index
        )
        start += size
    return ImagePool(cast("Any", parts))


def records_of(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    records = np.zeros(len(grey), RECORD)
    records["grey"], records["readable"] = grey, True
    for number, each in enumerate(grey):
        content = np.frombuffer(np.array([number, 7], "<u8").tobytes(), "V16")
        records["content"][number] = records["pixels"][number] = content[0]
        records["deviation"][number] = each.std()
    return records


def inspect_on_rank(rank: int, port: int, root: str) -> None:
    """Inspect images on this rank of two, and save its records and errors."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    pixels.PORTION, pixels.PORTIONS_PER_GATHER = 3, 2
    index = index_of(root)
    records = np.zeros(len(index), RECORD)
    errors = pixels.inspect(index, records, root, None, 1, 1 << 20)
    np.savez(f"{root}-{rank}.npz", records=records, samples=np.array(sorted(errors)))
    dist.barrier()
    dist.destroy_process_group()


def test_records_of_all_ranks_come_to_rank_zero_alone(tmp_path: Path) -> None:
    files = picture_files(["blue", "red"], 10) | {"red/broken.jpg": b"\xff\xd8\xff no image"}
    root = write_files(tmp_path / "images", files)
    run_on_two_ranks(inspect_on_rank, str(root))
    index = index_of(root)
    expected = np.zeros(len(index), RECORD)
    (broken,) = pixels.inspect(index, expected, str(root), None, 1, 1 << 20)
    first, second = (np.load(f"{root}-{rank}.npz") for rank in range(2))
    assert first["records"].tobytes() == expected.tobytes()
    assert first["samples"].tolist() == [broken]
    is_own = np.arange(len(index)) // 3 % 2 == 1  # portions of three images in turn
    assert second["records"][is_own].tobytes() == expected[is_own].tobytes()
    assert not second["records"]["readable"][~is_own].any()
    assert len(second["samples"]) == 0


def test_copies_of_pixels_features_and_content() -> None:
    generator = np.random.default_rng(0)
    grey = pictures(80)
    features = generator.normal(size=(80, 32)).astype(np.float32)
    grey[70] = np.rot90(grey[1])  # turned
    grey[71] = grey[2] // 2 + 60  # of another brightness and contrast
    blurred = 0.8 * grey[3].astype(np.float64) + 0.45 * grey[72].astype(np.float64)
    grey[72] = blurred.clip(0, 255)  # retouched, with nearly the same features
    features[72] = features[3] + 0.1 * generator.normal(size=32)
    features[73] = features[4]  # equal features of another picture
    records = records_of(grey)
    records["content"][74] = records["content"][5]  # the same file
    records["pixels"][75] = records["pixels"][6]  # another file of the same pixels
    copies = find_copies(pool_of(features), records, np.ones(80, np.bool_), 0.85, CPU)
    assert [group.tolist() for group in copies.groups()] == [[1, 70], [2, 71], [3, 72], [5, 74], [6, 75]]
    assert np.flatnonzero(copies.exact).tolist() == [5, 6, 74, 75]
    pixels_only = find_copies(pool_of(features), records, np.arange(80) != 74, 1.0, CPU)
    assert [group.tolist() for group in pixels_only.groups()] == [[1, 70], [2, 71], [6, 75]]


def test_images_that_are_all_similar_are_no_copies() -> None:
    common, own = pictures(1)[0].astype(np.float64), pictures(60, seed=1).astype(np.float64)
    grey = (0.9 * common + 0.1 * own).astype(np.uint8)
    grey[59] = grey[0] + 1
    features = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    copies = find_copies(pool_of(features), records_of(grey), np.ones(60, np.bool_), 1.0, CPU)
    assert [group.tolist() for group in copies.groups()] == [[0, 59]]


def test_cells_find_the_pairs_that_all_comparisons_find() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(4000, 16)).astype(np.float32)
    values[2000:2200] = values[:200] + 0.05 * generator.normal(size=(200, 16))
    vectors = torch.nn.functional.normalize(torch.from_numpy(values), dim=1)
    largest = 0

    def some(rows: npt.NDArray[np.int64]) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(rows))
        return vectors[torch.from_numpy(rows)]

    def pairs(exact: int) -> set[tuple[int, int]]:
        blocks = similar_pairs(some, np.arange(4000), 0.97, CPU, exact=exact)
        rows = (zip(one.tolist(), other.tolist(), strict=True) for one, other, _ in blocks)
        return {(min(pair), max(pair)) for some in rows for pair in some}

    everything = pairs(exact=10_000)
    assert {(number, number + 2000) for number in range(200)} <= everything
    assert len(everything & pairs(exact=500)) >= 0.98 * len(everything)
    assert largest <= 2048
    alike = torch.ones(3000, 4) / 2
    blocks = similar_pairs(lambda rows: alike[torch.from_numpy(rows)], np.arange(3000), 0.9, CPU, exact=100)
    forest = Forest(3000)
    for one, other, similarity in blocks:
        forest.join(one, other, similarity)
    assert (forest.roots(np.arange(3000)) == 0).all()


def test_sets_are_named_by_their_smallest_member() -> None:
    forest = Forest(10)
    forest.join(np.array([9, 4, 7, 2]), np.array([4, 1, 8, 2]), np.array([0.9, 0.95, 0.97, 1.0], np.float32))
    assert forest.roots(np.arange(10)).tolist() == [0, 1, 2, 3, 1, 5, 6, 7, 7, 1]
    np.testing.assert_allclose(forest.similarity, [0, 0.95, 0, 0, 0.95, 0, 0, 0.97, 0.97, 0.9])


def test_outliers_resemble_no_others() -> None:
    generator = np.random.default_rng(0)
    values = (np.ones(32) + 0.5 * generator.normal(size=(200, 32))).astype(np.float32)
    values[17] = 3 * generator.normal(size=32)
    samples, similarity = find_outliers(pool_of(values, 120, 80), np.arange(200), CPU)
    assert samples.tolist() == [17]
    assert similarity[0] < 0.5
    assert not len(find_outliers(pool_of(values[:20]), np.arange(20), CPU)[0])


def test_small_images_are_tiny_only_among_larger_ones() -> None:
    records = records_of(pictures(20))
    records["height"], records["width"] = 8, 8
    faults = find_faults(records)
    assert not faults.tiny.any()
    assert not faults.blank.any()
    records["height"][:19] = records["width"][:19] = 200
    assert np.flatnonzero(find_faults(records).tiny).tolist() == [19]
    records["width"][3], records["deviation"][4] = 900, 1.0
    faults = find_faults(records)
    assert np.flatnonzero(faults.odd).tolist() == [3]
    assert np.flatnonzero(faults.blank).tolist() == [4]


def test_confused_classes() -> None:
    labels = np.repeat([0, 1, 2], [100, 20, 50])
    predicted = labels.copy()
    predicted[:30], predicted[100:110] = 1, 0
    blocks = [(np.arange(170), np.eye(3)[predicted])]
    confusion = confusion_of(blocks, labels, 3)
    assert confused_pairs(confusion) == [(0, 1, pytest.approx(0.4), 40)]
    np.testing.assert_allclose(confusion.accuracy(), [0.7, 0.5, 1.0])
