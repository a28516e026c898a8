"""Benchmark of fine-tuning: images per second, and time to an accuracy.

Run it by ``make benchmark-train``. It compares the job with the script of PyTorch's tutorial, and with a bare training
loop as the upper bound, on the same photographs, backbone, weights, batch size and epochs. Training scripts that are
no parts of a package join from checkouts of their repositories: ``--timm``, ``--torchvision``, ``--lightning``,
``--huggingface``. Those of Lightning and Hugging Face run in an environment of their own, which also contains the
packages of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peers_env import peers_python
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_contenders import BATCH, WORKERS
from train_peers import METRIC, PACKAGES, PEERS, Scripts, Task, revision

from job.demo.weights import BACKBONE, efficientnet_lite0
from job.model.backbone import build_backbone

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "job" / "recipes"
ARCHIVE = Path(
    os.environ.get("JOB_TEST_CATS_AND_DOGS", HERE.parents[1] / "shared" / "data" / "cats_and_dogs_filtered.zip")
)
FROZEN_EPOCHS = 5
FULL_EPOCHS = 2
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
    """Run ``job launch fit``; return speed and accuracy per epoch, with seconds since its start."""
    line = [sys.executable, "-m", "job", "launch", "fit", f"--run_dir={run_dir}", *options]
    threads = str(max(CORES // processes, 1))
    line.append(f"--data.num_workers={threads}")
    variables = {"LAUNCH_PROCESSES": str(processes), "OMP_NUM_THREADS": threads}
    log = run_dir.with_suffix(".log")
    usage = contender("command", line=line, variables=variables, log=str(log))
    if usage["status"]:
        sys.exit(log.read_text())
    began = usage["began"]
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    report = json.loads((run_dir / "report.json").read_text())
    return {
        "speeds": [event.value for event in events.Scalars("train/images_per_second")],
        "accuracies": [(e.value, e.wall_time - began) for e in events.Scalars("val/accuracy")]
        if "val/accuracy" in tags
        else [],
        "features": report["seconds"]["features"],
        **usage,
    }


def speed_table(folder: Path, data: Path, backbone: str, scripts: Scripts) -> Table:
    """Images per second with a frozen backbone, and with all layers training; CPU seconds and memory of the latter."""
    weights = str(folder / f"{backbone}.pth")
    torch.manual_seed(0)
    torch.save(build_backbone(backbone).state_dict(), weights)
    columns = ("", "frozen", "all layers", "CPU s", "peak MB")
    table = Table(*columns, title=f"{backbone}, images/s; CPU of {FULL_EPOCHS} epochs", title_justify="left")

    def row(name: str, frozen: float | None, full: float, usage: dict[str, Any]) -> None:
        others = (usage.get(key) for key in ("cpu_seconds", "peak_mb"))
        table.add_row(
            name,
            f"{frozen:,.1f}" if frozen else "",
            f"{full:,.1f}",
            *(f"{value:,.0f}" if value else "" for value in others),
        )
        print(backbone, name, frozen, f"{full:.1f}", usage.get("cpu_seconds"), file=sys.stderr, flush=True)

    plain = {"root": str(data), "backbone": backbone, "weights": weights}
    frozen_peer = contender("tutorial", frozen=True, epochs=1, validate=False, **plain)["epochs"][-1]
    peer = contender("tutorial", frozen=False, epochs=FULL_EPOCHS, validate=True, **plain)
    row("tutorial", frozen_peer["speed"], peer["epochs"][-1]["speed"], peer)
    scratch = folder / f"{backbone}-peers"
    scratch.mkdir()
    for name, result in scripts.results(Task(data, backbone, Path(weights), FULL_EPOCHS, scratch)):
        row(name, None, result["speed"], result)
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
        row(name, loops[0]["speed"], loops[1]["speed"], {})
    limit = loops[1]["speed"]
    common = [f"--data.root={data}", f"--model.backbone={backbone}", f"--model.weights={weights}"]
    common += [f"--data.global_batch_size={BATCH}", "--trainer.accelerator=cpu"]
    common += [f"--data.cache_dir={folder}/cache-{backbone}"]
    frozen = [
        "--trainer.limit_val_batches=0",
        f"--trainer.max_epochs={FROZEN_EPOCHS}",
        f"--model.milestones=[{FROZEN_EPOCHS}]",
    ]
    cached = job_fit(folder / f"{backbone}-cached", 1, *common, *frozen)
    speeds = []
    for processes in (1, 2):
        all_layers = (f"--trainer.max_epochs={FULL_EPOCHS}", "--model.milestones=[]")
        full = job_fit(folder / f"{backbone}-{processes}", processes, *common, *all_layers)
        # In the first epoch the data pipeline is empty and allocators are cold.
        speeds.append(full["speeds"][-1])
        name = f"job, {processes} process(es) of {CORES // processes} thread(s)"
        row(name, None if speeds[1:] else cached["speeds"][-1], speeds[-1], full)
    table.caption = (
        f"computing features: {cached['features']:.0f} s. Frozen, cached features: "
        f"{cached['speeds'][-1] / frozen_peer['speed']:.0f} times the tutorial. "
        f"All layers: {speeds[0] / limit:.2f} of the bare loop, "
        f"{speeds[0] / peer['epochs'][-1]['speed']:.2f} times the tutorial; "
        f"2 processes: {speeds[1] / speeds[0]:.2f} of 1."
    )
    return table


def accuracy_table(folder: Path, data: Path, scripts: Scripts) -> Table:
    """Seconds to the tutorial's final accuracy, with a frozen backbone and ImageNet's weights.

    Scripts that cannot freeze the backbone train all of it.
    """
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
    scratch = folder / "accuracy-peers"
    scratch.mkdir()
    name = BACKBONE.removeprefix("timm/")
    peers = list(scripts.results(Task(data, name, weights, FROZEN_EPOCHS, scratch)))
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
    for name, result in peers:
        at = next((epoch["at"] for epoch in result["epochs"] if epoch["accuracy"] >= goal), None)
        best = max(epoch["accuracy"] for epoch in result["epochs"])
        table.add_row(f"{name}, all layers", f"{best:.4f}", f"{at:.0f}" if at else "not reached")
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
    for option in ("--timm", "--torchvision", "--lightning", "--huggingface"):
        peer = PEERS[option.removeprefix("--")]
        parser.add_argument(option, type=Path, help=f"checkout of the repository of {peer.name}")
    parser.add_argument(
        "--evaluate", type=Path, help="checkout of huggingface/evaluate, whose accuracy metric --huggingface loads"
    )
    parser.add_argument(
        "--peers_env",
        type=Path,
        default=HERE.parent / ".bench" / "train-peers",
        help="folder of the environment for --lightning and --huggingface; created if absent",
    )
    options = parser.parse_args()
    checkouts = {name: path.resolve() for name in PEERS if (path := getattr(options, name)) is not None}
    for name, path in checkouts.items():
        if not (path / PEERS[name].script).is_file():
            parser.error(f"--{name}: {path} has no {PEERS[name].script}.")
    if "huggingface" in checkouts and not (options.evaluate and (options.evaluate / METRIC).is_dir()):
        parser.error(f"--huggingface needs --evaluate, a checkout that contains {METRIC}.")
    if not ARCHIVE.exists():
        sys.exit(f"{ARCHIVE} does not exist: set JOB_TEST_CATS_AND_DOGS to the tutorial's archive.")
    packages = ("torch", "torchvision", "pytorch-lightning", "timm")
    console = Console(width=120)
    console.print(f"{CORES} cores;", ", ".join(f"{name} {version(name)}" for name in packages), f"; {WORKERS} workers")
    for name, path in checkouts.items():
        console.print(f"{PEERS[name].name}: {revision(path)}")
    scripts = Scripts(checkouts, evaluate=options.evaluate and options.evaluate.resolve())
    if any(PEERS[name].packages for name in checkouts):
        scripts = replace(scripts, python=peers_python(options.peers_env, PACKAGES))
        console.print("in an environment of their own:", ", ".join(PACKAGES), highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = photographs(folder, options.images, options.images // 2)
        for backbone in options.backbones:
            console.print(speed_table(folder, data, backbone, scripts))
        console.print(accuracy_table(folder, data, scripts))


if __name__ == "__main__":
    main()
