"""Speed on this device; each result has an upper bound, or a peer, measured in the same run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data_contenders import divisions
from gpu_machine import PHOTOGRAPHS, Machine, NotMeasured, needs_cuda, read_json
from support import options, scalars
from torch import Tensor, nn

from job.demo.weights import BACKBONE, efficientnet_lite0
from job.model.backbone import build_backbone, feature_width
from job.model.head import build_head

HERE = Path(__file__).parent
FEATURES_OF = ("resnet50", "efficientnet_b0", "vit_b_16")
WORKERS = (1, 2, 4, 8, 16)
IMAGES_PER_WORKER = 1500
"""Images of an epoch of the loader, per worker: more than two seconds of work."""
STEPS, WARM_UP = 30, 5
"""Timed steps of a bare loop, and warm-up steps before them."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what was measured.
        value: result of the job.
        unit: unit of value and limit.
        limit: upper bound, or result of a peer.
        limit_name: name of the limit.
        goal: required ratio of value to limit; None: no goal.
    """

    name: str
    value: float
    unit: str
    limit: float | None = None
    limit_name: str = ""
    goal: float | None = None

    @property
    def ratio(self) -> float | None:
        """Value divided by limit."""
        return self.value / self.limit if self.limit else None


def loader(machine: Machine) -> Iterator[Row]:
    """Images per second of the loader with 1 to 16 workers; limits: as many decoding processes, as many times one.

    The largest number of workers is divided into processes and threads in other ways, too.
    """
    counts = [count for count in WORKERS if count <= machine.cores][: 1 if machine.quick else None]
    one_core = _contender("limit", _class_folders(machine, 256 if machine.quick else IMAGES_PER_WORKER), 1)[0]
    for count in reversed(counts):
        folder = _class_folders(machine, 256 if machine.quick else min(count * IMAGES_PER_WORKER, PHOTOGRAPHS))
        limit, job_speed = (_contender(name, folder, count) for name in ("limit", "job"))
        name = f"loader, {count} worker(s)"
        yield Row(name, job_speed[-1], "images/s", limit[0], "decode processes")
        yield Row(name, job_speed[-1], "images/s", count * one_core, f"{count} x one decode process", 0.85)
        for processes, threads in divisions(count)[: 1 if machine.quick else None] if count == counts[-1] else ():
            speed = _contender(f"divided-{processes}x{threads}", folder, count)[-1]
            yield Row(f"loader, {processes} processes of {threads}", speed, "images/s", limit[0], "decode processes")


def features(machine: Machine) -> Iterator[Row]:
    """Images per second of computing features; limit: the bare forward pass, or decoding."""
    count = machine.cores if machine.quick else min(machine.cores, WORKERS[-1])
    reading = _contender("limit", _class_folders(machine, 256 if machine.quick else 3000), count)[0]
    for name in FEATURES_OF[: 1 if machine.quick else None]:
        forward = _bare_loop(machine, name, trains=False)
        run_dir = machine.scratch / f"features-{name}"
        changes = {"model.milestones": "[1]", "trainer.max_epochs": 1, "features.use": "always"}
        machine.run_successfully("fit", *machine.speed_settings(run_dir, name, **changes))
        report = read_json(run_dir / "report.json")
        seconds, images = report["seconds"], report["images"]
        assert isinstance(seconds, dict)
        assert isinstance(images, dict)
        pictures = 2 * images["train"] + images["val"]  # the default augmentation has two variants per image
        limit, limit_name = min((forward, "bare forward"), (reading, f"decode, {count} processes"))
        yield Row(f"features, {name}", pictures / seconds["features"], "images/s", limit, limit_name, 0.9)


def full_step(machine: Machine) -> Iterator[Row]:
    """Images per second of training resnet50; limits: the bare loop, the tutorial's script and timm's loop."""
    name = "resnet50"
    speed, busy = _trained(machine, name, "step")
    yield Row(f"all layers, {name}", speed, "images/s", _bare_loop(machine, name, trains=True), "bare loop", 0.97)
    if busy is None:
        print("GPU utilisation was not measured: nvidia-smi is missing", file=sys.stderr)
    else:
        yield Row(f"all layers, {name}: GPU busy", busy, "%", 100.0, "always", 0.95)
    yield Row(f"all layers, {name}", speed, "images/s", _tutorial(machine, name), "tutorial's script")
    yield Row(f"all layers, {name}", speed, "images/s", _timm(machine, name), "timm's loader and loop")


def host_waits(machine: Machine) -> Iterator[Row]:
    """Synchronising calls per step and per epoch, as reported by torch; their places go to stderr."""
    needs_cuda(machine, "a CPU has nothing to wait for")
    per_epoch = {}
    for batch in (16, 2):
        one, three = (_synchronising_calls(machine, batch, epochs) for epochs in (1, 3))
        per_epoch[batch] = {place: (three[place] - one[place]) / 2 for place in three}
        print(f"calls per epoch, batches of {batch}: {per_epoch[batch]}", file=sys.stderr)
    few, many = (sum(per_epoch[batch].values()) for batch in (16, 2))
    per_step = (many - few) / (32 - 4)  # 64 training images
    yield Row("host waits per step", per_step, "calls")
    yield Row("host waits per epoch besides", few - 4 * per_step, "calls")


def _synchronising_calls(machine: Machine, batch: int, epochs: int) -> Counter[str]:
    """Number of synchronising calls of a fit, by file and line."""
    changes: dict[str, object] = {"trainer.max_epochs": epochs, "trainer.log_every_n_steps": 1000}
    changes |= {"data.global_batch_size": batch, "model.milestones": "[]", "trainer.limit_val_batches": 0}
    settings = machine.settings(machine.scratch / f"waits-{batch}-{epochs}", **changes)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        machine.run_successfully("fit", *settings)
    torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{one.filename}:{one.lineno}" for one in recorded if "synchronizing" in str(one.message))


def time_to_accuracy(machine: Machine) -> Iterator[Row]:
    """Seconds from process start to 98 % accuracy on the photographs, with ImageNet's weights and a frozen backbone."""
    if machine.photos is None:
        raise NotMeasured("no photographs: give --photos")
    weights = machine.scratch / "lite0.safetensors"
    weights.write_bytes(efficientnet_lite0())
    run_dir = machine.scratch / "accuracy"
    settings: dict[str, object] = {
        "run_dir": run_dir,
        "data.root": machine.photos,
        "data.cache_dir": machine.scratch / "cache",
        "model.backbone": BACKBONE,
        "model.weights": weights,
        "model.mean": "[0.5,0.5,0.5]",
        "model.std": "[0.5,0.5,0.5]",
        "model.milestones": "[20]",
        "trainer.max_epochs": 2 if machine.quick else 20,
        "trainer.accelerator": machine.accelerator,
    }
    began = time.time()
    result = machine.run_in_process("fit", *options(settings))
    assert result.returncode == 0, result.output[-2000:]
    at = next((wall - began for value, wall in _accuracies(run_dir) if value >= 0.98), None)
    if at is None:
        raise NotMeasured(f"98 % was not reached: {max(value for value, _ in _accuracies(run_dir)):.4f}")
    yield Row("time to 98 % on the photographs, imports included", at, "s")


