"""What the server costs: throughput and latency against the bare model, and a rolling restart under load.

    python benchmarks/serve.py [--backbone resnet18] [--seconds 10] [--rounds 3]

Client, server and bare model share the cores of one machine. The bare model computes prepared batches and does nothing
else; "decoding and model" also decodes and resizes, in threads, as any server must. All are measured in turn, several
times, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import job
from job.data.workers import one_core_threads
from job.predict.predictor import Predictor
from job.process.cpus import available_cpus
from job.serve.images import prepare

CLIENTS = 32
BATCH = 32
PICTURES = 64
PACKAGES = ("torch", "torchvision", "fastapi", "starlette", "uvicorn", "h11", "msgspec", "prometheus_client")


def pictures(size: tuple[int, int] = (500, 375)) -> list[bytes]:
    """JPEG files with some structure."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(PICTURES):
        small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def make_run(folder: Path, backbone: str) -> Path:
    """A run with a network of random weights."""
    for number, content in enumerate(pictures((64, 64))[:8]):
        path = folder / "images" / ("a" if number % 2 else "b") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    job.fit(
        {
            "run_dir": folder / "run",
            "data": {"root": folder / "images", "global_batch_size": 4},
            "model": {"backbone": backbone, "weights": "none"},
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true"},
        }
    )
    return folder / "run"


@contextlib.contextmanager
def server(run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server that is ready; yields its process and port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "job", "serve", str(run), "--port=0", "--log=text", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    port = int(process.stdout.readline().rpartition("http://localhost:")[2].split()[0])
    try:
        while not asyncio.run(answers(port)):
            time.sleep(0.2)
        yield process, port
    finally:
        process.kill()
        process.wait()


async def answers(port: int) -> bool:
    """Whether a server is ready."""
    try:
        client = await Client.connect(port)
        return await client.get("/v2/health/ready") == 200
    except OSError:
        return False


class Client:
    """A connection that stays open. Its requests are bytes that were made before."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        """A new connection."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, request: bytes) -> int:
        """Send a request and read its answer; returns the status."""
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        await self.reader.readexactly(length)
        if b"connection: close" in head:
            self.writer.close()
        return int(head.split()[1])

    async def get(self, path: str) -> int:
        """Status of a GET request."""
        return await self.send(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())


def batches(port: int) -> tuple[float, float]:
    """Images and batches that the server has computed."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("job_serve_batch_size_"))
    return float(values["job_serve_batch_size_sum"]), float(values["job_serve_batch_size_count"])


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def request_of(image: bytes) -> bytes:
    """An upload of one image file."""
    head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: {len(image)}\r\n\r\n"
    return head.encode() + image


async def closed_loop(port: int, clients: int, seconds: float, requests: list[bytes]) -> tuple[float, list[float]]:
    """Each client sends its next request when it has an answer; returns images per second, and latencies."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def run(number: int) -> None:
        client = await Client.connect(port)
        while (began := time.perf_counter()) < end:
            assert await client.send(requests[number % len(requests)]) == 200
            latencies.append(time.perf_counter() - began)
            number += clients
        client.writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(run(number) for number in range(clients)))
    return len(latencies) / (time.perf_counter() - began), latencies


async def open_loop(port: int, rate: float, seconds: float, requests: list[bytes]) -> list[float]:
    """Requests arrive at random moments, whether earlier ones have answers or not; returns latencies."""
    latencies: list[float] = []
    generator = np.random.default_rng(0)
    idle: list[Client] = []

    async def one(request: bytes) -> None:
        began = time.perf_counter()
        client = idle.pop() if idle else await Client.connect(port)
        assert await client.send(request) == 200
        latencies.append(time.perf_counter() - began)
        idle.append(client)

    end, tasks = time.perf_counter() + seconds, []
    while time.perf_counter() < end:
        tasks.append(asyncio.create_task(one(requests[len(tasks) % len(requests)])))
        await asyncio.sleep(generator.exponential(1 / rate))
    await asyncio.gather(*tasks)
    return latencies


def bare(predictor: Predictor, seconds: float) -> float:
    """Images per second of prepared batches."""
    side = predictor.net.image_size
    batch = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8)
    predictor.predict_batch(batch)
    images, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        predictor.predict_batch(batch)
        images += BATCH
    return images / (time.perf_counter() - began)


