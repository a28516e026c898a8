"""Contenders of benchmarks/data.py: read a data set for two epochs, and print the speed of each as JSON.

Called as ``python data_contenders.py NAME URI WORKERS``; peers run in their own environment.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

IMAGE_SIZE = 224
BATCH_SIZE = 64
EPOCHS = 2
DECODED = 500
"""Photographs in the comparison of decoders."""


def measured(epochs: Iterable[Callable[[], Iterator[int]]], began: float) -> list[float]:
    """Images per second of each epoch: the first one from ``began``, before the data set is indexed or opened.

    Worker processes start in the first epoch, and stay for the second. Files are in the page cache.
    """
    speeds = []
    for epoch in epochs:
        images = sum(epoch())
        ended = time.monotonic()
        speeds.append(images / (ended - began))
        began = ended
    return speeds


def batch_sizes(loader: Iterable[Any], image: int | str = 0) -> Iterator[int]:
    """Yield the number of images in each batch, after reading one pixel."""
    for batch in loader:
        batch[image][0, 0, 0, 0].item()
        yield len(batch[image])


def uncached(uri: str, workers: int) -> list[float]:
    """The job without a cache on the node's disk."""
    return job_loader(uri, workers, cache_gb=0)


def job_loader(uri: str, workers: int, cache_gb: float = 10) -> list[float]:
    """The job's training loader."""
    from job.data.datamodule import ImageDataModule

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        data = ImageDataModule(
            root=uri,
            global_batch_size=BATCH_SIZE,
            image_size=IMAGE_SIZE,
            num_workers=workers,
            cache_dir=folder,
            cache_gb=cache_gb,
            val_fraction=0.001,
        )
        data.setup("fit")
        loader = data.train_dataloader()

        def epochs() -> Iterator[Callable[[], Iterator[int]]]:
            for number in range(EPOCHS):
                loader.sampler.set_epoch(number)
                yield lambda: batch_sizes(loader, "image")

        return measured(epochs(), began)


def divisions(workers: int) -> list[tuple[int, int]]:
    """Ways to divide workers into (processes, threads of each); 0 processes: threads of the training process."""
    return [(0, workers), *((workers // threads, threads) for threads in (4, 2, 1) if workers % threads == 0)]


def divided(name: str) -> Callable[[str, int], list[float]]:
    """The job's training loader by a number of processes of so many threads each; 0: by threads of this process.

    Args:
        name: for example divided-4x2: 4 processes of 2 threads.
    """
    from job.data import loader
    from job.data.workers import Workers

    processes, threads = map(int, name.removeprefix("divided-").split("x"))
    loader.divide = lambda *_, **__: Workers(processes, threads)
    return lambda uri, _: job_loader(uri, max(processes, 1) * threads)


def limit(uri: str, workers: int) -> list[float]:
    """Decoding and resizing from memory: the upper bound of a loader with as many processes."""
    import multiprocessing

    jpegs = [path.read_bytes() for path in Path(uri).glob("*/*.jpg")]
    results = multiprocessing.Queue()

    def work(part: list[bytes]) -> None:
        from job.data.dataset import Preprocessing

        torch.set_num_threads(1)
        preprocessing = Preprocessing(IMAGE_SIZE, flip=True)
        for content in part[:50]:
            preprocessing.pixels(preprocessing.decoded(content), 1, 1)
        began = time.monotonic()
        for content in part:
            preprocessing.pixels(preprocessing.decoded(content), 1, 1)
        results.put(len(part) / (time.monotonic() - began))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(jpegs[n::workers],)) for n in range(workers)]
    for process in processes:
        process.start()
    speed = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    return [speed, speed]


def tutorial(uri: str, workers: int) -> list[float]:
    """torchvision's ImageFolder and DataLoader: Pillow, resize, flip, convert to float, normalise."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    began = time.monotonic()
    transform = transforms.Compose(
        [
            transforms.Resize((IMAGE_SIZE, IMAGE_SIZE)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    loader = DataLoader(
        ImageFolder(uri, transform), BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=True
    )
    return measured([lambda: batch_sizes(loader)] * EPOCHS, began)


def decoder(name: str, uri: str) -> list[float]:
    """Photographs per second of CPU time that one thread decodes from memory, at their full size."""
    import io

    import simplejpeg
    from PIL import Image

    def torchcodec(content: bytes) -> torch.Tensor:
        from torchcodec.decoders import decode_jpeg

        return decode_jpeg(content, mode="RGB")

    decode: dict[str, Callable[[bytes], Any]] = {
        "simplejpeg": lambda content: simplejpeg.decode_jpeg(content, "RGB", False, False),
        "torchvision": _decoded,
        "torchcodec": torchcodec,
        "pillow": lambda content: Image.open(io.BytesIO(content)).convert("RGB").load(),
    }
    paths = itertools.islice(Path(uri).glob("*/0-*.jpg"), DECODED)
    contents = [path.read_bytes() for path in paths]
    for content in contents[:20]:
        decode[name](content)
    began = time.process_time()
    for content in contents:
        decode[name](content)
    return [len(contents) / (time.process_time() - began)] * EPOCHS


def _peers_transform() -> v2.Transform:
    """torchvision's fastest transforms, from uint8 to uint8, without normalisation, as in the job."""
    return v2.Compose([v2.Resize([IMAGE_SIZE, IMAGE_SIZE], antialias=True), v2.RandomHorizontalFlip()])


def _decoded(content: bytes) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)


