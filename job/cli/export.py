"""``python -m job export``: write a checkpoint's network in formats that other programs run."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Literal

from job import redact
from job.cli.parser import call_with_options
from job.errors import ConfigError
from job.export.formats import InputKind, parse_formats, require_packages
from job.process import logs, temporary
from job.storage.local_cache import default_cache_dir, usable_cache_dir


def export(args: list[str]) -> None:
    """Run ``python -m job export ARGS``."""
    call_with_options("export", main, args, positional=("run_dir", "output"))


def main(
    output: str,
    run_dir: str | None = None,
    ckpt: str | None = None,
    format: str | list[str] = "onnx",
    input: InputKind = "image",
    data: str | None = None,
    max_images: int = 1000,
    max_int8_loss: float = 0.02,
    overwrite: bool = False,
    push: str | None = None,
    cache_dir: str | None = None,
    calibrated: Literal["auto", "true", "false"] = "auto",
) -> None:
    """Write a model for use without this package: ONNX, torch.export, weights, int8, Triton.

    Each format is compared with the checkpoint before anything is written to --output.

    Args:
        output: URI of a folder; export.json is written to it last.
        run_dir: folder of the run; its best checkpoint is used unless --ckpt names another one.
        ckpt: checkpoint file, RUN_DIR/checkpoints/last, or a run_dir, which means its best checkpoint.
        format: formats, separated by commas: onnx; pt2 (torch.export); weights (a state dict of timm or torchvision);
            int8 (ONNX, quantized); triton (a model repository).
        input: image: uint8 [B, H, W, 3] of any size, resized by the network; resized: uint8 [B, S, S, 3];
            normalised: float [B, 3, S, S]. Weights always have normalised input.
        data: data set to check and to calibrate int8 with, in the layout of training. Default: the images of the run.
        max_images: most images to read of each part.
        max_int8_loss: accuracy (micro F1 of several labels) that int8 may lose; a larger loss is an error.
        overwrite: replace an earlier export in the folder.
        push: also upload to this Hugging Face repository, OWNER/NAME; a new one is private. Needs hf auth login, or
            HF_TOKEN.
        cache_dir: local folder for copies of archives that cannot be read in parts. Default: ~/.cache/job.
        calibrated: auto calibrates probabilities where the checkpoint has a calibration; true requires one; false
            leaves them as the network computes them.
    """
    formats = parse_formats(format)
    if max_images < 1:
        raise ConfigError(f"--max_images must be at least 1, not {max_images}.")
    if not 0 <= max_int8_loss <= 1 or math.isnan(max_int8_loss):
        raise ConfigError(f"--max_int8_loss must be between 0 and 1, not {max_int8_loss}.")
    source = ckpt or run_dir
    if source is None:
        raise ConfigError("export needs a checkpoint. Give --run_dir or --ckpt.")
    require_packages(formats, push=push is not None)
    # torch takes seconds to import: not for --help or a misspelt option.
    from job.export import hub
    from job.export.output import publish, require_free
    from job.export.run import Export, Request
    from job.export.terminal import print_export

    if push is not None:
        hub.require_repository_name(push)
    output = redact.remember(output)
    require_free(output, overwrite=overwrite)
    cache = usable_cache_dir(Path(cache_dir or default_cache_dir()).expanduser())
    folder = temporary.folder("export")
    try:
        files = folder / "files"
        files.mkdir()
        request = Request(source, formats, input, data, max_images, max_int8_loss, cache, calibrated)
        content = Export(request, files).write()
        publish(files, content, output)
        print_export(content)
        logs.report(f"export in {output}", logging.INFO)
        if push is not None:
            logs.report(f"pushed: {hub.push(files, push)}", logging.INFO)
    finally:
        temporary.remove(folder)
