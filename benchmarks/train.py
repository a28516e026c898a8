"""Benchmark of fine-tuning: images per second, and time to an accuracy.

Run it by ``make benchmark-train``. It compares the job with the script of PyTorch's tutorial, and with a bare training
loop as the upper bound, on the same photographs, backbone, weights, batch size and epochs. timm's train.py and
torchvision's references are not compared: they are scripts of their repositories, not parts of their packages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_contenders import BATCH, WORKERS

from job.demo.weights import BACKBONE, efficientnet_lite0
from job.model.backbone import build_backbone

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "job" / "recipes"
ARCHIVE = Path(
    os.environ.get("JOB_TEST_CATS_AND_DOGS", HERE.parents[1] / "shared" / "data" / "cats_and_dogs_filtered.zip")
)
FROZEN_EPOCHS = 5
CORES = len(os.sched_getaffinity(0))


def photographs(folder: Path, train: int, validation: int) -> Path:
    """Extract the first photographs of each class from the tutorial's archive."""
    counts: dict[str, int] = {}
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name in sorted(archive.namelist()):
            part, _, file = name.rpartition("/")
            limit = train if "/train/" in name else validation
            if file.endswith(".jpg") and counts.get(part, 0) < limit // 2:
                counts[part] = counts.get(part, 0) + 1
                archive.extract(name, folder)
    return folder / "cats_and_dogs_filtered"


def contender(name: str, **arguments: Any) -> dict[str, Any]:
    """Run a contender of train_contenders.py in its own process."""
    line = [sys.executable, str(HERE / "train_contenders.py"), name, json.dumps(arguments)]
    result: dict[str, Any] = json.loads(subprocess.run(line, check=True, capture_output=True).stdout.splitlines()[-1])
    return result


