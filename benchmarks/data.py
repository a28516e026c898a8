"""Benchmark of data loading: images per second from disk and from a bucket.

Run it by ``make benchmark-data``. It compares the job, ImageFolder, WebDataset, LitData and MosaicML Streaming on the
same photographs, in batches of 64 at 224 px. The upper bound is decoding and resizing from memory. Peers run in their
own environment, which also contains the packages of this one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from data_contenders import divisions
from peers_env import peers_python
from PIL import Image
from rich.console import Console
from rich.table import Table

from job import storage
from job.demo.gcs_server import create_bucket, free_port, gcs_server

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "faults"))
from proxy import FaultyProxy  # noqa: E402

PEERS = ("webdataset==1.0.2", "litdata==0.2.76", "mosaicml-streaming==0.13.0", "torchcodec==0.17.0")
COPIES = 4
SHARD_IMAGES = 1000
LARGE = (1600, 1066)
LATENCIES = (0.0, 0.02, 0.1)
WORKERS = (0, 1, 2, 4)
CONTENDER_SECONDS = 240
ARCHIVE = Path(
    os.environ.get("JOB_TEST_CATS_AND_DOGS", HERE.parents[1] / "shared" / "data" / "cats_and_dogs_filtered.zip")
)


def photographs(folder: Path) -> str:
    """Write class folders of photographs, or of generated images without the archive; return a description."""
    if ARCHIVE.exists():
        with zipfile.ZipFile(ARCHIVE) as archive:
            for name in archive.namelist():
                if name.endswith(".jpg"):
                    content, (part, label, file) = archive.read(name), Path(name).parts[-3:]
                    (folder / label).mkdir(parents=True, exist_ok=True)
                    for copy in range(COPIES):
                        (folder / label / f"{copy}-{part}-{file}").write_bytes(content)
        return f"{ARCHIVE.name}, {COPIES} copies of each photograph"
    dice = np.random.default_rng(0)
    for number in range(3000 * COPIES):
        rough = dice.integers(0, 256, (9, 12, 3), np.uint8)
        path = folder / f"class{number % 2}" / f"{number % COPIES}-{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rough).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=95)
    return f"generated, {3000 * COPIES} blurred noise pictures of 500x375"


def enlarged(folder: Path, target: Path) -> None:
    """Write some of the photographs at the size of camera images."""
    for path in sorted(folder.glob("*/0-*.jpg"))[::3]:
        large = target / path.relative_to(folder)
        large.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize(LARGE, Image.Resampling.BICUBIC).save(large, quality=90)


def write_archives(folder: Path, target: Path) -> None:
    """Write the photographs as a zip and as shuffled WebDataset shards."""
    paths = sorted(folder.glob("*/*.jpg"))
    random.Random(0).shuffle(paths)
    classes = sorted({path.parent.name for path in paths})
    with zipfile.ZipFile(target / "photos.zip", "w") as archive:
        for path in paths:
            archive.write(path, str(path.relative_to(folder)))
    for shard in range(0, len(paths), SHARD_IMAGES):
        with tarfile.open(target / f"photos-{shard // SHARD_IMAGES:06d}.tar", "w") as tar:
            for number, path in enumerate(paths[shard : shard + SHARD_IMAGES], shard):
                label = str(classes.index(path.parent.name)).encode()
                for name, content in ((f"{number:08d}.jpg", path.read_bytes()), (f"{number:08d}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def upload(data: Path) -> None:
    """Upload the data sets to the bucket."""
    create_bucket("gs://photos")
    fs, _ = storage.filesystem("gs://photos")
    for path in (data / "photos.zip", *data.glob("photos-*.tar")):
        fs.put_file(str(path), f"photos/{path.name}")
    fs.put(str(data / "litdata") + "/", "photos/litdata/", recursive=True)
    # Small objects are slow to upload: one copy of each photograph.
    ones = data.glob("folder/*/0-*.jpg")
    storage.write_many(
        "gs://photos/folder", {str(path.relative_to(data / "folder")): path.read_bytes() for path in ones}
    )


class Measured(NamedTuple):
    """Images per second in the two epochs of a contender, and its peak memory."""

    first: float
    second: float
    megabytes: float


def run(python: Path | str, name: str, uri: object, argument: object) -> Measured | None:
    """Run a contender; if it fails, print the last line of its output and return None."""
    line = [str(python), str(HERE / "data_contenders.py"), name, str(uri), str(argument)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
    peak, deadline = 0.0, time.monotonic() + CONTENDER_SECONDS
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment, start_new_session=True)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
            peak = max(peak, resident_megabytes(process.pid))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = log.read().splitlines()
    results = [text.removeprefix("RESULT ") for text in lines if text.startswith("RESULT ")]
    if not results:
        print(f"{name} on {uri} failed: {lines[-1:]}", file=sys.stderr)
        return None
    speeds = json.loads(results[0]) or (0.0, 0.0)
    return Measured(speeds[0], speeds[1], peak)


def resident_megabytes(pid: int) -> float:
    """Memory of a process and its descendants; shared pages count once."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    processes, total = [pid], 0
    for process in processes:
        processes += [child for child, parent in parents.items() if parent == process]
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


