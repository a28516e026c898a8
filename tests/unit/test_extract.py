"""Features of any images without a Trainer: the values, what is found again, and what ranks share."""

from __future__ import annotations

import functools
import os
import resource
import signal
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import index_parts, picture_files, write_files
from torchvision.transforms import v2

from job.data.datamodule import ImageDataModule
from job.data.dataset import Preprocessing
from job.errors import DataError, DivergedError, StorageError
from job.features import extract
from job.features.disk_space import make_room
from job.features.extract import ExtractionSettings, Features, chunks_to_compute, features_of
from job.features.network import bare_backbone
from job.features.store import FeatureStore
from job.model.classifier import Classifier

SIZE = 32
BROKEN = "blue/003.jpg"


@pytest.fixture(scope="module")
def net() -> Classifier:
    return bare_backbone("timm/test_resnet", "none", image_size=SIZE)


@pytest.fixture
def data(tmp_path: Path) -> ImageDataModule:
    files = picture_files(["blue", "red"], 30)
    files[BROKEN] = b"no image"
    root = write_files(tmp_path / "images", files)
    data = ImageDataModule(str(root), image_size=SIZE, cache_dir=str(tmp_path / "cache"), num_workers=2)
    data.setup("fit")
    return data


def computed_chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Part and number of each chunk that is computed from now on."""
    chunks: list[tuple[str, int]] = []
    save = FeatureStore.save

    @functools.wraps(save)
    def recorded(store: FeatureStore, chunk: int, *args: object) -> None:
        chunks.append((store.index.part, chunk))
        save(store, chunk, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(FeatureStore, "save", recorded)
    return chunks


def extracted(
    net: Classifier, data: ImageDataModule, node: Path, bucket: Path | None, kind: str = "val", batch_size: int = 16
) -> Features:
    settings = ExtractionSettings(node, str(bucket) if bucket else None, batch_size, num_workers=1)
    return features_of(net, data.parts["train"], data.preprocessing(kind), settings, seed=data.seed)


def expected_values(net: Classifier, data: ImageDataModule, *, flip: bool = False) -> np.ndarray:
    index = data.parts["train"]
    rows = []
    for sample in range(len(index)):
        path = Path(index.uri(sample).removeprefix("file://"))
        if path.name == Path(BROKEN).name and path.parent.name == "blue":
            rows.append(np.zeros(net.head[0].in_features, np.float32))  # type: ignore[index,union-attr,arg-type]
            continue
        pixels = data.preprocessing("val").decoded(path.read_bytes())
        with torch.no_grad():
            rows.append(net.features((pixels.flip(-1) if flip else pixels)[None])[0].numpy())
    return np.stack(rows)


def test_values_are_those_of_the_network(net: Classifier, data: ImageDataModule, tmp_path: Path) -> None:
    features = extracted(net, data, tmp_path / "node", None)
    assert features.values.dtype == np.float32
    np.testing.assert_allclose(features.values, expected_values(net, data), rtol=1e-4, atol=1e-5)
    index = data.parts["train"]
    assert features.labels.tolist() == index.labels.tolist()
    assert features.classes == ("blue", "red")
    broken = [uri.endswith(BROKEN) for uri in features.uris(range(len(features)))]
    assert (~features.valid).tolist() == broken
    assert [bad.sample for bad in features.bad] == [number for number, is_broken in enumerate(broken) if is_broken]
    assert not features.values.flags.writeable


def test_variants_of_training_and_validation_share_features(
    net: Classifier, data: ImageDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = computed_chunks(monkeypatch)
    training = extracted(net, data, tmp_path / "a", tmp_path / "bucket", "train")
    assert chunks == [("train", 0)]
    assert training.variants.shape[0] == 2
    np.testing.assert_allclose(training.variants[1], expected_values(net, data, flip=True), rtol=1e-4, atol=1e-5)
    # On another node, and in another batch size: everything is fetched.
    validation = extracted(net, data, tmp_path / "b", tmp_path / "bucket", batch_size=7)
    assert chunks == [("train", 0)]
    assert validation.variants.shape == (1, *training.values.shape)
    assert np.array_equal(validation.values, training.values)


def test_a_restart_computes_what_is_missing(
    net: Classifier, data: ImageDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.features.store.CHUNK_SAMPLES", 10)
    whole = extracted(net, data, tmp_path / "other", None)
    chunks = computed_chunks(monkeypatch)
    compute, left = extract.compute_chunks, 2

    def killed(*args: object, **settings: object) -> object:
        for number, rows in enumerate(compute(*args, **settings)):  # type: ignore[arg-type]
            yield rows
            if number == left:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extract, "compute_chunks", killed)
        extracted(net, data, tmp_path / "a", tmp_path / "bucket")
    assert chunks == [("train", 0), ("train", 1)]
    features = extracted(net, data, tmp_path / "b", tmp_path / "bucket")
    assert chunks == [("train", number) for number in range(-(-len(whole) // 10))]
    assert np.array_equal(features.values, whole.values)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_any_rank_completes_the_work_of_all(
    net: Classifier, data: ImageDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr("job.features.store.CHUNK_SAMPLES", 10)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", str(first))
    chunks = computed_chunks(monkeypatch)
    extracted(net, data, tmp_path / "a", tmp_path / "bucket")
    assert sorted(chunks) == [("train", number) for number in range(len({*chunks}))]
    assert chunks[0] == ("train", first)
    assert chunks_to_compute([1, 4, 5, 7], 1, 3) == [1, 4, 7]
    assert chunks_to_compute([1, 4, 5, 7], 2, 3) == [5]
    assert chunks_to_compute([1, 4, 7], 0, 3) in ([4], [7])


def test_values_that_are_not_finite_are_refused(data: ImageDataModule, tmp_path: Path) -> None:
    net = bare_backbone("timm/test_resnet", "none", image_size=SIZE)
    parameter = next(net.backbone.parameters())
    parameter.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"features of .*\.jpg are not finite"):
        extracted(net, data, tmp_path / "a", None)


def test_a_damaged_chunk_is_computed_again(
    net: Classifier, data: ImageDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.array(extracted(net, data, tmp_path / "a", tmp_path / "bucket").values)
    (chunk,) = (tmp_path / "bucket").rglob("*.safetensors")
    content = bytearray(chunk.read_bytes())
    content[-100] ^= 1
    chunk.write_bytes(content)
    chunks = computed_chunks(monkeypatch)
    assert np.array_equal(extracted(net, data, tmp_path / "b", tmp_path / "bucket").values, whole)
    assert chunks == [("train", 0)]


def test_augmented_variants(net: Classifier, data: ImageDataModule, tmp_path: Path) -> None:
    data.augment, data.augment_views = v2.RandomResizedCrop(SIZE), 3
    features = extracted(net, data, tmp_path / "a", None, "train")
    assert features.variants.shape[0] == 3
    assert not np.array_equal(features.variants[0], features.variants[1])


def test_data_without_a_readable_image(net: Classifier, tmp_path: Path) -> None:
    root = write_files(tmp_path / "images", {"a/1.jpg": b"no", "b/2.jpg": b"no"})
    index = index_parts(root)["train"]
    with pytest.raises(DataError, match="none of 2 images"):
        features_of(net, index, Preprocessing(SIZE), ExtractionSettings(tmp_path / "cache", num_workers=0))


@pytest.mark.parametrize("damage", ["shape", "cut", "header", "empty"])
def test_a_damaged_array_is_written_again(
    damage: str, net: Classifier, data: ImageDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.array(extracted(net, data, tmp_path / "node", None).values)
    (path,) = (tmp_path / "node").glob("features/*/*.npy")
    content = path.read_bytes()
    if damage == "shape":
        np.save(path, expected)
    else:
        path.write_bytes({"cut": content[:-1], "header": b"x" * len(content), "empty": b""}[damage])
    chunks = computed_chunks(monkeypatch)
    assert np.array_equal(extracted(net, data, tmp_path / "node", None).values, expected)
    assert chunks == []
    assert path.read_bytes() == content


def test_a_disk_that_fills_up_is_an_error_that_leaves_no_file(
    net: Classifier, data: ImageDataModule, tmp_path: Path
) -> None:
    """A write to a file that is mapped into memory would kill the process (SIGBUS)."""
    extracted(net, data, tmp_path / "node", None)
    (path,) = (tmp_path / "node").glob("features/*/*.npy")
    path.unlink()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot keep the backbone's features .*--data\.cache_dir"):
            extracted(net, data, tmp_path / "node", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(path.parent.glob("*.npy"))
    assert not list(path.parent.glob(".*"))


def test_room_is_made_while_other_processes_write_and_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of the node begin to write chunks while one counts; another run makes room, too."""
    mine, other, gone = (write_files(tmp_path / "features" / name, {"a": b"x" * 9, "b": b"x"}) for name in "mog")
    stat = Path.stat

    def vanishing(path: Path, **settings: bool) -> os.stat_result:
        if path in (mine / "a", gone):
            raise FileNotFoundError(path)
        return stat(path, **settings)

    monkeypatch.setattr(Path, "stat", vanishing)
    assert make_room(tmp_path, {mine}, 10, 20, "the limit") is None
    assert other.exists()
    assert make_room(tmp_path, {mine}, 10, 12, "the limit") is None
    assert mine.exists()
    assert not other.exists()


def test_an_upload_that_fails_ends_the_computation(
    net: Classifier, data: ImageDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(store: FeatureStore, chunk: int, before_write: object) -> None:
        raise StorageError("no permission")

    class Uploads(ThreadPoolExecutor):
        """Uploads that end before the next chunk is computed, however late their thread gets a CPU."""

        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            upload: Future[Any] = super().submit(*args, **kwargs)
            wait([upload], timeout=60)
            return upload

    monkeypatch.setattr("job.features.compute.ThreadPoolExecutor", Uploads)
    monkeypatch.setattr("job.features.store.CHUNK_SAMPLES", 4)
    monkeypatch.setattr(FeatureStore, "publish", refused)
    chunks = computed_chunks(monkeypatch)
    with pytest.raises(StorageError, match="no permission"):
        extracted(net, data, tmp_path / "node", tmp_path / "bucket")
    assert 1 <= len(chunks) < -(-len(data.parts["train"]) // 4)
