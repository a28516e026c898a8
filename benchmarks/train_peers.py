"""Training scripts of other repositories for benchmarks/train.py, run unchanged from a checkout of each.

Each runs in its own process, on the same photographs, backbone, weights, batch size, optimizer, learning rate, workers
and epochs. All layers train, in float32. Training images are flipped at random. They differ in how an image becomes a
square: torchvision's and Hugging Face's scripts crop a random part of a training image (RandomResizedCrop), timm's the
central square, and Lightning's resizes the whole. For validation, timm's and torchvision's crop the central square,
Lightning's and Hugging Face's resize the whole.

The lines that a script prints show when its epochs end. Run as ``train_peers.py SCRIPT ARGUMENTS…``, this file starts a
script in the way it needs.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from train_contenders import BATCH, SIZE, WORKERS

PACKAGES = (
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "evaluate==0.4.6",
    "lightning==2.6.6",
    "transformers==5.24.0",
)
"""Packages of the scripts of Lightning and Hugging Face, in an environment of their own."""
LR = 1e-3
LIGHTNING_WEIGHTS = {"resnet18": "resnet18-f37072fd.pth", "resnet50": "resnet50-11ad3fa6.pth"}
"""Files of ``weights="DEFAULT"`` in torch.hub's folder, by architecture."""
METRIC = "metrics/accuracy"
"""Folder of the metric in a checkout of huggingface/evaluate, which Hugging Face's script loads."""


@dataclass(frozen=True)
class Task:
    """What every script trains.

    Attributes:
        data: folder with train/ and validation/.
        backbone: name of the architecture, in timm without its prefix.
        weights: state dict of the backbone, a .pth or .safetensors file.
        epochs: epochs to train, each followed by a validation.
        folder: an empty folder for results.
        python: interpreter with PACKAGES, for scripts that need them.
        evaluate: checkout of huggingface/evaluate, which Hugging Face's script needs.
    """

    data: Path
    backbone: str
    weights: Path
    epochs: int
    folder: Path
    python: Path = Path(sys.executable)
    evaluate: Path | None = None


@dataclass(frozen=True)
class Peer:
    """A training script.

    Attributes:
        name: shown in the table.
        script: its path in a checkout of its repository.
        prepare: returns its command, working directory and environment, having written what they need.
        trained: pattern of the line at the end of an epoch's training.
        validated: pattern of the line at the end of a validation; its group ``accuracy`` is the accuracy.
        percent: the accuracy is given in percent.
        backbones: those that it can train; None: all.
        packages: it needs PACKAGES.
        validates_again: it ends with a further validation; it is stopped before.
    """

    name: str
    script: str
    prepare: Callable[[Path, Task], tuple[list[str], Path, dict[str, str]]]
    trained: str
    validated: str
    percent: bool
    backbones: tuple[str, ...] | None = None
    packages: bool = False
    validates_again: bool = False

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
                accuracy = float(match["accuracy"]) / (100 if self.percent else 1)
                epochs.append({"accuracy": accuracy, "at": before - began, "trained": trained})
                if self.validates_again and len(epochs) == task.epochs:
                    os.kill(process.pid, signal.SIGTERM)  # Popen.terminate would reap it if it has just ended.
        _, status, usage = os.wait4(process.pid, 0)
        ends = (0, -signal.SIGTERM) if self.validates_again else (0,)
        if os.waitstatus_to_exitcode(status) not in ends or len(epochs) != task.epochs:
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
    here = Path(__file__).absolute().parent
    paths = os.pathsep.join(filter(None, [str(here), str(here.parent), os.environ.get("PYTHONPATH")]))
    variables = {"TORCH_HOME": str(task.folder), "PYTHONPATH": paths}
    return [str(task.python), __file__, str(script), "fit", *words], task.folder, variables