@dataclass(frozen=True)
class Contest:
    """Contenders on one kind of data; the first is the upper bound of the others."""

    title: str
    entries: list[tuple[str, str, Path | str, str, object]]

    def table(self, workers: int, only: str) -> Table:
        """Run the contenders."""
        table = Table(title=f"{self.title}; {workers} workers", title_justify="left")
        for column in ("contender", "place", "epoch 1", "epoch 2", "memory", "of limit"):
            table.add_column(column, justify="left" if column in ("contender", "place") else "right")
        limit = 0.0
        for title, place, python, name, uri in self.entries:
            if only not in f"{title} {place}" and limit:
                continue
            result = run(python, name, uri, workers)
            if result is None:
                table.add_row(title, place, "failed")
                continue
            limit = limit or result.first
            cells = (
                f"{result.first:,.0f}",
                f"{result.second:,.0f}",
                f"{result.megabytes:,.0f} MB",
                f"{result.second / limit:.2f}",
            )
            table.add_row(title, place, *cells)
            print(title, place, *cells, file=sys.stderr, flush=True)
        return table


def contests(data: Path, source: str, peers: Path, server: str) -> list[Contest]:
    """Contests on the photographs, from disk and bucket, and on large ones, from disk."""
    here = sys.executable
    last = len(list(data.glob("photos-*.tar"))) - 1
    shards = f"photos-{{000000..{last:06d}}}.tar"
    web = f"{server}/download/storage/v1/b/photos/o/{shards}?alt=media"
    limit = "limit: decode + resize"
    return [
        Contest(
            f"{source}, images/s",
            [
                (limit, "memory", here, "limit", data / "folder"),
                ("tutorial: ImageFolder", "disk, folder", here, "tutorial", data / "folder"),
                ("WebDataset", "disk, shards", peers, "webdataset", data / shards),
                ("LitData", "disk, chunks", peers, "litdata", data / "litdata"),
                ("MosaicML Streaming", "disk, MDS", peers, "mosaicml", data / "mosaicml"),
                ("job", "disk, folder", here, "job", data / "folder"),
                ("job", "disk, zip", here, "job", data / "photos.zip"),
                ("job", "disk, shards", here, "job", data / shards),
                ("WebDataset", "bucket, shards", peers, "webdataset", web),
                ("LitData", "bucket, chunks", peers, "litdata", "gs://photos/litdata"),
                ("job", "bucket, folder", here, "job", "gs://photos/folder"),
                ("job", "bucket, zip", here, "job", "gs://photos/photos.zip"),
                ("job", "bucket, shards", here, "job", f"gs://photos/{shards}"),
                ("job, no cache", "bucket, shards", here, "uncached", f"gs://photos/{shards}"),
            ],
        ),
        Contest(
            f"1,000 of them enlarged to {LARGE[0]}x{LARGE[1]}, images/s",
            [
                (limit, "memory", here, "limit", data / "large"),
                ("tutorial: ImageFolder", "disk, folder", here, "tutorial", data / "large"),
                ("LitData", "disk, chunks", peers, "litdata", data / "large-litdata"),
                ("MosaicML Streaming", "disk, MDS", peers, "mosaicml", data / "large-mosaicml"),
                ("job", "disk, folder", here, "job", data / "large"),
            ],
        ),
    ]


