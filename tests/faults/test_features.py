"""Cached backbone features: training is bit-equal to training without them, also after faults."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from harness import Job
from proxy import FaultyProxy
from support import COLOURS, TINY, assert_same_weights, options, picture_files, run_well, scalars, write_files

from job import storage

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("recomputed")]

SETTINGS: dict[str, object] = {
    **TINY,
    "model.milestones": "[3]",
    "data.global_batch_size": 48,
    "trainer.max_epochs": 4,  # the last one reads images again
}
IMAGES = 500  # a class; of all, 1,200 train: four chunks and a smaller one
LAST_STEPS = {24, 49, 74, 99}  # of the epochs
COMPUTING = "computing the features of the frozen backbone once: "


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("many"), picture_files(list(COLOURS), IMAGES))


@pytest.fixture(scope="session")
def recomputed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Function of the number of processes: run_dir of a run that recomputes features in each epoch."""
    run_dirs: dict[int, str] = {}

    def run_dir(processes: int) -> str:
        if processes not in run_dirs:
            run_dirs[processes] = str(tmp_path_factory.mktemp("recomputed"))
            arguments = options(SETTINGS, data__root=images, run_dir=run_dirs[processes], features__use="never")
            run_well("fit", *arguments, processes=processes)
        return run_dirs[processes]

    return run_dir


def assert_same(run_dir: str, recomputed: str) -> None:
    assert_same_weights(run_dir, recomputed)
    one, other = scalars(run_dir), scalars(recomputed)
    for tag in ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/auroc"):
        assert one[tag] == other[tag], tag


def at_upload(proxy: FaultyProxy, number: int, action: Callable[[], None]) -> None:
    """Call ``action`` when the upload of the training part's chunk ``number`` has begun."""
    uploads: list[int] = []

    def fault(request: web.Request) -> None:
        if "uploadType" in request.path_qs and (request.content_length or 0) > 150_000:
            uploads.append(1)
            if len(uploads) == number:
                proxy.fault = lambda request: None
                action()

    proxy.fault = fault


@pytest.mark.parametrize("processes", [1, 2])
def test_a_kill_while_computing_features_resumes_bit_for_bit(
    processes: int,
    run_dir: str,
    images: Path,
    recomputed: Callable[[int], str],
    tmp_path: Path,
    proxy: FaultyProxy,
) -> None:
    """The second attempt has an empty disk, as on another node, and downloads the finished chunks from the bucket."""
    settings = {**SETTINGS, "data.root": images, "run_dir": run_dir}
    jobs: list[Job] = []
    at_upload(proxy, processes + 1, lambda: jobs[0].kill())
    jobs.append(Job(tmp_path / "log", "fit", *options(settings, data__cache_dir=tmp_path / "1"), processes=processes))
    assert jobs[0].wait() != 0
    assert f"{COMPUTING}train 5 of 5 chunks, val 2 of 2 chunks" in jobs[0].output
    kept = [file.key.rpartition("/")[2] for file in storage.list_files(f"{run_dir}/features")]
    finished = len([name for name in kept if name.startswith("train") and name.endswith(".json")])
    assert 1 <= finished < 5
    resumed = run_well("fit", *options(settings, data__cache_dir=tmp_path / "2"), processes=processes)
    assert f"{COMPUTING}train {5 - finished} of 5 chunks, val 2 of 2 chunks" in resumed.stderr
    assert_same(run_dir, recomputed(processes))


def test_sigterm_while_computing_features(
    run_dir: str, images: Path, recomputed: Callable[[int], str], tmp_path: Path, proxy: FaultyProxy
) -> None:
    arguments = options(SETTINGS, data__root=images, run_dir=run_dir, data__cache_dir=tmp_path)
    jobs: list[Job] = []
    at_upload(proxy, 1, lambda: jobs[0].process.send_signal(signal.SIGTERM))
    jobs.append(Job(tmp_path / "log", "fit", *arguments))
    assert jobs[0].wait() == 143, jobs[0].output
    assert "stopped on request while the backbone's features were computed" in jobs[0].output
    assert "Traceback" not in jobs[0].output
    run_well("fit", *arguments)
    assert_same(run_dir, recomputed(1))


