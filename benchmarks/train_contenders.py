"""Contenders of benchmarks/train.py, each run in its own process: ``train_contenders.py NAME JSON``.

The last line of output is a JSON object.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from job.model.backbone import build_backbone, feature_width
from job.model.head import build_head
from job.model.loading import read_pretrained

BATCH = 32
SIZE = 224
WORKERS = 2


def network(backbone: str, weights: str) -> tuple[nn.Module, nn.Module]:
    """Build a trainable backbone and the tutorial's head."""
    torch.manual_seed(0)
    body = build_backbone(backbone, read_pretrained(weights))
    return body, build_head(feature_width(body, SIZE), [256, 32], 1)


def freeze(body: nn.Module) -> None:
    """Freeze the backbone as the tutorial does, but with batch normalisation in eval mode."""
    body.eval()
    for parameter in body.parameters():
        parameter.requires_grad = False


def tutorial(root: str, backbone: str, weights: str, epochs: int, frozen: bool, validate: bool) -> dict[str, Any]:
    """Train as the tutorial's script: ImageFolder, Pillow, float32, default memory format, no cache."""
    began = time.monotonic()
    normalize = transforms.Normalize((0.5,) * 3, (0.5,) * 3)
    plain = transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), normalize])
    augmented = transforms.Compose(
        [transforms.Resize((SIZE, SIZE)), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    )

    def loader(part: str, transform: Any, shuffle: bool) -> DataLoader[Any]:
        images: Dataset[Any] = datasets.ImageFolder(f"{root}/{part}", transform=transform)
        return DataLoader(images, BATCH, shuffle=shuffle, num_workers=WORKERS)

    train, val = loader("train", augmented, True), loader("validation", plain, False)
    body, head = network(backbone, weights)
    if frozen:
        freeze(body)
    optimizer = torch.optim.Adam([p for p in (*body.parameters(), *head.parameters()) if p.requires_grad], lr=1e-3)
    result: dict[str, Any] = {"epochs": []}
    for _ in range(epochs):
        epoch = time.monotonic()
        body.train(not frozen)
        for images, labels in train:
            loss = F.binary_cross_entropy_with_logits(head(body(images))[:, 0], labels.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        speed = len(train.dataset) / (time.monotonic() - epoch)  # type: ignore[arg-type]
        body.eval()
        right = 0
        with torch.no_grad():
            for images, labels in val if validate else ():
                right += int(((head(body(images))[:, 0] > 0) == labels).sum())
        accuracy = right / len(val.dataset)  # type: ignore[arg-type]
        result["epochs"].append({"speed": speed, "accuracy": accuracy, "at": time.monotonic() - began})
    return result


def bare_loop(backbone: str, weights: str, frozen: bool, best: bool, threads: int, steps: int) -> dict[str, Any]:
    """Images per second of training on one batch in memory: the upper bound for any data pipeline.

    Args:
        backbone: name of the architecture.
        weights: URI of its weights.
        frozen: train the head only.
        best: use channels_last and a fused optimizer.
        threads: CPU threads.
        steps: number of timed steps.
    """
    torch.set_num_threads(threads)
    body, head = network(backbone, weights)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.ones(BATCH)
    if best:
        body, images = body.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    if frozen:
        freeze(body)
    trained = [p for p in (*body.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, fused=best)

    def step() -> None:
        with torch.no_grad() if frozen else contextlib.nullcontext():
            features: Tensor = body(images)
        loss = F.binary_cross_entropy_with_logits(head(features)[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    began = time.monotonic()
    for _ in range(steps):
        step()
    return {"speed": BATCH * steps / (time.monotonic() - began)}


def command(line: list[str], variables: dict[str, str], log: str) -> dict[str, Any]:
    """Run a command; this process adopts, and waits for, the processes that it leaves behind.

    Args:
        line: its words.
        variables: added to the environment.
        log: file of its output.
    """
    adopt_orphans()
    began, status = time.time(), 0
    with Path(log).open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, env={**os.environ, **variables})
        with contextlib.suppress(ChildProcessError):
            while True:
                ended, code = os.wait()
                if ended == process.pid:
                    status, seconds = code, time.time() - began
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"status": status, "began": began, "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has ended (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


if __name__ == "__main__":
    result = {"tutorial": tutorial, "bare_loop": bare_loop, "command": command}[sys.argv[1]](**json.loads(sys.argv[2]))
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    spent = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    peak = max(own.ru_maxrss, children.ru_maxrss)
    print(json.dumps({"cpu_seconds": spent, **result, "peak_mb": peak / 1000}))
