from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import REPOSITORY, TINY, index_of, options, picture, run_here, write_files
from torchvision.transforms import v2

from job.data.dataset import Batch, ImageDataset, Preprocessing
from job.data.loader import BatchLoader
from job.data.sampler import BatchIndices, FeatureBatchSampler, ResumableBatchSampler
from job.data.shared_batches import SharedBatch
from job.data.workers import MOST_THREADS, START_SECONDS, divide, one_core_threads, within_shared_memory
from job.errors import ConfigError


def loader(
    folder: Path,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    augment: v2.Transform | None = None,
    batch_size: int = 6,
    epochs: int = 1,
) -> BatchLoader:
    index = index_of(folder)
    sampler = ResumableBatchSampler(len(index), batch_size, rank=rank, world_size=world_size, seed=1, shuffle=True)
    dataset = ImageDataset(index, sampler, Preprocessing(8, augment=augment, flip=True))
    return BatchLoader(dataset, workers, follows=lambda epoch: epoch < epochs)


def samples_of(batches: list, loader: BatchLoader) -> list[int]:
    return [s for batch in batches for s, valid in zip(batch["sample"].tolist(), batch["mask"], strict=True) if valid]


IN_PROCESSES = v2.Compose([v2.Resize([8, 8]), v2.RandomVerticalFlip()])
"""A transform of the user's own, for which workers are processes."""