def test_features_are_shared_between_runs_and_damaged_ones_recomputed(
    run_dir: str, images: Path, recomputed: Callable[[int], str], tmp_path: Path
) -> None:
    shared = f"{run_dir}-shared"
    settings = {**SETTINGS, "data.root": images, "features.uri": shared}

    def fit(name: str, cache: str, **changes: object) -> str:
        arguments = options(settings, run_dir=f"{run_dir}/{name}", data__cache_dir=tmp_path / cache, **changes)
        return run_well("fit", *arguments).stderr

    assert COMPUTING in fit("first", "a", **{"trainer.log_every_n_steps": 7})
    losses = scalars(recomputed(1))["train/loss"]
    assert scalars(f"{run_dir}/first")["train/loss"] == [
        (step, loss) for step, loss in losses if step % 7 == 6 or step in LAST_STEPS
    ]
    assert COMPUTING not in fit("head", "b", **{"model.hidden": "[4]", "trainer.max_epochs": 1})
    assert COMPUTING in fit("size", "b", **{"data.image_size": 40, "trainer.max_epochs": 3})
    (path,) = (tmp_path / "a" / "features").glob("*/train-000002.safetensors")
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    storage.write_bytes(f"{shared}/{path.parent.name}/{path.name}", bytes(content))
    path.write_bytes(content[:-1000])
    repaired = fit("again", "a")
    assert repaired.count("is damaged and is computed or fetched again") == 2
    assert f"{COMPUTING}train 1 of 5 chunks\n" in repaired
    assert_same(f"{run_dir}/again", recomputed(1))


def test_cached_features_are_bounded_and_the_oldest_evicted(images: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "data.root": images, "data.cache_dir": tmp_path / "cache", "trainer.max_epochs": 3}

    def fit(name: str, **changes: object) -> str:
        return run_well("fit", *options(settings, run_dir=tmp_path / name, **changes)).stderr

    assert "features are not cached: they need 0.00104 GB, --features.max_gb allows 0.0005" in fit(
        "none", features__max_gb=0.0005
    )
    folder = tmp_path / "cache" / "features"
    assert not folder.exists()
    fit("first")
    first = {path.name for path in folder.iterdir()}
    assert len(first) == 2  # of the training and the validation part
    fit("second", **{"data.image_size": 40, "features.max_gb": 0.0015})
    second = {path.name for path in folder.iterdir()}
    assert len(second) < 4
    assert len(second - first) == 2


def test_cached_features_of_augmented_views_with_an_unreadable_image(tmp_path: Path) -> None:
    files = picture_files(list(COLOURS), 60)
    files["blue/007.jpg"] = b"no image"
    crop = "{class_path: torchvision.transforms.v2.RandomResizedCrop, init_args: {size: [32, 32]}}"
    settings = {
        **SETTINGS,
        "data.root": write_files(tmp_path / "images", files),
        "data.augment": crop,
        "data.max_bad_samples": 1,
        "trainer.max_epochs": 3,
    }

    def fit(name: str, **changes: object) -> str:
        return run_well("fit", *options(settings, run_dir=tmp_path / name, **changes)).stderr

    log = fit("endless")
    assert "limit the variants by --data.augment_views=1" in log
    fit("recomputed", **{"data.augment_views": 2, "features.use": "never"})
    kept = fit("kept", **{"data.augment_views": 2})
    assert f"{COMPUTING}train 1 of 1 chunks" in kept
    assert "bad sample: " in kept
    assert_same(str(tmp_path / "kept"), str(tmp_path / "recomputed"))
    losses = [value for _, value in scalars(str(tmp_path / "kept"))["train/loss"]]
    assert losses != [value for _, value in scalars(str(tmp_path / "endless"))["train/loss"]]
