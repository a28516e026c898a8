from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import index_of, picture, write_files
from torchvision.transforms import v2

from job.data.augment import ResizeMode, resize, resize_into
from job.data.dataset import ImageDataset, Preprocessing
from job.data.sampler import BatchIndices, FeatureBatchSampler, ResumableBatchSampler
from job.errors import ConfigError, DataError


class InvertInPlace(v2.Transform):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.sub_(255).neg_()


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(16, flip=True),
        Preprocessing(16, augment=v2.Compose([v2.Resize([16, 16]), v2.RandomHorizontalFlip(), v2.RandomRotation(20)])),
    ],
    ids=["default", "given"],
)
def test_augmentation_depends_on_seed_epoch_and_sample_alone(preprocessing: Preprocessing, colours: Path) -> None:
    index = index_of(colours)

    def images(world_size: int, seed: int = 3, epoch: int = 1) -> dict[int, torch.Tensor]:
        images_by_sample = {}
        for rank in range(world_size):
            sampler = ResumableBatchSampler(len(index), 8, rank=rank, world_size=world_size, seed=0, shuffle=True)
            sampler.set_epoch(epoch)
            dataset = ImageDataset(index, sampler, preprocessing, seed=seed)
            for plan in sampler:
                batch = dataset[plan]
                images_by_sample.update(zip(batch["sample"].tolist(), batch["image"], strict=True))
        return images_by_sample

    torch.manual_seed(1)
    first = images(1)
    torch.manual_seed(2)
    assert all(torch.equal(image, first[sample]) for sample, image in images(4).items())
    assert any(not torch.equal(image, first[sample]) for sample, image in images(1, seed=4).items())
    assert any(not torch.equal(image, first[sample]) for sample, image in images(1, epoch=2).items())