def job_fit(run_dir: Path, processes: int, *options: str) -> dict[str, Any]:
    """Run ``job fit``; return speed and accuracy per epoch, with seconds since its start."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    fit = ["job", "fit", f"--run_dir={run_dir}", f"--data.num_workers={max(CORES // processes, 1)}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(CORES // processes, 1))}
    began = time.time()
    log = run_dir.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen([*line, *fit], stdout=file, stderr=file, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # usage includes child processes
    if status:
        sys.exit(log.read_text())
    seconds = time.time() - began
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    report = json.loads((run_dir / "report.json").read_text())
    return {
        "speeds": [event.value for event in events.Scalars("train/images_per_second")],
        "accuracies": [(e.value, e.wall_time - began) for e in events.Scalars("val/accuracy")]
        if "val/accuracy" in tags
        else [],
        "seconds": seconds,
        "features": report["seconds"]["features"],
        "peak_mb": usage.ru_maxrss / 1000,
    }


def speed_table(folder: Path, data: Path, backbone: str) -> Table:
    """Images per second with a frozen backbone, and with all layers training."""
    weights = str(folder / f"{backbone}.pth")
    torch.manual_seed(0)
    torch.save(build_backbone(backbone).state_dict(), weights)
    table = Table("", "frozen", "all layers", "peak MB", title=f"{backbone}, images/s", title_justify="left")

    def row(name: str, frozen: float, full: float, peak: float | None = None) -> None:
        table.add_row(name, f"{frozen:,.1f}", f"{full:,.1f}", f"{peak:,.0f}" if peak else "")
        print(backbone, name, f"{frozen:.1f} {full:.1f}", file=sys.stderr, flush=True)

    plain = {"root": str(data), "backbone": backbone, "weights": weights, "epochs": 1, "validate": False}
    peer = [contender("tutorial", frozen=frozen, **plain) for frozen in (True, False)]
    row("tutorial", peer[0]["epochs"][0]["speed"], peer[1]["epochs"][0]["speed"], peer[1]["peak_mb"])
    for name, best in (("bare loop", False), ("bare loop, channels last, fused", True)):
        loops = [
            contender(
                "bare_loop",
                backbone=backbone,
                weights=weights,
                frozen=frozen,
                best=best,
                threads=CORES,
                steps=20 if frozen else 10,
            )
            for frozen in (True, False)
        ]
        row(name, loops[0]["speed"], loops[1]["speed"])
    limit = loops[1]["speed"]
    common = [f"--data.root={data}", f"--model.backbone={backbone}", f"--model.weights={weights}"]
    common += [f"--data.global_batch_size={BATCH}", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu"]
    common += [f"--data.cache_dir={folder}/cache-{backbone}"]
    frozen = [f"--trainer.max_epochs={FROZEN_EPOCHS}", f"--model.milestones=[{FROZEN_EPOCHS}]"]
    cached = job_fit(folder / f"{backbone}-cached", 1, *common, *frozen)
    speeds, peaks = [], []
    for processes in (1, 2):
        full = job_fit(
            folder / f"{backbone}-{processes}", processes, *common, "--trainer.max_epochs=2", "--model.milestones=[]"
        )
        # In the first epoch the data pipeline is empty and allocators are cold.
        speeds.append(full["speeds"][-1])
        peaks.append(full["peak_mb"])
    row(f"job, 1 process of {CORES} threads", cached["speeds"][-1], speeds[0], peaks[0])
    table.add_row("job, 2 processes", "", f"{speeds[1]:,.1f}", "")
    table.caption = (
        f"computing features: {cached['features']:.0f} s. Frozen, cached features: "
        f"{cached['speeds'][-1] / peer[0]['epochs'][0]['speed']:.0f} times the tutorial. "
        f"All layers: {speeds[0] / limit:.2f} of the bare loop, "
        f"{speeds[0] / peer[1]['epochs'][0]['speed']:.2f} times the tutorial; "
        f"2 processes: {speeds[1] / speeds[0]:.2f} of 1."
    )
    return table


def accuracy_table(folder: Path, data: Path) -> Table:
    """Seconds to the tutorial's final accuracy, with a frozen backbone and ImageNet's weights."""
    weights = folder / "lite0.safetensors"
    weights.write_bytes(efficientnet_lite0())
    peer = contender(
        "tutorial",
        root=str(data),
        backbone=BACKBONE,
        weights=str(weights),
        epochs=FROZEN_EPOCHS,
        frozen=True,
        validate=True,
    )["epochs"]
    half = "[0.5,0.5,0.5]"
    job_run = job_fit(
        folder / "accuracy",
        2,
        *(f"--data.root={data}", f"--model.backbone={BACKBONE}", f"--model.weights={weights}"),
        *(f"--model.mean={half}", f"--model.std={half}", f"--data.cache_dir={folder}/cache-accuracy"),
        *(f"--trainer.max_epochs={4 * FROZEN_EPOCHS}", f"--model.milestones=[{4 * FROZEN_EPOCHS}]"),
        *(f"--data.global_batch_size={BATCH}", "--trainer.accelerator=cpu"),
    )
    goal = peer[-1]["accuracy"]
    reached = next((at for value, at in job_run["accuracies"] if value >= goal), None)
    table = Table("", "accuracy", "seconds", title=f"{BACKBONE}, frozen: time to an accuracy", title_justify="left")
    table.add_row(f"tutorial, {FROZEN_EPOCHS} epochs", f"{goal:.4f}", f"{peer[-1]['at']:.0f}")
    table.add_row("job, at the same accuracy", f"{goal:.4f}", f"{reached:.0f}" if reached else "not reached")
    table.add_row(
        f"job, {4 * FROZEN_EPOCHS} epochs", f"{job_run['accuracies'][-1][0]:.4f}", f"{job_run['seconds']:.0f}"
    )
    if reached:
        table.caption = f"{peer[-1]['at'] / reached:.1f} times faster"
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--images", type=int, default=640, help="training images; half as many for validation")
    options = parser.parse_args()
    if not ARCHIVE.exists():
        sys.exit(f"{ARCHIVE} does not exist: set JOB_TEST_CATS_AND_DOGS to the tutorial's archive.")
    packages = ("torch", "torchvision", "pytorch-lightning", "timm")
    console = Console(width=120)
    console.print(f"{CORES} cores;", ", ".join(f"{name} {version(name)}" for name in packages), f"; {WORKERS} workers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = photographs(folder, options.images, options.images // 2)
        for backbone in options.backbones:
            console.print(speed_table(folder, data, backbone))
        console.print(accuracy_table(folder, data))


if __name__ == "__main__":
    main()
