"""Export to a ``torch.export`` program (.pt2), which loads without this package."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from job.errors import first_line
from job.export.errors import ExportError
from job.export.formats import InputKind
from job.export.network import Array, Run, TorchPreprocessing, TrainedModel

DESCRIPTION = "model.json"
"""Name of the model's description among the program's extra files."""


def write_program(model: TrainedModel, kind: InputKind, path: Path) -> None:
    """Write preprocessing and network as one program, of any batch size.

    Raises:
        ExportError: the architecture cannot be exported.
    """
    spec, batch = model.description, torch.export.Dim("batch")
    whole = nn.Sequential(TorchPreprocessing(kind, spec.image_size, spec.resize, spec.mean, spec.std), model.network)
    size = spec.image_size
    if kind == "normalised":
        example, shape = torch.zeros(2, 3, size, size), {0: batch}
    elif kind == "resized":
        example, shape = torch.zeros(2, size, size, 3, dtype=torch.uint8), {0: batch}
    else:
        # Sides that differ from each other and from S, so that none of them is taken for a constant.
        example = torch.zeros(2, size + 27, size + 67, 3, dtype=torch.uint8)
        shape = {0: batch, 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    try:
        program = torch.export.export(whole.eval(), (example,), dynamic_shapes=(shape,))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # has paths of this machine
        torch.export.save(program, path, extra_files={DESCRIPTION: msgspec.json.encode(spec).decode()})
    except Exception as error:  # torch.export raises errors of any class
        raise ExportError(
            f"{spec.backbone} cannot be exported by torch.export: {first_line(error, 300)} "
            "Leave out pt2; --format weights works for every architecture."
        ) from error


def runner(path: Path) -> Run:
    """Load a program."""
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def run(images: Array) -> npt.NDArray[np.float32]:
        probabilities: npt.NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return probabilities

    return run
