"""Benchmark of ``predict``: images per second against decoding and the network alone, on the same photographs.

Run it as ``python benchmarks/predict.py``. The limit is the time that decoding (in one thread per core, from files in
memory) and the bare network (one batch repeatedly) need one after the other, since both use all cores of a machine
without a GPU. CPU seconds per image are less noisy than the rate where other programs run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from job.cli import predict
from job.cli.versions import library_versions
from job.data.dataset import Preprocessing
from job.data.workers import one_core_threads
from job.model.classifier import Classifier, from_spec
from job.predict import predictor as predictors
from job.predict.precision import Precision
from job.predict.predictor import Predictor
from job.process.cpus import available_cpus

HERE = Path(__file__).parent
ARCHIVE = Path(
    os.environ.get("JOB_TEST_CATS_AND_DOGS", HERE.parents[1] / "shared" / "data" / "cats_and_dogs_filtered.zip")
)
BATCH = 64
CLASSES = 1000


def network(backbone: str, image_size: int) -> Classifier:
    """A network of random weights with as many classes as ImageNet."""
    names = [f"class {number}" for number in range(CLASSES)]
    spec = {"backbone": backbone, "classes": names, "hidden": [], "image_size": image_size}
    return from_spec({**spec, "mean": (0.5,) * 3, "std": (0.5,) * 3}).eval()


def measured(images: int, action: Callable[[], object]) -> tuple[float, float]:
    """Images per second, and CPU milliseconds per image."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return images / (time.perf_counter() - wall), 1000 * (time.process_time() - cpu) / images


def decode_all(pool: ThreadPoolExecutor, preprocessing: Preprocessing, contents: list[bytes]) -> None:
    """Decode and resize files in memory."""
    for _ in pool.map(preprocessing.decoded, contents):
        pass


def run_network(net: Classifier, precision: Precision, batches: int) -> None:
    """Compute one batch repeatedly."""
    images = torch.randint(0, 256, (BATCH, net.image_size, net.image_size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for _ in range(batches):
            net(images).softmax(dim=1)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=640)
    arguments.add_argument("--networks", nargs="+", default=["timm/test_resnet:160", "timm/tf_efficientnet_lite0:224"])
    arguments.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    options = arguments.parse_args()
    table = Table(title=f"{library_versions()}, {available_cpus()} CPUs, {CLASSES} classes")
    for column in ("network", "precision", "", "images/s", "CPU ms/image"):
        table.add_column(column, justify="right" if "/" in column else "left")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        with zipfile.ZipFile(ARCHIVE) as archive:
            names = [name for name in archive.namelist() if name.endswith(".jpg")][: options.images]
            contents = [archive.read(name) for name in names]
        for number, content in enumerate(contents):
            (folder / f"{number:05d}.jpg").write_bytes(content)
        for text in options.networks:
            backbone, _, size = text.partition(":")
            net = network(backbone, int(size))
            preprocessing = Preprocessing(int(size))
            pool = one_core_threads(available_cpus())
            for precision in options.precisions:
                run_network(net, precision, 1)
                decoding = measured(len(contents), lambda p=preprocessing, q=pool: decode_all(q, p, contents))
                batches = len(contents) // BATCH
                bare = measured(batches * BATCH, lambda n=net, p=precision, b=batches: run_network(n, p, b))
                limit = 1 / (1 / decoding[0] + 1 / bare[0]), decoding[1] + bare[1]
                rows = {"decoding": decoding, "network": bare, "limit": limit}
                for name, extra in (("folder, Parquet", {}), ("top 5", {"top_k": 5}), ("file", {"file": True})):
                    output = f"{scratch}/{size}-{precision}-{name}" + (".jsonl" if extra.pop("file", False) else "")
                    predictors.load = lambda *args, n=net, p=precision, **kwargs: Predictor(n, "squash", precision=p)
                    job = measured(len(contents), lambda o=output, e=extra: quietly(folder, o, e))
                    rows[f"job, {name}"] = job
                for name, (rate, cpu) in rows.items():
                    ratio = f"  ({limit[1] / cpu:.2f} of the limit)" if name.startswith("job") else ""
                    table.add_row(text, precision, name, f"{rate:.0f}", f"{cpu:.2f}{ratio}")
    Console(width=120).print(table)


def quietly(folder: Path, output: str, extra: dict[str, int]) -> None:
    """Run ``predict`` without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        predict.main(str(folder), run_dir="a network in memory", output=output, batch_size=BATCH, **extra)


if __name__ == "__main__":
    main()