@pytest.mark.parametrize(
    ("workers", "augment"),
    [*((workers, augment) for workers in (0, 1, 4) for augment in (None, IN_PROCESSES)), (MOST_THREADS + 1, None)],
)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_stopped_at_any_batch_and_resumed_elsewhere_sees_the_rest(
    workers: int, world_size: int, augment: v2.Transform | None, colours: Path
) -> None:
    """Stopped after 3 batches on one rank; resumed with other workers and another world size."""
    batch_size = 6 if world_size == 3 else 8
    first = loader(colours, 1, augment=augment, batch_size=batch_size)
    iterator = iter(first)
    samples = samples_of([next(iterator) for _ in range(3)], first)
    state = first.state_dict()
    assert state == {"batch": 3}
    for rank in range(world_size):
        resumed = loader(colours, workers, rank, world_size, augment, batch_size)
        resumed.load_state_dict(state)
        samples += samples_of(list(resumed), resumed)
        if rank == 0:  # the epoch after that is whole again
            assert len(list(resumed)) == -(-40 // batch_size)
    assert sorted(samples) == list(range(40))


@pytest.mark.parametrize("augment", [None, IN_PROCESSES], ids=["threads", "processes"])
def test_pixels_do_not_depend_on_workers(augment: v2.Transform | None, colours: Path) -> None:
    def pixels(workers: int) -> list[torch.Tensor]:
        return [batch["image"] for batch in loader(colours, workers, augment=augment)]

    expected = pixels(0)
    for workers in (1, 3, MOST_THREADS + 1):
        assert all(torch.equal(*pair) for pair in zip(pixels(workers), expected, strict=True))


def test_processes_of_several_threads_load_the_same_batches(tmp_path: Path) -> None:
    """Variants that follow each other and unreadable samples included."""
    files = {f"{c}/{n}.jpg": picture((9 * n, 9, 9), n) for c in "ab" for n in range(12)}
    write_files(tmp_path, {**files, "a/1.jpg": b"no image", "b/0.jpg": b""})
    index = index_of(tmp_path)

    def batches(workers: int) -> tuple[BatchLoader, list[Batch]]:
        sampler = FeatureBatchSampler([range(10), range(10, 24)], 2, 9)
        loaded = BatchLoader(ImageDataset(index, sampler, Preprocessing(8, flip=True)), workers)
        return loaded, list(loaded)

    (_, expected), (several, together) = batches(0), batches(MOST_THREADS + 2)
    assert (several.num_workers, several.threads) == (2, 0)
    assert sum(len(batch["bad"]) for batch in expected) == 4
    for one, other in zip(expected, together, strict=True):
        assert one["bad"] == other["bad"]
        for name in ("image", "mask", "sample", "label"):
            assert torch.equal(one[name], other[name])  # type: ignore[literal-required]


def test_places_in_shared_memory_are_used_again_after_a_slow_consumer_has_their_images(colours: Path) -> None:
    """20 batches of each process go through its few places."""
    expected = list(loader(colours, 0, batch_size=1))
    threaded, received = loader(colours, MOST_THREADS + 1, batch_size=1), []
    for batch in threaded:
        time.sleep(0.02)
        received.append(batch)
    assert len(received) == 40
    for one, other in zip(expected, received, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["sample"], other["sample"])


def test_too_little_shared_memory_is_one_message(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(ConfigError, match=r"unable to allocate.*/dev/shm.*--data.num_workers"):
        next(iter(loader(colours, 1, augment=IN_PROCESSES)))


@pytest.mark.parametrize(
    ("workers", "augment"),
    [(0, None), (2, None), (MOST_THREADS + 1, None), (2, IN_PROCESSES)],
    ids=["none", "threads", "processes of threads", "processes"],
)
def test_epochs_that_follow_each_other_have_the_same_batches(
    workers: int, augment: v2.Transform | None, colours: Path
) -> None:
    """Also after an epoch that was abandoned, one that is read again, and one that another place is chosen in."""
    several = loader(colours, workers, augment=augment, epochs=4)

    def samples(epoch: int, batches: int | None = None, start: int = 0) -> list[list[int]]:
        several.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        several.load_state_dict({"batch": start})
        # Like Lightning, it does not ask for another one behind the last.
        return [batch["sample"].tolist() for batch in itertools.islice(several, batches or len(several) - start)]

    def expected(epoch: int) -> list[list[int]]:
        return [indices.samples.tolist() for indices in several.images.sampler.from_batch(epoch, 0)]

    assert samples(0) == expected(0)
    assert samples(1) == expected(1)
    assert samples(2, batches=3) == expected(2)[:3]
    assert samples(2, start=3) == expected(2)[3:]
    assert samples(3, batches=2) == expected(3)[:2]
    assert samples(3) == expected(3)
    assert samples(3) == expected(3)
    assert samples(0, start=5) == expected(0)[5:]
    assert samples(1) == expected(1)


def test_the_next_epoch_is_read_while_its_predecessor_ends(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[int, int]] = []
    load = ImageDataset.load

    def recorded(dataset: ImageDataset, indices: BatchIndices, image: torch.Tensor) -> Batch:
        loaded.append((indices.epoch, indices.batch))
        return load(dataset, indices, image)

    monkeypatch.setattr(ImageDataset, "load", recorded)
    several = loader(colours, 2, epochs=2)
    assert len(list(itertools.islice(several, 7))) == 7
    deadline = time.monotonic() + 60
    while (1, 0) not in loaded:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    several.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert len(list(several)) == 7
    assert sorted(loaded) == [(epoch, batch) for epoch in range(2) for batch in range(7)]  # each once, and no third


@pytest.mark.parametrize("workers", [2, MOST_THREADS + 1])
def test_a_fit_reads_through_all_epochs(
    workers: int, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    first = BatchLoader._opened

    def recorded(loader: BatchLoader) -> Generator[Batch]:
        opened.append(loader.images.index.part)
        return first(loader)

    monkeypatch.setattr(BatchLoader, "_opened", recorded)
    changes = {"trainer.max_epochs": 3, "features.use": "never", "data.num_workers": workers}
    result = run_here("fit", *options(TINY, data__root=colours, run_dir=tmp_path / "run", **changes))
    assert result.returncode == 0, result.output
    assert sorted(opened) == ["train", "val", "val", "val"]


@pytest.mark.parametrize("workers", [2, MOST_THREADS + 1])
def test_a_closed_loader_reads_and_holds_nothing_and_can_be_used_again(workers: int, colours: Path) -> None:
    # Imported here: processes that import this module for its transform would take seconds longer.
    from pytorch_lightning.utilities.combined_loader import _shutdown_workers_and_reset_iterator

    several = loader(colours, workers, epochs=2)
    assert len(list(itertools.islice(several, 7))) == 7
    assert several._ahead is not None
    if several._shared is not None:
        _shutdown_workers_and_reset_iterator(several)  # as Lightning does at the end of a run
    several.close()
    assert several._ahead is None
    assert several._shared is None or "_memory" not in vars(several._shared)
    several.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert len(list(several)) == 7


def test_small_tensors_are_sent_as_they_are(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = SharedBatch.copied

    def checked(batch: SharedBatch, *, pin: bool = False) -> Batch:
        assert {name for name, value in batch.values.items() if isinstance(value, np.ndarray)} == {
            "label",
            "mask",
            "sample",
        }
        return copied(batch, pin=pin)

    monkeypatch.setattr(SharedBatch, "copied", checked)
    assert len(list(loader(colours, MOST_THREADS + 1))) == 7


def test_an_unavailable_store_ends_a_batch_of_several_threads(colours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(colours, folder)
    threaded = loader(folder, MOST_THREADS + 1)
    shutil.rmtree(folder)
    folder.write_text("no folder")
    batch = next(iter(threaded))
    assert batch["error"] is not None or len(batch["bad"]) == 6


@pytest.mark.parametrize(
    ("count", "free", "is_transformed", "expected"),
    [
        (0, 1 << 40, False, (0, 0)),
        (4, 0, False, (0, 4)),
        (5, 1 << 40, False, (2, 3)),
        (16, 1 << 40, False, (4, 4)),
        (16, 64 << 20, False, (0, 16)),  # Docker's default
        (0, 0, True, (0, 0)),
        (16, 0, True, (16, 1)),
    ],
)
def test_workers_are_divided_among_processes(
    count: int,
    free: int,
    is_transformed: bool,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    workers = divide(count, is_transformed=is_transformed)
    assert within_shared_memory(workers, count, 64 * 3 * 224**2) == expected
    assert ("/dev/shm" in caplog.text) == (expected == (0, 16))


def test_threads_use_one_core_each_and_leave_the_others_theirs(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    threaded = loader(colours, 2)
    thread_counts: list[int] = []
    get_item = ImageDataset.__getitem__

    def counted(dataset: ImageDataset, plan: BatchIndices) -> Batch:
        thread_counts.append(torch.get_num_threads())
        return get_item(dataset, plan)

    monkeypatch.setattr(ImageDataset, "__getitem__", counted)
    assert len(list(threaded)) == 7
    assert thread_counts == [1] * 7
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_threads_that_the_system_refuses_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    start, default_threads, before = threading.Thread.start, torch.get_num_threads(), threading.enumerate()

    def refuse_the_third(thread: threading.Thread) -> None:
        if thread.name.endswith("_2"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_the_third)
        with pytest.raises(ConfigError, match=r"can't start new thread.*--data.num_workers"):
            one_core_threads(4)
    assert torch.get_num_threads() == default_threads
    for thread in set(threading.enumerate()).difference(before):  # none waits for the third
        thread.join(START_SECONDS / 2)
        assert not thread.is_alive()


def test_an_abandoned_epoch_does_not_disturb_the_next(colours: Path) -> None:
    """Lightning fetches a batch before it loads a loader's state, and then creates a new iterator."""
    threaded = loader(colours, 2)
    first = iter(threaded)
    next(first)
    second = iter(threaded)
    samples = samples_of([next(second) for _ in range(2)], threaded)
    first.close()  # type: ignore[attr-defined]
    assert sorted(samples + samples_of(list(second), threaded)) == list(range(40))


def test_workers_end_with_a_rank_that_is_killed(colours: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, 'tests/unit'); sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from test_loader import IN_PROCESSES, loader\n"
        "if __name__ == '__main__':\n"
        f"    found = loader(Path({str(colours)!r}), 2, augment=IN_PROCESSES)\n"
        "    next(iter(found))\n"
        "    print(*[w.pid for w in found._iterator._workers], flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [Path("/proc", pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    assert all(worker.exists() for worker in workers)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline, "loader processes outlive their rank"
        time.sleep(0.1)