def decoding_and_model(predictor: Predictor, files: list[bytes], seconds: float, pool: ThreadPoolExecutor) -> float:
    """Images per second where threads decode the next batch meanwhile."""

    def decoded(file: bytes) -> torch.Tensor:
        return prepare(file, predictor.net.image_size, predictor.resize, predictor.max_image_pixels)

    def start(number: int) -> list[object]:
        return [pool.submit(decoded, files[(number * BATCH + place) % len(files)]) for place in range(BATCH)]

    images, began, pending = 0, time.perf_counter(), start(0)
    while time.perf_counter() - began < seconds:
        batch = torch.stack([future.result() for future in pending])  # type: ignore[attr-defined]
        pending = start(images // BATCH + 1)
        predictor.predict_batch(batch)
        images += BATCH
    return images / (time.perf_counter() - began)


def single(predictor: Predictor, files: list[bytes], seconds: float) -> list[float]:
    """Latencies of ``Predictor.predict`` of one file."""
    latencies, end = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        predictor.predict(files[len(latencies) % len(files)])
        latencies.append(time.perf_counter() - began)
    return latencies


async def rolling_restart(
    processes: list[tuple[subprocess.Popen[str], int]], seconds: float, requests: list[bytes]
) -> tuple[int, int, int]:
    """Two servers behind clients that go on with the other one; the first is stopped while they send.

    Returns:
        requests with an answer, requests that had to be sent again since the connection could not be used, and
        requests that were accepted and had no answer.
    """
    answered = again = lost = 0
    end = time.perf_counter() + seconds

    async def run(number: int) -> None:
        nonlocal answered, again, lost
        target, client = number % 2, None
        while time.perf_counter() < end:
            is_begun = False
            try:
                if client is None or client.writer.is_closing():
                    client = await Client.connect(processes[target][1])
                status = await client.send(requests[number % len(requests)])
                is_begun = True
                assert status == 200, status
                answered += 1
            except ConnectionRefusedError:
                target, client, again = 1 - target, None, again + 1
            except asyncio.IncompleteReadError as error:
                client = None
                again, lost = again + (not error.partial), lost + bool(error.partial)
            except OSError:
                client, again, lost = None, again + (not is_begun), lost + is_begun
            number += 1

    async def restart() -> None:
        await asyncio.sleep(seconds / 3)
        processes[0][0].send_signal(signal.SIGTERM)

    await asyncio.gather(restart(), *(run(number) for number in range(CLIENTS)))
    return answered, again, lost


def percentile(values: list[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * float(np.quantile(values, share))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"Python {sys.version.split()[0]}", *(f"{name} {metadata.version(name)}" for name in PACKAGES), sep=", ")
    print(f"{available_cpus()} CPU core(s), {args.backbone}, {CLIENTS} clients, JPEG files of 500x375")
    files = pictures()
    requests = [request_of(file) for file in files]
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), args.backbone)
        predictor = job.load(str(run), precision="auto")
        print(f"precision {predictor.precision}")
        pool = one_core_threads(available_cpus())
        ratios, limits, p99s, halves, lone = [], [], [], [], []
        cpu_ratios, cpu_limits = [], []
        for _ in range(args.rounds):
            used = time.process_time()
            model = bare(predictor, args.seconds)
            model_cpu = model * args.seconds / (time.process_time() - used)
            used = time.process_time()
            with_decoding = decoding_and_model(predictor, files, args.seconds, pool)
            both_cpu = with_decoding * args.seconds / (time.process_time() - used)
            alone = percentile(single(predictor, files, args.seconds / 2), 0.5)
            with server(run) as (process, port):
                asyncio.run(closed_loop(port, CLIENTS, 2, requests))
                before, used = batches(port), cpu_seconds(process.pid)
                rate, latencies = asyncio.run(closed_loop(port, CLIENTS, args.seconds, requests))
                server_cpu = cpu_seconds(process.pid) - used
                images, count = (now - then for now, then in zip(batches(port), before, strict=True))
                one = percentile(asyncio.run(closed_loop(port, 1, args.seconds / 2, requests))[1], 0.5)
                half = percentile(asyncio.run(open_loop(port, rate / 2, args.seconds, requests)), 0.99)
            p99 = percentile(latencies, 0.99)
            ratios.append(rate / model)
            cpu_ratios.append(len(latencies) / server_cpu / model_cpu)
            cpu_limits.append(len(latencies) / server_cpu / both_cpu)
            limits.append(rate / with_decoding)
            p99s.append(p99 / alone)
            halves.append(half / alone)
            lone.append(one / alone)
            lines = [
                f"bare model {model:.1f} images/s, decoding and model {with_decoding:.1f}, server {rate:.1f} in "
                f"batches of {images / count:.1f} (p50 {percentile(latencies, 0.5):.0f} ms, p99 {p99:.0f} ms)",
                f"one image alone {alone:.1f} ms, by the server {one:.1f} ms; p99 at half of the load {half:.0f} ms",
                f"images per second of CPU time: bare model {model_cpu:.1f}, decoding and model {both_cpu:.1f}, server "
                f"{len(latencies) / server_cpu:.1f}",
            ]
            print(*lines, sep="\n", flush=True)
        for name, values in (
            (f"throughput with {CLIENTS} clients / bare model", ratios),
            (f"throughput with {CLIENTS} clients / decoding and model", limits),
            ("the first by CPU time of the processes, without the client's", cpu_ratios),
            ("the second by CPU time", cpu_limits),
            ("latency of one client / Predictor.predict of one file", lone),
            (f"p99 with {CLIENTS} clients / Predictor.predict of one file", p99s),
            ("p99 at half of the load, random arrivals / Predictor.predict of one file", halves),
        ):
            print(
                f"{statistics.median(values):6.2f}  {name} (of {args.rounds}: {min(values):.2f} to {max(values):.2f})"
            )
        with server(run, "--drain_delay=2") as first, server(run) as second:
            answered, again, lost = asyncio.run(rolling_restart([first, second], 3 * args.seconds, requests))
            code = first[0].wait(30)
        print(f"rolling restart: {answered} answers, {again} sent again, {lost} lost; exit code {code}")


if __name__ == "__main__":
    main()