def decoder_table(data: Path, peers: Path) -> Table:
    """Microseconds of CPU time per JPEG at its full size, by decoder."""
    table = Table(title="JPEG to RGB pixels, µs of CPU time per photograph", title_justify="left")
    table.add_column("decoder")
    speeds: dict[str, list[str]] = {}
    for folder in ("folder", "large"):
        table.add_column(folder, justify="right")
        for decoder in ("simplejpeg", "torchvision", "torchcodec", "pillow"):
            result = run(peers, f"decoder-{decoder}", data / folder, 1)
            speeds.setdefault(decoder, []).append("failed" if result is None else f"{1e6 / result.first:,.0f}")
    for decoder, cells in speeds.items():
        table.add_row(decoder, *cells)
    return table


def division_table(folder: Path, workers: int) -> Table:
    """Speed of the job by how its workers are divided into processes and threads, beside the upper bound."""
    table = Table(title=f"job from disk, {workers} workers, images/s in epoch 2", title_justify="left")
    speeds = []
    for processes, threads in divisions(workers):
        table.add_column(f"{processes} processes of {threads}" if processes else "threads", justify="right")
        result = run(sys.executable, f"divided-{processes}x{threads}", folder, workers)
        speeds.append("failed" if result is None else f"{result.second:,.0f}")
    limit = run(sys.executable, "limit", folder, workers)
    table.add_column("limit", justify="right")
    table.add_row(*speeds, "failed" if limit is None else f"{limit.second:,.0f}")
    return table


def latency_table(shards: str, workers: int) -> Table:
    """Speed of the job with a proxy that delays each request."""
    table = Table(title="bucket with delayed requests, images/s in epoch 1", title_justify="left")
    for column in ("place", *(f"{seconds * 1000:.0f} ms" for seconds in LATENCIES)):
        table.add_column(column, justify="right")
    proxy = FaultyProxy(os.environ["STORAGE_EMULATOR_HOST"], free_port())
    storage.use_gcs_emulator(proxy.url)
    for place, uri in (("folder", "gs://photos/folder"), ("shards", shards)):
        speeds = []
        for seconds in LATENCIES:
            proxy.delay = lambda request, seconds=seconds: seconds  # type: ignore[misc]
            result = run(sys.executable, "uncached", uri, workers)
            speeds.append("failed" if result is None else f"{result.first:,.0f}")
        table.add_row(place, *speeds)
    proxy.stop()
    return table


def main() -> None:
    """Write the data, run the contenders, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers_env", type=Path, default=HERE.parent / ".bench" / "peers")
    parser.add_argument(
        "--only", default="", help="run only contenders and places whose name contains this, and the upper bound"
    )
    options = parser.parse_args()
    peers = peers_python(options.peers_env, PEERS)
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as scratch, gcs_server(Path(scratch) / "buckets") as server:
        data = Path(scratch) / "data"
        source = photographs(data / "folder")
        enlarged(data / "folder", data / "large")
        write_archives(data / "folder", data)
        for folder in ("folder", "large"):
            for name in ("litdata", "mosaicml"):
                target = data / (name if folder == "folder" else f"large-{name}")
                run(peers, f"write-{name}", data / folder, target)
        upload(data)
        for contest in contests(data, source, peers, server):
            console.print(contest.table(options.workers, options.only))
        console.print(decoder_table(data, peers))
        table = Table(title="job from disk by number of workers, images/s in epoch 2", title_justify="left")
        speeds = []
        for workers in WORKERS:
            table.add_column(str(workers), justify="right")
            result = run(sys.executable, "job", data / "folder", workers)
            speeds.append("failed" if result is None else f"{result.second:,.0f}")
        table.add_row(*speeds)
        console.print(table)
        console.print(division_table(data / "folder", options.workers))
        last = len(list(data.glob("photos-*.tar"))) - 1
        console.print(latency_table(f"gs://photos/photos-{{000000..{last:06d}}}.tar", options.workers))
    names = ("torch", "torchvision", "simplejpeg", "pillow", "gcsfs")
    console.print(", ".join([*(f"{n} {version(n)}" for n in names), *PEERS]), highlight=False)


if __name__ == "__main__":
    main()
