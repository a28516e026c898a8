"""Training scripts of other repositories for benchmarks/train.py, run unchanged from a checkout of each.

Each runs in its own process, on the same photographs, backbone, weights, batch size, optimizer, learning rate, workers
and epochs: images are resized to a square and flipped, all layers train, in float32. What a script prints tells when
its epochs end. Run as ``train_peers.py SCRIPT ARGUMENTS…``, this file starts a script in the way it needs.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from train_contenders import BATCH, SIZE, WORKERS

LR = 1e-3
LIGHTNING_WEIGHTS = {"resnet18": "resnet18-f37072fd.pth", "resnet50": "resnet50-11ad3fa6.pth"}
"""Files of ``weights="DEFAULT"`` in torch.hub's folder, by architecture."""


@dataclass(frozen=True)
class Task:
    """What every script trains.

    Attributes:
        data: folder with train/ and validation/.
        backbone: name of the architecture, in timm without its prefix.
        weights: state dict of the backbone, a .pth or .safetensors file.
        epochs: epochs to train, each followed by a validation.
        folder: an empty folder for results.
    """

    data: Path
    backbone: str
    weights: Path
    epochs: int
    folder: Path


@dataclass(frozen=True)
class Peer:
    """A training script.

    Attributes:
        name: shown in the table.
        script: its path in a checkout of its repository.
        prepare: returns its command, working directory and environment, having written what they need.
        trained: pattern of the line at the end of an epoch's training.
        validated: pattern of the line at the end of a validation; its group is the accuracy.
        percent: the accuracy is given in percent.
        backbones: those that it can train; None: all.
    """

    name: str
    script: str
    prepare: Callable[[Path, Task], tuple[list[str], Path, dict[str, str]]]
    trained: str
    validated: str
    percent: bool
    backbones: tuple[str, ...] | None = None

    def run(self, checkout: Path, task: Task) -> dict[str, Any]:
        """Speed of the last epoch's training, accuracy and seconds after each, CPU seconds and peak memory."""
        command, folder, variables = self.prepare(checkout / self.script, task)
        began, before = time.monotonic(), time.monotonic()
        epochs: list[dict[str, float]] = []
        trained, lines = 0.0, []
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if re.search(self.trained, line):
                trained = time.monotonic() - before
            if match := re.search(self.validated, line):
                before = time.monotonic()
                accuracy = float(match[1]) / (100 if self.percent else 1)
                epochs.append({"accuracy": accuracy, "at": before - began, "trained": trained})
        _, status, usage = os.wait4(process.pid, 0)
        if status or len(epochs) != task.epochs:
            sys.exit(f"{self.name} failed:\n" + "".join(lines[-40:]))
        images = sum(1 for _ in (task.data / "train").rglob("*.jpg"))
        return {
            "epochs": epochs,
            "speed": images / epochs[-1]["trained"],
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_mb": usage.ru_maxrss / 1000,
        }