def test_reading_does_not_change_the_random_generators(colours: Path) -> None:
    preprocessing = Preprocessing(16, augment=v2.RandomCrop(16, pad_if_needed=True))
    sampler = ResumableBatchSampler(40, 8, rank=0, world_size=1, seed=0, shuffle=True)
    dataset = ImageDataset(index_of(colours), sampler, preprocessing)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[sampler.batch(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_a_repeated_image_is_not_changed_by_a_transform_in_place(colours: Path) -> None:
    """Balanced sampling repeats an image within a batch, whose rows are spread over ranks."""
    preprocessing = Preprocessing(16, augment=v2.Compose([InvertInPlace(), v2.Resize([16, 16])]))
    sampler = ResumableBatchSampler(40, 3, rank=0, world_size=1, seed=0, shuffle=False)
    twice = BatchIndices(
        0, 0, np.array([5, 5, 6]), np.ones(3, np.bool_), 3, repeats=np.array([0, 1, 0], dtype=np.int64)
    )
    images = ImageDataset(index_of(colours), sampler, preprocessing)[twice]["image"]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_an_unreadable_sample_is_masked_and_reported(tmp_path: Path) -> None:
    files = {f"{c}/{n}.jpg": picture((9, 9, 9), n) for c in "ab" for n in range(2)}
    write_files(tmp_path, {**files, "a/1.jpg": b"no image"})
    sampler = ResumableBatchSampler(4, 4, rank=0, world_size=1, seed=0, shuffle=False)
    batch = ImageDataset(index_of(tmp_path), sampler, Preprocessing(8, "crop"))[sampler.batch(0, 0)]
    assert batch["mask"].tolist() == [True, False, True, True]
    assert batch["bad"][0].line.startswith(f"{tmp_path}/a/1.jpg is no image")


def test_an_augmentation_of_the_wrong_shape_is_refused(colours: Path) -> None:
    preprocessing = Preprocessing(16, augment=v2.Resize([9, 9]))
    sampler = ResumableBatchSampler(40, 4, rank=0, world_size=1, seed=0, shuffle=False)
    batch = ImageDataset(index_of(colours), sampler, preprocessing)[sampler.batch(0, 0)]
    assert isinstance(batch["error"], ConfigError)
    assert "--data.augment returned" in str(batch["error"])
    with pytest.raises(ConfigError, match=r"--data\.augment"):
        preprocessing.pixels(preprocessing.decoded(picture((1, 2, 3), 0)), 0, 0)


@pytest.mark.parametrize("transform", [v2.RandAugment(), v2.TrivialAugmentWide(), v2.RandomErasing(p=1.0)])
def test_torchvisions_own_policies(transform: v2.Transform, colours: Path) -> None:
    """Augmentation depends on the seed alone, and differs between samples."""
    preprocessing = Preprocessing(16, augment=v2.Compose([v2.Resize([16, 16]), transform]))
    sampler = ResumableBatchSampler(40, 40, rank=0, world_size=1, seed=0, shuffle=False)
    batch = ImageDataset(index_of(colours), sampler, preprocessing)[sampler.batch(0, 0)]
    assert batch["error"] is None
    reread = ImageDataset(index_of(colours), sampler, preprocessing)[sampler.batch(0, 0)]
    assert torch.equal(batch["image"], reread["image"])
    other = ImageDataset(index_of(colours), sampler, preprocessing)[sampler.batch(1, 0)]
    assert not torch.equal(batch["image"], other["image"])


def test_resizing_is_torchvisions() -> None:
    image = torch.randint(0, 256, (3, 50, 80), dtype=torch.uint8)
    assert torch.equal(resize(image, 32, "squash"), v2.functional.resize(image, [32, 32], antialias=True))
    assert resize(image, 32, "crop").shape == (3, 32, 32)


@pytest.mark.parametrize("shape", [(30, 2200), (2300, 31), (1, 300), (300, 1), (3, 1000), (700, 46_000), (40, 2561)])
@pytest.mark.parametrize("size", [16, 33, 64])
def test_a_narrow_image_is_cropped_before_it_is_resized(shape: tuple[int, int], size: int) -> None:
    """The result equals resizing first, up to rounding, at the cost of the output's size."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)).permute(2, 0, 1)
    resized = resize(image, size, "crop")
    expected = v2.functional.center_crop(v2.functional.resize(image, [size], antialias=True), [size, size])
    assert resized.shape == expected.shape
    assert (resized.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(3, 1, 5000), (3, 5000, 1), (3, 1, 20_000_000)])
def test_the_narrowest_images_cost_no_more_than_their_output(mode: ResizeMode, shape: tuple[int, ...]) -> None:
    image = torch.full((shape[1], shape[2], 3), 7, dtype=torch.uint8).permute(2, 0, 1)
    began = time.process_time()
    resized = resize(image, 224, mode)
    assert time.process_time() - began < 2
    assert resized.shape == (3, 224, 224)
    assert resized.unique().tolist() == [7]


def test_squashing_a_very_long_image_keeps_its_order() -> None:
    ramp = (torch.arange(200_000) * 256 // 200_000).to(torch.uint8)
    resized = resize(ramp.repeat(3, 2, 1), 32, "squash")[0, 0]
    assert (resized.int() - (torch.arange(32) * 8 + 3.5)).abs().max() <= 2


def test_cached_features_of_earlier_releases_are_found() -> None:
    """The folder's name is a hash of this text."""
    assert Preprocessing(16, "crop", flip=True).cache_key == (
        "View(image_size=16, resize='crop', augment=None, augment_views=None, flip=True)"
    )
    assert Preprocessing(16, max_image_pixels=9).cache_key != Preprocessing(16).cache_key


def test_a_limit_of_pixels_makes_a_bad_sample() -> None:
    content = picture((1, 2, 3), 0, (40, 32))
    assert Preprocessing(16, max_image_pixels=1280).decoded(content).shape == (3, 16, 16)
    for augment in (None, v2.Resize([16, 16])):
        with pytest.raises(DataError, match="40 x 32 pixels, more than max_image_pixels"):
            Preprocessing(16, augment=augment, max_image_pixels=1279).decoded(content)


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "size", [(50, 80), (80, 50), (32, 32), (32, 64), (64, 31), (1, 1), (1, 9), (7, 1000), (70_000, 2)]
)
def test_resizing_into_a_batch_gives_the_same_bytes(size: tuple[int, int], flip: bool, mode: ResizeMode) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    batch = torch.zeros(3, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    resize_into(batch[1:2], pixels, mode, flip=flip)
    resized = resize(torch.from_numpy(pixels).permute(2, 0, 1), 32, mode)
    assert torch.equal(batch[1], resized.flip(2) if flip else resized)
    assert not batch[0].any()
    assert not batch[2].any()


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("augment", [None, v2.Resize([24, 24])], ids=["default", "given"])
def test_a_batch_holds_what_each_file_gives_alone(
    augment: v2.Transform | None, mode: ResizeMode, tmp_path: Path
) -> None:
    """Of each format, colour mode and orientation, in variants that follow each other."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 4), np.uint8)
    image, exif = Image.fromarray(pixels, "RGBA"), Image.Exif()
    exif[0x0112] = 6
    options: dict[str, dict[str, Any]] = {"jpg": {"exif": exif, "quality": 90}, "webp": {"lossless": True}}
    for extension in ("png", "jpg", "webp", "gif", "bmp", "tif", "avif"):
        for number, colours in enumerate(("RGB", "L")):
            (tmp_path / "a").mkdir(exist_ok=True)
            path = tmp_path / "a" / f"{extension}{number}.{extension}"
            image.convert(colours).save(path, **options.get(extension, {}))
    index = index_of(tmp_path, layout="classes")
    preprocessing = Preprocessing(24, mode, augment=augment, augment_views=2 if augment else None, flip=True)
    sampler = FeatureBatchSampler([range(len(index))], 2, 5)
    rows = 0
    for number in range(len(sampler)):
        batch = ImageDataset(index, sampler, preprocessing)[sampler.batch(0, number)]
        assert batch["bad"] == []
        for row, sample in enumerate(batch["sample"].tolist()):
            variant = (5 * number + row) % 2
            content = Path(index.uri(sample)).read_bytes()
            alone = preprocessing.pixels(preprocessing.decoded(content), variant, 0)
            assert not batch["mask"][row] or torch.equal(batch["image"][row], alone)
            rows += int(batch["mask"][row])
    assert rows == 28