def _huggingface(script: Path, task: Task) -> tuple[list[str], Path, dict[str, str]]:
    """The backbone is timm's, which transformers wraps. Nothing is downloaded: the metric is one of a checkout.

    Preprocessing is given as that of a ViT, with timm's mean and standard deviation: by timm's own, the script would
    change colours at random, too. The gradient is not clipped.
    """
    import timm
    from safetensors.torch import load_file, save_file

    assert task.evaluate is not None
    shutil.copytree(task.evaluate / METRIC, task.folder / "accuracy")
    model = task.folder / "model"
    model.mkdir()
    is_safetensors = task.weights.suffix == ".safetensors"
    states = load_file(task.weights) if is_safetensors else torch.load(task.weights)
    save_file(states, model / "model.safetensors", metadata={"format": "pt"})
    settings = timm.models.get_pretrained_cfg(task.backbone)
    config = {"architecture": task.backbone, "num_classes": 2, "pretrained_cfg": settings.to_dict()}
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": settings.mean,
        "image_std": settings.std,
    }
    (model / "config.json").write_text(json.dumps(config))
    # A folder without a timm model: there the script would take timm's preprocessing.
    processor = task.folder / "preprocessing"
    processor.mkdir()
    (processor / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    options = {
        "model_name_or_path": model,
        "image_processor_name": processor,
        "ignore_mismatched_sizes": "true",
        "train_dir": task.data / "train",
        "validation_dir": task.data / "validation",
        "remove_unused_columns": "false",
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "dataloader_num_workers": WORKERS,
        "num_train_epochs": task.epochs,
        "learning_rate": LR,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "use_cpu": "true",
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "output_dir": task.folder / "output",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    variables = {"HF_HOME": str(task.folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return [str(task.python), str(script), "--do_train", "--do_eval", *words], task.folder, variables


PEERS = {
    "timm": Peer(
        "timm's train.py",
        "train.py",
        _timm,
        r"Train: \d+ \[ *(\d+)/(?!\1\b)\d+ .*100%\)",
        r"Test: \[ *(?P<last>\d+)/(?P=last)\].*Acc@1: .*\( *(?P<accuracy>[\d.]+)\)  Acc@5",
        percent=True,
    ),
    "torchvision": Peer(
        "torchvision's references/classification",
        "references/classification/train.py",
        _torchvision,
        r"^Epoch: \[\d+\] Total time",
        r"^Test: +Acc@1 (?P<accuracy>[\d.]+) ",
        percent=True,
        backbones=("resnet18", "resnet50"),
    ),
    "lightning": Peer(
        "Lightning's fine-tuning example",
        "examples/pytorch/domain_templates/computer_vision_fine_tuning.py",
        _lightning,
        r"epoch trained",
        r"epoch validated: (?P<accuracy>[\d.]+)",
        percent=False,
        backbones=("resnet50",),  # its head takes 2048 features
        packages=True,
    ),
    "huggingface": Peer(
        "Hugging Face's run_image_classification.py",
        "examples/pytorch/image-classification/run_image_classification.py",
        _huggingface,
        r"\{'loss': ",
        r"'eval_accuracy': '?(?P<accuracy>[\d.]+)",
        percent=False,
        packages=True,
        validates_again=True,
    ),
}


@dataclass(frozen=True)
class Scripts:
    """The training scripts to run.

    Attributes:
        checkouts: checkout of each one's repository, by key of PEERS.
        python: interpreter with PACKAGES, for scripts that need them.
        evaluate: checkout of huggingface/evaluate, which Hugging Face's script needs.
    """

    checkouts: dict[str, Path]
    python: Path = Path(sys.executable)
    evaluate: Path | None = None

    def results(self, task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and result of each script that can train the backbone."""
        for key, checkout in self.checkouts.items():
            peer = PEERS[key]
            if peer.backbones is None or task.backbone in peer.backbones:
                folder = task.folder / key
                folder.mkdir()
                yield (
                    peer.name,
                    peer.run(checkout, replace(task, folder=folder, python=self.python, evaluate=self.evaluate)),
                )


def revision(checkout: Path) -> str:
    """Commit of a checkout, or its version file; empty where it has neither."""
    described = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--tags"], capture_output=True, text=True, check=False
    )
    for name in ("timm/version.py", "version.txt", "src/version.info", "src/transformers/__init__.py"):
        if (file := checkout / name).exists():
            text = file.read_text()
            assigned = re.search(r"^__version__ = ['\"](.*)['\"]", text, re.MULTILINE)
            version = assigned[1] if assigned else text.strip()
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