def checkpoint_stall(machine: Machine) -> Iterator[Row]:
    """Milliseconds for which a checkpoint to the local disk blocks training; peer: torch.save."""
    from checkpoint import background_save, state_of

    for megabytes in (4,) if machine.quick else (100, 1000):
        state = {name: value.to(machine.device) for name, value in state_of(megabytes).items()}
        began = time.monotonic()
        torch.save(state, machine.scratch / "stock.pt")
        stock = time.monotonic() - began
        stalls = background_save(state, str(machine.scratch / f"stall-{megabytes}"))
        job_stall = statistics.median(stalls[1:])
        yield Row(f"checkpoint stall, {megabytes} MB", 1000 * job_stall, "ms", 1000 * stock, "torch.save to the disk")


def compiled(machine: Machine) -> Iterator[Row]:
    """Images per second of training all layers with torch.compile; peer: without."""
    needs_cuda(machine, "compiling for a CPU takes minutes")
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        raise NotMeasured("torch.compile needs a C compiler")
    plain, _ = _trained(machine, "resnet50", "plain")
    fast, _ = _trained(machine, "resnet50", "compiled", **{"model.compile_backbone": "true"})
    yield Row("all layers, resnet50, torch.compile", fast, "images/s", plain, "without")


MEASUREMENTS: tuple[Callable[[Machine], Iterator[Row]], ...] = (
    full_step,
    loader,
    host_waits,
    features,
    checkpoint_stall,
    time_to_accuracy,
    compiled,
)