def _timm(script: Path, task: Task) -> tuple[list[str], Path, dict[str, str]]:
    """channels_last, as timm recommends; its own augmentation is off."""
    options = {
        "data-dir": task.data,
        "val-split": "validation",
        "model": task.backbone,
        "pretrained-path": task.weights,
        "num-classes": 2,
        "img-size": SIZE,
        "crop-pct": 1.0,
        "batch-size": BATCH,
        "workers": WORKERS,
        "epochs": task.epochs,
        "opt": "adam",
        "lr": LR,
        "weight-decay": 0,
        "sched": "step",
        "decay-epochs": 1000,
        "warmup-epochs": 0,
        "smoothing": 0,
        "color-jitter": 0,
        "train-interpolation": "bilinear",
        "device": "cpu",
        "output": task.folder,
        "log-interval": 10_000,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    flags = ["--pretrained", "--channels-last", "--scale", "1", "1", "--ratio", "1", "1"]
    return [sys.executable, str(script), *words, *flags], task.folder, {}


def _torchvision(script: Path, task: Task) -> tuple[list[str], Path, dict[str, str]]:
    """It cannot give pretrained weights another number of classes: they come as a checkpoint before the first epoch."""
    from torchvision.models import get_model

    network = get_model(task.backbone, num_classes=2)
    network.load_state_dict({**network.state_dict(), **torch.load(task.weights)})
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    states = {"model": network, "optimizer": optimizer, "lr_scheduler": scheduler}
    checkpoint = task.folder / "start.pth"
    torch.save({**{name: value.state_dict() for name, value in states.items()}, "epoch": -1}, checkpoint)
    for part, name in (("train", "train"), ("validation", "val")):
        (task.folder / name).symlink_to(task.data / part)
    options = {
        "data-path": task.folder,
        "model": task.backbone,
        "resume": checkpoint,
        "device": "cpu",
        "batch-size": BATCH,
        "workers": WORKERS,
        "epochs": task.epochs,
        "opt": "adamw",
        "lr": LR,
        "weight-decay": 0,
        "lr-step-size": 1000,
        "val-resize-size": SIZE,
        "val-crop-size": SIZE,
        "train-crop-size": SIZE,
        "output-dir": "",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, __file__, str(script), *words], task.folder, {}


def _lightning(script: Path, task: Task) -> tuple[list[str], Path, dict[str, str]]:
    """It downloads photographs and weights, unless they lie where it would put them."""
    hub = task.folder / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    from torchvision.models import get_model

    network = get_model(task.backbone)  # with a head, which the script drops
    torch.save({**network.state_dict(), **torch.load(task.weights)}, hub / LIGHTNING_WEIGHTS[task.backbone])
    shutil.make_archive(str(task.folder / task.data.name), "zip", task.data.parent, task.data.name)
    options = {
        "data.dl_path": task.folder,
        "data.batch_size": BATCH,
        "data.num_workers": WORKERS,
        "model.backbone": task.backbone,
        "model.lr": LR,
        "model.lr_scheduler_gamma": 1.0,
        "finetuning.milestones": "[0,1]",  # all layers train from the second epoch on
        "trainer.max_epochs": task.epochs,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.callbacks": "epoch_lines.EpochLines",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    variables = {"TORCH_HOME": str(task.folder), "PYTHONPATH": paths}
    return [sys.executable, __file__, str(script), "fit", *words], task.folder, variables


PEERS = {
    "timm": Peer(
        "timm's train.py",
        "train.py",
        _timm,
        r"Train: \d+ \[ *(\d+)/(?!\1\b)\d+ .*100%\)",
        r"Test: \[ *(?:\d+)/\d+\].*Acc@1: .*\( *([\d.]+)\)  Acc@5",
        percent=True,
    ),
    "torchvision": Peer(
        "torchvision's references/classification",
        "references/classification/train.py",
        _torchvision,
        r"^Epoch: \[\d+\] Total time",
        r"^Test: +Acc@1 ([\d.]+) ",
        percent=True,
        backbones=("resnet18", "resnet50"),
    ),
    "lightning": Peer(
        "Lightning's fine-tuning example",
        "examples/pytorch/domain_templates/computer_vision_fine_tuning.py",
        _lightning,
        r"epoch trained",
        r"epoch validated: ([\d.]+)",
        percent=False,
        backbones=("resnet50",),  # its head takes 2048 features
    ),
}


def results(checkouts: dict[str, Path], task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and result of each script that can train the backbone."""
    for key, checkout in checkouts.items():
        peer = PEERS[key]
        if peer.backbones is None or task.backbone in peer.backbones:
            folder = task.folder / key
            folder.mkdir()
            yield peer.name, peer.run(checkout, Task(task.data, task.backbone, task.weights, task.epochs, folder))


def revision(checkout: Path) -> str:
    """Commit of a checkout, or its version file; empty where it has neither."""
    described = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--tags"], capture_output=True, text=True, check=False
    )
    for name in ("timm/version.py", "version.txt", "src/version.info"):
        if (file := checkout / name).exists():
            version = file.read_text().strip().rpartition("=")[2].strip(" '")
            return f"{version} {described.stdout.strip()}".strip()
    return described.stdout.strip()


def _start(script: str) -> None:
    """Run a script as the main module, which finds the modules beside it."""
    sys.path.insert(0, str(Path(script).parent))
    if "references" in script:
        import utils  # type: ignore[import-not-found]  # torchvision's, beside the script

        accuracy = utils.accuracy
        # It computes top-5 accuracy, which two classes do not have.
        utils.accuracy = lambda output, target, topk: accuracy(
            output, target, tuple(min(k, output.shape[1]) for k in topk)
        )
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    _start(sys.argv[0])
    sys.exit()
