"""Machine, data sets and commands of ``benchmarks/gpu.py``."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import Outcome, options, picture_files, run, run_here, write_files

PHOTOGRAPHS = 12_000
"""Training images of the speed measurements; photographs are copied up to this number."""


class NotMeasured(Exception):
    """Reason why a check or measurement is impossible on this machine."""


@dataclass(frozen=True)
class Machine:
    """Device, data and folders of the measurements.

    Attributes:
        device: "cuda" or "cpu".
        quick: use the smallest networks and images, to test the script itself.
        photos: folder of train/ and validation/ with class folders. Default: generated images.
        scratch: local folder for all output.
    """

    device: str
    quick: bool
    photos: Path | None
    scratch: Path

    @property
    def cores(self) -> int:
        """CPU cores that this process may use."""
        return len(os.sched_getaffinity(0))

    @property
    def accelerator(self) -> str:
        """Lightning's name of the device."""
        return "gpu" if self.device == "cuda" else "cpu"

    @property
    def precision(self) -> str:
        """Precision of the speed measurements."""
        return "bf16-mixed" if self.device == "cuda" else "32-true"

    @property
    def image_size(self) -> int:
        """Height and width of the model's input in speed measurements."""
        return 32 if self.quick else 224

    @cached_property
    def colours(self) -> Path:
        """Two classes of 40 small pictures, for the checks."""
        return write_files(self.scratch / "colours", picture_files(["blue", "red"], 40))

    @cached_property
    def photographs(self) -> Path:
        """train/ with :data:`PHOTOGRAPHS` images (256 if quick) and validation/, for the measurements."""
        target, number = self.scratch / "photographs", 256 if self.quick else PHOTOGRAPHS
        source = self.photos
        if source is None:
            source = self.scratch / "generated"
            for part, count in (("train", 32), ("validation", 8)):
                write_files(source / part, picture_files(["blue", "red"], count))
        for part in ("train", "validation"):
            files = sorted((source / part).glob("*/*.jpg"))
            copies = -(-number // len(files)) if part == "train" else 1
            for file in files:
                for copy in range(copies):
                    copied = target / part / file.parent.name / f"{copy:03d}-{file.name}"
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copied)
        return target

    def settings(self, run_dir: Path, **changes: object) -> list[str]:
        """Options of a short fit on :attr:`colours`."""
        fit: dict[str, object] = {
            "data.global_batch_size": 16,
            "model.hidden": "[8]",
            "model.milestones": "[1,2]",
            "trainer.max_epochs": 3,
            "trainer.log_every_n_steps": 1,
        }
        return options({**self._small(run_dir), **fit}, **changes)

    def frozen_settings(self, run_dir: Path) -> list[str]:
        """Options of ``sweep`` and ``audit`` on :attr:`colours`."""
        return options(self._small(run_dir))

    def _small(self, run_dir: Path) -> dict[str, object]:
        small: dict[str, object] = {
            "run_dir": run_dir,
            "data.root": self.colours,
            "data.cache_dir": self.scratch / "cache",
            "data.image_size": 32,
            "data.num_workers": 2,
            "model.backbone": "timm/test_resnet",
            "model.weights": "none",
            "trainer.accelerator": self.accelerator,
        }
        if self.quick:
            small["trainer.precision"] = "32-true"  # most CPUs emulate bf16, eight times as slow
        return small

    def speed_settings(self, run_dir: Path, backbone: str, **changes: object) -> list[str]:
        """Options of a fit on :attr:`photographs`, without validation."""
        settings: dict[str, object] = {
            "run_dir": run_dir,
            "data.root": self.photographs,
            "data.cache_dir": self.scratch / "cache",
            "data.image_size": self.image_size,
            "data.global_batch_size": self.batch,
            "model.backbone": self.backbone(backbone),
            "model.weights": "none",
            "model.milestones": "[]",
            "trainer.limit_val_batches": 0,
            "trainer.accelerator": self.accelerator,
            "trainer.precision": self.precision,
        }
        return options(settings, **changes)

    @property
    def batch(self) -> int:
        """Images per step in speed measurements."""
        return 8 if self.quick else 256

    def backbone(self, name: str) -> str:
        """``name``, or the smallest network if quick."""
        return "timm/test_resnet" if self.quick else name

    def run_here(self, *args: object) -> Outcome:
        """Run a command in this process, after freeing the memory of earlier ones."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return run_here(*args, threads=1 if self.quick else self.cores)

    def run_successfully(self, *args: object) -> str:
        """Run a command in this process, require exit code 0, and return its output."""
        outcome = self.run_here(*args)
        assert outcome.returncode == 0, f"exit code {outcome.returncode}: {outcome.output[-2000:]}"
        return outcome.output

    def run_in_process(self, *args: object, **variables: str) -> Outcome:
        """Run a command in its own process."""
        result = run(*args, timeout=300, fresh=not self.quick, **variables)
        return Outcome(result.returncode, result.stdout + result.stderr)


def needs_cuda(machine: Machine, why: str) -> None:
    """Raise :class:`NotMeasured` on a CPU."""
    if machine.device != "cuda":
        raise NotMeasured(f"needs CUDA: {why}")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON file of the job."""
    content: dict[str, object] = json.loads(path.read_text())
    return content