def _trained(machine: Machine, backbone: str, name: str, **changes: object) -> tuple[float, float | None]:
    """Train three epochs; return images per second of the last one, and GPU utilisation in percent."""
    run_dir = machine.scratch / name
    with _utilisation(machine) as samples:
        machine.run_successfully("fit", *machine.speed_settings(run_dir, backbone, trainer__max_epochs=3, **changes))
    speed = scalars(str(run_dir))["train/images_per_second"][-1][1]
    steady = samples[len(samples) // 2 : -5]  # the first half starts up and fills caches, the last 0.5 s shut down
    return speed, statistics.fmean(steady) if steady else None


@contextlib.contextmanager
def _utilisation(machine: Machine) -> Iterator[list[float]]:
    """Sample the GPU utilisation in percent, ten times per second, during the context."""
    samples: list[float] = []
    if machine.device != "cuda" or shutil.which("nvidia-smi") is None:
        yield samples
        return
    line = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100", "--id=0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        output = process.stdout
        assert output is not None
        reader = threading.Thread(target=lambda: samples.extend(float(text) for text in output), daemon=True)
        reader.start()
        try:
            yield samples
        finally:
            process.terminate()
            reader.join()


def _bare_loop(machine: Machine, name: str, *, trains: bool) -> float:
    """Images per second of training on one batch on the device: bf16 on CUDA, channels_last, fused Adam."""
    torch.manual_seed(0)
    size = machine.image_size
    body = build_backbone(machine.backbone(name))
    network = nn.Sequential(body, build_head(feature_width(body, size), [256, 32], 1)).to(machine.device)
    network = network.to(memory_format=torch.channels_last).train(trains)  # type: ignore[call-overload]
    images = torch.randint(256, (machine.batch, 3, size, size), dtype=torch.uint8, device=machine.device)
    labels = torch.ones(machine.batch, device=machine.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        with torch.autocast(machine.device, torch.bfloat16, enabled=machine.device == "cuda"):
            normalised = ((images.float() / 255 - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
            if not trains:
                with torch.no_grad():
                    network[0](normalised)
                return
            logits = network(normalised)
        F.binary_cross_entropy_with_logits(logits[:, 0].float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _timed(machine, step)


def _timed(machine: Machine, step: Callable[[], None]) -> float:
    """Images per second of ``step`` after warm-up."""
    steps = 2 if machine.quick else STEPS
    for _ in range(1 if machine.quick else WARM_UP):
        step()
    _synchronise(machine)
    began = time.monotonic()
    for _ in range(steps):
        step()
    _synchronise(machine)
    return machine.batch * steps / (time.monotonic() - began)


def _synchronise(machine: Machine) -> None:
    if machine.device == "cuda":
        torch.cuda.synchronize()


def _epochs(
    machine: Machine, batches: Any, network: nn.Module, *, layout: Any, autocast: bool, normalise: bool
) -> float:
    """Images per second in the second epoch of a plain loop over ``batches`` of (images, labels)."""
    network = network.to(machine.device).to(memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    speed = 0.0
    for _ in range(2):
        began, count = time.monotonic(), 0
        for images, labels in batches:
            images = images.to(machine.device, non_blocking=True).contiguous(memory_format=layout)
            labels = labels.to(machine.device, non_blocking=True)
            with torch.autocast(machine.device, torch.bfloat16, enabled=autocast):
                logits: Tensor = network((images - 0.5) / 0.5 if normalise else images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            count += len(labels)
        _synchronise(machine)
        speed = count / (time.monotonic() - began)
    return speed


def _tutorial(machine: Machine, name: str) -> float:
    """Train as the tutorial's script: ImageFolder, Pillow, float32, default memory format."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    size = machine.image_size
    steps = [transforms.Resize((size, size)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = datasets.ImageFolder(str(machine.photographs / "train"), transforms.Compose(steps))
    batches = DataLoader(images, machine.batch, shuffle=True, num_workers=min(machine.cores, 8), pin_memory=True)
    network = nn.Sequential(
        body := build_backbone(machine.backbone(name)), build_head(feature_width(body, size), [], 2)
    )
    return _epochs(machine, batches, network, layout=torch.contiguous_format, autocast=False, normalise=True)


def _timm(machine: Machine, name: str) -> float:
    """Train with timm's data set, loader (on CUDA with its prefetcher) and network, in the loop of its train.py."""
    import timm
    from timm.data import ImageDataset, create_loader

    size = machine.image_size
    batches = create_loader(
        ImageDataset(str(machine.photographs / "train")),
        input_size=(3, size, size),
        batch_size=machine.batch,
        is_training=True,
        use_prefetcher=machine.device == "cuda",
        num_workers=min(machine.cores, WORKERS[-1]),
        device=torch.device(machine.device),
    )
    network = timm.create_model("test_resnet" if machine.quick else name, num_classes=2)
    cuda = machine.device == "cuda"
    return _epochs(machine, batches, network, layout=torch.channels_last, autocast=cuda, normalise=False)


def _class_folders(machine: Machine, count: int) -> Path:
    """Link ``count`` of the photographs into class folders."""
    target = machine.scratch / f"folders-{count}"
    if not target.exists():
        files = sorted((machine.photographs / "train").glob("*/*.jpg"))
        for file in files[:: max(len(files) // count, 1)][:count]:
            link = target / file.parent.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    return target


def _contender(name: str, folder: Path, workers: int) -> list[float]:
    """Run a contender of data_contenders.py in its own process; return images per second in two epochs."""
    line = [sys.executable, str(HERE / "data_contenders.py"), name, str(folder), str(workers)]
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    )
    results = [text.removeprefix("RESULT ") for text in result.stdout.splitlines() if text.startswith("RESULT ")]
    assert results, result.stderr[-2000:]
    speeds: list[float] = json.loads(results[0])
    return speeds


def _accuracies(run_dir: Path) -> list[tuple[float, float]]:
    """Accuracy and wall time of each validation."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.value, event.wall_time) for event in events.Scalars("val/accuracy")]