def webdataset(uri: str, workers: int) -> list[float]:
    """WebDataset shards, shuffled by shard and in a buffer, batched in the workers as its documentation recommends."""
    import webdataset as wds

    began = time.monotonic()
    transform = _peers_transform()
    urls = f"pipe:curl -s -f {uri}" if uri.startswith("http") else uri
    dataset = (
        wds.WebDataset(urls, shardshuffle=100, nodesplitter=None, empty_check=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(lambda c: transform(_decoded(c)), int)
        .batched(BATCH_SIZE, partial=True)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True)
    return measured([lambda: batch_sizes(loader)] * EPOCHS, began)


def litdata(uri: str, workers: int) -> list[float]:
    """LitData chunks of JPEG content, its StreamingDataLoader, decoded by torchvision."""
    from litdata import StreamingDataLoader, StreamingDataset

    began = time.monotonic()
    transform = _peers_transform()

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
            content, label = super().__getitem__(index)
            return transform(_decoded(content)), label

    options = {"storage_options": {"project": "benchmark"}} if uri.startswith("gs://") else {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = Images(uri, shuffle=True, drop_last=False, cache_dir=folder, max_cache_size="50GB", **options)
        loader = StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=workers, persistent_workers=True)
        return measured([lambda: batch_sizes(loader)] * EPOCHS, began)


def mosaicml(uri: str, workers: int) -> list[float]:
    """MosaicML MDS shards, its StreamingDataset with the default shuffle."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    began = time.monotonic()
    transform = _peers_transform()

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(index)
            return transform(_decoded(sample["jpg"])), sample["label"]

    dataset = Images(local=uri, shuffle=True, batch_size=BATCH_SIZE)
    loader = DataLoader(dataset, BATCH_SIZE, num_workers=workers, persistent_workers=True)
    return measured([lambda: batch_sizes(loader)] * EPOCHS, began)


def write_litdata(folder: str, target: str) -> None:
    """Convert class folders."""
    from litdata.streaming.cache import Cache

    cache = Cache(target, chunk_bytes="64MB")
    for number, (content, label) in enumerate(_samples(folder)):
        cache[number] = (content, label)
    cache.done()
    cache.merge(1)


def write_mosaicml(folder: str, target: str) -> None:
    """Convert class folders."""
    from streaming import MDSWriter

    with MDSWriter(out=target, columns={"jpg": "bytes", "label": "int"}) as writer:
        for content, label in _samples(folder):
            writer.write({"jpg": content, "label": label})


def _samples(folder: str) -> Iterator[tuple[bytes, int]]:
    classes = sorted(path.name for path in Path(folder).iterdir())
    for path in sorted(Path(folder).glob("*/*.jpg"), key=lambda path: path.name[::-1]):
        yield path.read_bytes(), classes.index(path.parent.name)


CONTENDERS: dict[str, Callable[[str, int], list[float]]] = {
    "job": job_loader,
    "uncached": uncached,
    "limit": limit,
    "tutorial": tutorial,
    "webdataset": webdataset,
    "litdata": litdata,
    "mosaicml": mosaicml,
    "decoder-simplejpeg": lambda uri, _: decoder("simplejpeg", uri),
    "decoder-torchvision": lambda uri, _: decoder("torchvision", uri),
    "decoder-torchcodec": lambda uri, _: decoder("torchcodec", uri),
    "decoder-pillow": lambda uri, _: decoder("pillow", uri),
}
WRITERS = {"write-litdata": write_litdata, "write-mosaicml": write_mosaicml}

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, uri, argument = sys.argv[1:]
    contender = divided(name) if name.startswith("divided-") else CONTENDERS.get(name)
    result = WRITERS[name](uri, argument) if contender is None else contender(uri, int(argument))
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)  # some loaders leave threads that never end
