"""Images a second from disk and from a bucket: ours, the tutorial's way, WebDataset, LitData, MosaicML Streaming.

Run it by ``make benchmark-data``. All read the same photographs and give batches of 64 at 224 px; the
limit is decoding and resizing alone, from memory. Peers run in an environment of their own on top of this one's.
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
from PIL import Image
from rich.console import Console
from rich.table import Table

from job import storage
from job.demo.gcs_server import create_bucket, free_port, gcs_server

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "faults"))
from proxy import FaultyProxy  # noqa: E402

PEERS = ("webdataset==1.0.2", "litdata==0.2.76", "mosaicml-streaming==0.13.0")
COPIES = 4
SHARD_IMAGES = 1000
LARGE = (1600, 1066)
LATENCIES = (0.0, 0.02, 0.1)
WORKERS = (0, 1, 2, 4)
CONTENDER_SECONDS = 120
ARCHIVE = Path(
    os.environ.get("JOB_TEST_CATS_AND_DOGS", HERE.parents[1] / "shared" / "data" / "cats_and_dogs_filtered.zip")
)


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment: this one's packages, and theirs on top."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "ours.pth").write_text(ours + "\n")
        quiet = ["--quiet", "--disable-pip-version-check"]
        subprocess.run([python, "-m", "pip", "install", *quiet, *PEERS], check=True)
        (folder / "installed").touch()
    return python


def photographs(folder: Path) -> str:
    """Class folders of real photographs, several copies of each; or, without the archive, of generated ones."""
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
    """Some of them at the size that cameras give."""
    for path in sorted(folder.glob("*/0-*.jpg"))[::3]:
        large = target / path.relative_to(folder)
        large.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize(LARGE, Image.Resampling.BICUBIC).save(large, quality=90)


def write_archives(folder: Path, target: Path) -> None:
    """The same photographs as a zip and as WebDataset shards, shuffled as shards are."""
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
    """What is read from the bucket."""
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
    """What a contender did: images a second in its two epochs, and the most MB of memory that it had."""

    first: float
    second: float
    megabytes: float


def run(python: Path | str, name: str, uri: object, argument: object) -> Measured | None:
    """What a contender measured; None, and its last words on the terminal, if it failed."""
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
        words = log.read().splitlines()
    results = [text.removeprefix("RESULT ") for text in words if text.startswith("RESULT ")]
    if not results:
        print(f"{name} on {uri} failed: {words[-1:]}", file=sys.stderr)
        return None
    speeds = json.loads(results[0]) or (0.0, 0.0)
    return Measured(speeds[0], speeds[1], peak)


def resident_megabytes(pid: int) -> float:
    """Memory of a process and all below it, shared pages counted once."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, total = [pid], 0
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


@dataclass(frozen=True)
class Contest:
    """Contenders on one kind of data; the first is the limit that the others are held against."""

    title: str
    entries: list[tuple[str, str, Path | str, str, object]]

    def table(self, workers: int, only: str) -> Table:
        """Run all of them."""
        table = Table(title=f"{self.title}; {workers} workers", title_justify="left")
        for column in ("contender", "place", "epoch 1", "epoch 2", "memory", "of the limit"):
            table.add_column(column, justify="left" if column in ("contender", "place") else "right")
        most = 0.0
        for title, place, python, name, uri in self.entries:
            if only not in f"{title} {place}" and most:
                continue
            told = run(python, name, uri, workers)
            if told is None:
                table.add_row(title, place, "failed")
                continue
            most = most or told.first
            shown = (
                f"{told.first:,.0f}",
                f"{told.second:,.0f}",
                f"{told.megabytes:,.0f} MB",
                f"{told.second / most:.2f}",
            )
            table.add_row(title, place, *shown)
            print(title, place, *shown, file=sys.stderr, flush=True)
        return table


def contests(data: Path, source: str, peers: Path, server: str) -> list[Contest]:
    """Photographs as they are, from disk and bucket; and large ones, from disk."""
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
                ("ours", "disk, folder", here, "ours", data / "folder"),
                ("ours", "disk, zip", here, "ours", data / "photos.zip"),
                ("ours", "disk, shards", here, "ours", data / shards),
                ("WebDataset", "bucket, shards", peers, "webdataset", web),
                ("LitData", "bucket, chunks", peers, "litdata", "gs://photos/litdata"),
                ("ours", "bucket, folder", here, "ours", "gs://photos/folder"),
                ("ours", "bucket, zip", here, "ours", "gs://photos/photos.zip"),
                ("ours", "bucket, shards", here, "ours", f"gs://photos/{shards}"),
                ("ours, no cache", "bucket, shards", here, "uncached", f"gs://photos/{shards}"),
            ],
        ),
        Contest(
            f"1,000 of them enlarged to {LARGE[0]}x{LARGE[1]}, images/s",
            [
                (limit, "memory", here, "limit", data / "large"),
                ("tutorial: ImageFolder", "disk, folder", here, "tutorial", data / "large"),
                ("LitData", "disk, chunks", peers, "litdata", data / "large-litdata"),
                ("MosaicML Streaming", "disk, MDS", peers, "mosaicml", data / "large-mosaicml"),
                ("ours", "disk, folder", here, "ours", data / "large"),
            ],
        ),
    ]


def latency_table(shards: str, workers: int) -> Table:
    """Ours behind a proxy that holds up every request: what matters is how little is lost."""
    table = Table(title="bucket behind a proxy that holds up each request, images/s in epoch 1", title_justify="left")
    for column in ("place", *(f"{seconds * 1000:.0f} ms" for seconds in LATENCIES)):
        table.add_column(column, justify="right")
    proxy = FaultyProxy(os.environ["STORAGE_EMULATOR_HOST"], free_port())
    storage.use_gcs_emulator(proxy.url)
    for place, uri in (("folder", "gs://photos/folder"), ("shards", shards)):
        speeds = []
        for seconds in LATENCIES:
            proxy.delay = lambda request, seconds=seconds: seconds  # type: ignore[misc]
            told = run(sys.executable, "uncached", uri, workers)
            speeds.append("failed" if told is None else f"{told.first:,.0f}")
        table.add_row(place, *speeds)
    proxy.stop()
    return table


def main() -> None:
    """Prepare the data once, run every contender, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers_env", type=Path, default=HERE.parent / ".bench" / "peers")
    parser.add_argument("--only", default="", help="contenders and places whose name contains this, beside the limit")
    options = parser.parse_args()
    peers = peers_python(options.peers_env)
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
        table = Table(title="ours from disk by number of workers, images/s in epoch 2", title_justify="left")
        speeds = []
        for workers in WORKERS:
            table.add_column(str(workers), justify="right")
            told = run(sys.executable, "ours", data / "folder", workers)
            speeds.append("failed" if told is None else f"{told.second:,.0f}")
        table.add_row(*speeds)
        console.print(table)
        last = len(list(data.glob("photos-*.tar"))) - 1
        console.print(latency_table(f"gs://photos/photos-{{000000..{last:06d}}}.tar", options.workers))
    names = ("torch", "torchvision", "simplejpeg", "pillow", "gcsfs")
    console.print(", ".join([*(f"{n} {version(n)}" for n in names), *PEERS]), highlight=False)


if __name__ == "__main__":
    main()
