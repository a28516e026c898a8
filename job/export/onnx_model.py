"""Export to ONNX: the network by ``torch.onnx.export``, joined to the preprocessing."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import compose, helper

from job.errors import first_line
from job.export.errors import ExportError
from job.export.formats import OUTPUT, InputKind
from job.export.manifest import ModelDescription
from job.export.network import Array, Run, TrainedModel
from job.export.onnx_preprocessing import NORMALISED, OPSET, preprocessing_graph
from job.process.cpus import available_cpus

MOST_BYTES = 1_900_000_000
"""Weights of the largest network: a protobuf message has at most 2 GiB."""


def network_graph(model: TrainedModel) -> onnx.ModelProto:
    """The network from :data:`~job.export.onnx_preprocessing.NORMALISED` to probabilities, of any batch size.

    Raises:
        ExportError: the architecture cannot be exported, or is too large.
    """
    require_size(model)
    size = model.description.image_size
    shapes = {"normalised": {0: torch.export.Dim("batch")}}
    with quiet():
        try:
            program = torch.onnx.export(
                model.network,
                (torch.zeros(2, 3, size, size),),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[NORMALISED],
                output_names=[OUTPUT],
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
            assert program is not None  # with dynamo=True
            graph: onnx.ModelProto = program.model_proto
        except Exception as error:  # the exporter raises errors of any class
            raise ExportError(
                f"{model.description.backbone} cannot be exported to ONNX: {first_line(error, 300)} "
                "Leave out onnx, int8 and triton; --format weights works for every architecture."
            ) from error
    exported = {entry.domain: entry.version for entry in graph.opset_import}.get("")
    if exported != OPSET:
        raise ExportError(
            f"{model.description.backbone} needs operators of ONNX opset {exported}, and this export writes opset "
            f"{OPSET}. Leave out onnx, int8 and triton."
        )
    _strip(graph)
    return graph


def _strip(graph: onnx.ModelProto) -> None:
    """Remove what the exporter notes of each operator: stack traces, with paths of this machine."""
    for part in (graph.graph, *graph.functions):
        for node in part.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")


def require_size(model: TrainedModel) -> None:
    """Check that the weights fit into one protobuf message.

    Raises:
        ExportError: they do not.
    """
    size = sum(value.nbytes for value in model.network.state_dict().values())
    if size > MOST_BYTES:
        raise ExportError(
            f"{model.description.backbone} has {size / 1e9:.1f} GB of weights, and an ONNX file holds at most "
            f"{MOST_BYTES / 1e9:.1f} GB. Choose --format pt2 or weights."
        )


def complete_graph(
    network: onnx.ModelProto, kind: InputKind, model: ModelDescription, versions: dict[str, str]
) -> onnx.ModelProto:
    """Join the preprocessing to a network, and add the metadata."""
    whole: onnx.ModelProto = compose.merge_models(
        preprocessing_graph(kind, model, network.ir_version), network, io_map=[(NORMALISED, NORMALISED)]
    )
    whole.graph.name = "classifier"
    whole.producer_name, whole.producer_version = "job", versions.get("job", "")
    add_metadata(whole, metadata(kind, model, versions))
    onnx.checker.check_model(whole)
    return whole


def add_metadata(graph: onnx.ModelProto, values: dict[str, str]) -> None:
    """Add entries to ``metadata_props``."""
    earlier = {entry.key: entry.value for entry in graph.metadata_props}
    helper.set_model_props(graph, {**earlier, **values})


def metadata(kind: InputKind, model: ModelDescription, versions: dict[str, str]) -> dict[str, str]:
    """The entries of ``metadata_props``: JSON, except for single words."""
    preprocessing = {
        "input": kind,
        "image_size": model.image_size,
        "resize": model.resize,
        "interpolation": "bilinear, antialiased",
        "mean": model.mean,
        "std": model.std,
    }
    values = {
        "classes": model.classes,
        "thresholds": model.thresholds,
        "preprocessing": preprocessing,
        "versions": versions,
    }
    words = {
        "task": model.task,
        "calibration": model.calibration,
        "backbone": model.backbone,
        "checkpoint": model.checkpoint,
        "checkpoint_sha256": model.checkpoint_sha256,
    }
    return {**{name: msgspec.json.encode(value).decode() for name, value in values.items()}, **words}


def write_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def runner(path: Path) -> Run:
    """Load a file with ONNX Runtime, on the CPU.

    Raises:
        ExportError: ONNX Runtime cannot run it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own classes, which have no common base
        raise ExportError(f"ONNX Runtime cannot load the exported network: {first_line(error, 300)}") from error
    name = session.get_inputs()[0].name

    def run(images: Array) -> npt.NDArray[np.float32]:
        probabilities: npt.NDArray[np.float32] = session.run([OUTPUT], {name: images})[0]
        return probabilities

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context in which exporters print and log no warnings: what they report concerns their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # ONNX Runtime logs thousands of lines by the root logger
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
