"""The data: what a listing finds, classes, readable samples, images that are in two parts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from job.check.finding import Finding, fail, ok, warn
from job.data.bad_samples import BadSample
from job.data.datamodule import ImageDataModule
from job.data.fetch import Fetcher
from job.data.index.index import Index
from job.data.index.left_out import EXPECTED
from job.data.index.sources.base import TimeLimit
from job.data.index.store import local_index
from job.data.repeated_images import find_repeated_images
from job.data.sampler import SelectedBatchSampler
from job.errors import DataError
from job.model.config import ModelConfig
from job.process.terminal import escape
from job.storage.local_cache import usable_cache_dir

SCAN, CLASSES, SAMPLES, OVERLAP = "data_scan", "data_classes", "data_samples", "data_overlap"
NAMED_CLASSES = 10
IMBALANCE = 10.0
"""Ratio of the largest class to the smallest from which on a balanced loss or sampler is worth a thought."""
FEW = 5
"""Images of a class below which it can hardly be learnt."""
DECODED = 32
"""Samples per part that are read and decoded."""
COMPARED = 64
"""Samples of validation and test that are compared with training samples of the same size."""
MOST_ROWS = 1_000_000
"""Rows of a part whose sizes are compared."""


def scan(data: ImageDataModule, run_dir: str, folder: Path, seconds: float) -> Iterator[Finding]:
    """List the data, or take the index that a run has left in run_dir; ``data`` has its parts afterwards.

    Args:
        data: the images.
        run_dir: where an index may be; nothing is written there.
        folder: new local folder for the index.
        seconds: after which the listing ends with what it has found.
    """
    limit = TimeLimit(time.monotonic() + seconds)
    wanted, data.cache_dir = data.cache_dir, usable_cache_dir(data.cache_dir)
    data.is_cache_usable = wanted == data.cache_dir
    uri = data.usable_index(run_dir)
    try:
        if uri is not None:
            data.open_index(local_index(uri, data.cache_dir))
        else:
            folder.mkdir(mode=0o700)
            data.make_index(folder, limit)
            data.open_index(folder)
    except DataError as error:
        if not limit.passed:
            raise
        yield _unfinished(f"the listing was ended after {seconds:.0f} s, and what it had found is not enough: {error}")
        return
    sizes = ", ".join(f"{part} {len(index):,}" for part, index in data.parts.items())
    found = f"{len(data.classes):,} classes; images: {sizes}"
    if limit.passed:
        yield _unfinished(f"the listing was ended after {seconds:.0f} s, and had found {found}.")
        return
    kinds = [kind for kind in data.left_out if kind.kind not in EXPECTED]
    left_out = "; ".join(map(str, kinds if kinds else data.left_out))
    if kinds:
        yield warn(
            SCAN,
            f"{found}. Left out: {left_out}",
            "If these are images that you need, rename or move them; see docs/data.md.",
        )
    else:
        yield ok(SCAN, f"{found}." + (f" Left out: {left_out}" if left_out else ""))


def _unfinished(message: str) -> Finding:
    return warn(
        SCAN,
        message,
        "List the data ahead of the run, once: python -m job index URI. Findings on the data are those of a part.",
    )


def classes(data: ImageDataModule, config: ModelConfig) -> Iterator[Finding]:
    """Images per class, and classes that training or validation can do little with."""
    train = data.parts["train"]
    counts = train.class_counts()
    first = zip(train.classes[:NAMED_CLASSES], counts[:NAMED_CLASSES], strict=True)
    shown = ", ".join(f"{escape(name)[:40]} {count:,}" for name, count in first)
    message = f"training images per class: {shown}{', …' if len(counts) > NAMED_CLASSES else ''}."
    if len(counts) < 2 and not train.has_several_labels:
        yield fail(CLASSES, message, "Add images of another class: with one there is nothing to learn.")
        return
    problems = list(_class_problems(data, config, counts))
    yield from problems or [ok(CLASSES, message)]


def _class_problems(data: ImageDataModule, config: ModelConfig, counts: npt.NDArray[np.int64]) -> Iterator[Finding]:
    names = data.parts["train"].classes
    least, most = int(counts.argmin()), int(counts.argmax())
    described = (
        f"the largest class, {escape(names[most])[:40]}, has {counts[most]:,} training images, the smallest, "
        f"{escape(names[least])[:40]}, {counts[least]:,}"
    )
    if counts[least] < FEW:
        few = int((counts < FEW).sum())
        yield warn(
            CLASSES,
            f"{few:,} of {len(counts):,} classes have fewer than {FEW} training images, for example "
            f"{escape(names[least])[:40]} {counts[least]:,}.",
            "Add images of them, or merge classes.",
        )
    is_balanced = data.sampling == "balanced" or config.class_weights == "balanced"
    if counts[most] >= IMBALANCE * max(counts[least], 1) and not is_balanced:
        yield warn(
            CLASSES,
            f"{described}.",
            "Consider --model.class_weights=balanced or --data.sampling=balanced, and look at val/macro_f1.",
        )
    for part in data.parts.keys() - {"train"}:
        absent = np.flatnonzero(data.parts[part].class_counts() == 0)
        if len(absent):
            yield warn(
                CLASSES,
                f"{len(absent):,} classes have no image in {part}, for example {escape(names[int(absent[0])])[:40]}: "
                "their metrics are undefined.",
                f"Add images of them to {part}.",
            )


def samples(data: ImageDataModule) -> Iterator[Finding]:
    """Read, decode and augment some samples of each part."""
    bad: list[BadSample] = []
    sizes = {}
    for part, index in data.parts.items():
        chosen = _spread(len(index), DECODED)
        if not len(chosen):
            continue
        dataset = data.dataset(part, SelectedBatchSampler(chosen, len(chosen)))
        batch = dataset[dataset.sampler.batch(0, 0)]
        if batch["error"] is not None:
            raise batch["error"]
        bad += batch["bad"]
        sizes[part] = len(chosen)
    count = sum(sizes.values())
    if not bad:
        yield ok(SAMPLES, f"{count} samples of {', '.join(data.parts)} can be read and decoded.")
    else:
        message = f"{len(bad)} of {count} samples cannot be read, for example {bad[0].line}"
        mend = "Repair or remove them, or tolerate some by --data.max_bad_samples, as a number or a share such as 1%."
        yield warn(SAMPLES, message, mend) if _are_tolerated(data, bad, sizes) else fail(SAMPLES, message, mend)
    if (repeated := find_repeated_images(data.parts["train"], str(data.cache_dir))) is not None:
        yield warn(
            SAMPLES,
            f"about {repeated.count:,} of {repeated.total:,} training images are the same file of {repeated.size:,} "
            f"bytes: {', '.join(repeated.examples)}.",
            'Look at them, and remove them if they are a placeholder such as "image not found".',
        )


def _are_tolerated(data: ImageDataModule, bad: list[BadSample], sizes: dict[str, int]) -> bool:
    """Whether the run would go on with so many, of as many samples per part as ``sizes`` says."""
    lines = {(each.part, each.sample): each.line for each in bad}
    try:
        data.bad_samples.limit.require_few(lines, sizes, data.bad_samples.option)
    except DataError:
        return False
    return True


def overlap(data: ImageDataModule) -> Iterator[Finding]:
    """Whether images of validation and test are training images, too, by the content of some."""
    train = data.parts["train"]
    compared = 0
    for part, index in ((name, each) for name, each in data.parts.items() if name != "train"):
        pairs = _candidates(train, index)
        if not pairs:
            continue
        of_train = _digests(train, np.unique([one for one, _ in pairs]), str(data.cache_dir))
        of_part = _digests(index, np.unique([other for _, other in pairs]), str(data.cache_dir))
        compared += len(of_part)
        same = {other: one for one, other in pairs if of_train.get(one, b"1") == of_part.get(other, b"2")}
        if same:
            other, one = next(iter(same.items()))
            yield warn(
                OVERLAP,
                f"{len(same)} of {len(of_part)} {part} images that were compared are training images, too, for example "
                f"{escape(index.uri(other))} and {escape(train.uri(one))}: the accuracy of {part} will be too good.",
                f"Remove them from {part}, or from the training images.",
            )
            return
    yield ok(
        OVERLAP,
        f"none of {compared} images of validation and test that have the size of a training image is one."
        if compared
        else "no image of validation and test has the size of a training image.",
    )


def _candidates(train: Index, other: Index) -> list[tuple[int, int]]:
    """Pairs (training sample, sample of another part) of equal size in bytes; those of equal names come first."""
    sizes, other_sizes = (_sizes(index) for index in (train, other))
    order = np.argsort(sizes, kind="stable")
    positions = np.searchsorted(sizes[order], other_sizes)
    positions = np.minimum(positions, len(order) - 1)
    matching = np.flatnonzero((sizes[order][positions] == other_sizes) & (other_sizes > 0))
    pairs: list[tuple[int, int]] = []
    for sample in matching[_spread(len(matching), 16 * COMPARED)].tolist():
        first = positions[sample]
        last = int(np.searchsorted(sizes[order], other_sizes[sample], side="right"))
        pairs += [(int(one), sample) for one in order[first : min(last, first + 4)]]
    names, other_names = (
        dict(zip(chosen, (row.key.rpartition("/")[2] for row in index.rows(chosen)), strict=True))
        for index, chosen in (
            (train, sorted({one for one, _ in pairs})),
            (other, sorted({sample for _, sample in pairs})),
        )
    )
    pairs.sort(key=lambda pair: names[pair[0]] != other_names[pair[1]])
    return pairs[:COMPARED]


def _sizes(index: Index) -> npt.NDArray[np.int64]:
    return index.sizes_of(np.arange(min(len(index), MOST_ROWS)))


def _digests(index: Index, chosen: npt.NDArray[np.int64], cache_dir: str) -> dict[int, bytes]:
    """SHA-256 of the content of some samples, of those that can be read."""
    fetcher, digests = Fetcher(index, cache_dir), {}
    for sample, fetched in zip(chosen.tolist(), fetcher.start(chosen).result(), strict=True):
        try:
            digests[sample] = hashlib.sha256(fetcher.content(fetched)).digest()
        except DataError:
            continue  # the check of samples reports it
    return digests


def _spread(size: int, count: int) -> npt.NDArray[np.int64]:
    """Up to ``count`` numbers below ``size``, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.int64))
