from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import picture, write_files
from torchvision.transforms import v2

from job.data.dataset import ImageDataset, decode, resize_transform
from job.data.index import index_class_folders
from job.data.order import BatchOrder
from job.errors import ConfigError, DataError


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


GRADIENT = Image.fromarray(
    np.stack([np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))] * 2 + [np.full((48, 64), 90, np.uint8)], axis=2)
)


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(GRADIENT, "PNG"), rgb(GRADIENT)),
        (encoded(GRADIENT, "BMP"), rgb(GRADIENT)),
        (encoded(GRADIENT, "WEBP", lossless=True), rgb(GRADIENT)),
        (encoded(GRADIENT.convert("L"), "PNG"), rgb(GRADIENT.convert("L"))),
        (encoded(GRADIENT.convert("P"), "PNG"), rgb(GRADIENT.convert("P"))),
        (encoded(GRADIENT.convert("P"), "GIF"), rgb(GRADIENT.convert("P"))),
        (encoded(GRADIENT.convert("CMYK"), "TIFF"), rgb(GRADIENT.convert("CMYK"))),
        (encoded(GRADIENT.convert("1"), "PNG"), rgb(GRADIENT.convert("1"))),
    ],
    ids=["png", "bmp", "webp", "grey", "palette", "gif", "cmyk", "bilevel"],
)
def test_every_mode_becomes_rgb(content: bytes, expected: np.ndarray) -> None:
    found = decode(content)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_jpeg_is_what_pillow_reads() -> None:
    content = encoded(GRADIENT, "JPEG", quality=90)
    assert np.array_equal(decode(content).permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(content))))


def test_sixteen_bits_are_scaled_and_transparency_is_white() -> None:
    deep = Image.fromarray((np.arange(64 * 48).reshape(48, 64) * 21).astype(np.uint16))
    found = decode(encoded(deep, "PNG"))
    assert np.array_equal(found[0].numpy(), (np.asarray(deep) >> 8).astype(np.uint8))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encoded(clear, "PNG")).unique().tolist() == [255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {5: (48, 64), 6: (48, 64), 7: (48, 64), 8: (48, 64)}.get(orientation, (64, 48))
    found = decode(encoded(GRADIENT, "JPEG", exif=exif))
    assert tuple(found.shape) == (3, upright[1], upright[0])
    rising = found.float().mean(dim=0)
    dark_first = {1: (1, 0), 2: (1, -1), 3: (1, -1), 4: (1, 0), 5: (0, 0), 6: (0, 0), 7: (0, -1), 8: (0, -1)}
    axis, end = dark_first[orientation]
    profile = rising.mean(dim=1 - axis)
    assert profile.argmin().item() in ((0, 1) if end == 0 else (len(profile) - 1, len(profile) - 2))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"hello, I am a text file", "is no image of a known format"),
        (picture((1, 2, 3), 0)[:300], "is damaged"),
        (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "decompression bomb"),
    ],
)
def test_what_is_no_image_is_refused(content: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        decode(content)


def test_augmentation_depends_on_seed_epoch_and_sample_alone(colours: Path) -> None:
    index = index_class_folders(str(colours))
    transform = v2.Compose([resize_transform(16, "squash"), v2.RandomHorizontalFlip(), v2.RandomRotation(20)])

    def images(world_size: int, seed: int = 3, epoch: int = 1) -> dict[int, torch.Tensor]:
        found = {}
        dataset = ImageDataset(index, transform, image_size=16, seed=seed)
        for rank in range(world_size):
            order = BatchOrder(len(index), 8, rank=rank, world_size=world_size, seed=0, shuffle=True)
            order.set_epoch(epoch)
            for plan in order:
                batch = dataset[plan]
                found.update(zip(batch["sample"].tolist(), batch["image"], strict=True))
        return found

    torch.manual_seed(1)
    first = images(1)
    torch.manual_seed(2)
    assert all(torch.equal(image, first[sample]) for sample, image in images(4).items())
    assert any(not torch.equal(image, first[sample]) for sample, image in images(1, seed=4).items())
    assert any(not torch.equal(image, first[sample]) for sample, image in images(1, epoch=2).items())


def test_reading_leaves_the_generators_alone(colours: Path) -> None:
    dataset = ImageDataset(index_class_folders(str(colours)), v2.RandomCrop(16, pad_if_needed=True), image_size=16)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[BatchOrder(40, 8, rank=0, world_size=1, seed=0, shuffle=True).plan(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_an_unreadable_sample_is_masked_and_named(tmp_path: Path) -> None:
    files = {f"{c}/{n}.jpg": picture((9, 9, 9), n) for c in "ab" for n in range(2)}
    write_files(tmp_path, {**files, "a/1.jpg": b"no image"})
    dataset = ImageDataset(index_class_folders(str(tmp_path)), resize_transform(8, "crop"), image_size=8)
    batch = dataset[BatchOrder(4, 4, rank=0, world_size=1, seed=0, shuffle=False).plan(0, 0)]
    assert batch["mask"].tolist() == [True, False, True, True]
    assert batch["bad"][0].startswith(f"{tmp_path}/a/1.jpg is no image")


def test_an_augmentation_of_the_wrong_shape_is_refused(colours: Path) -> None:
    dataset = ImageDataset(index_class_folders(str(colours)), v2.Resize([9, 9]), image_size=16)
    batch = dataset[BatchOrder(40, 4, rank=0, world_size=1, seed=0, shuffle=False).plan(0, 0)]
    assert "--data.augment returned" in batch["error"]
    with pytest.raises(ConfigError, match=r"--data\.augment"):
        dataset._transform(torch.zeros(3, 20, 20, dtype=torch.uint8), 0, 0)


def test_resizing_is_torchvisions() -> None:
    image = torch.randint(0, 256, (3, 50, 80), dtype=torch.uint8)
    assert torch.equal(resize_transform(32, "squash")(image), v2.functional.resize(image, [32, 32], antialias=True))
    assert resize_transform(32, "crop")(image).shape == (3, 32, 32)
