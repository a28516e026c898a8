"""Static quantization to int8 by ONNX Runtime, and its loss of accuracy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from job.errors import ConfigError
from job.export.errors import ExportError
from job.export.formats import InputKind
from job.export.images import ImageSet
from job.export.manifest import Quantization
from job.export.network import Run, TrainedModel
from job.export.onnx_model import quiet
from job.export.onnx_preprocessing import NORMALISED

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 256
BATCH_SIZE = 16
OPERATORS = ["Conv", "Gemm", "MatMul"]
"""Operators that are computed in int8: those with weights."""


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Batches of normalised images, for the ranges of activations."""

    def __init__(self, model: TrainedModel, pixels: Tensor) -> None:
        self._batches = iter(torch.split(pixels, BATCH_SIZE))
        self._model = model

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; None at the end."""
        pixels = next(self._batches, None)
        return None if pixels is None else {NORMALISED: self._model.input_of(pixels, "normalised")}


def quantized(network: onnx.ModelProto, model: TrainedModel, train: ImageSet | None, scratch: Path) -> onnx.ModelProto:
    """The network with weights and inputs of its convolutions and matrix products in int8.

    Weights have one scale per channel, and 7 bits: eight would saturate on CPUs without VNNI. Depthwise convolutions,
    which have few weights, and outputs, whose range is wider before an activation than after it, stay in float32:
    of EfficientNet-Lite0 on digits (95.1 %) int8 otherwise loses 15 points of accuracy, and so none.

    Args:
        network: in float32, from normalised images.
        model: prepares images.
        train: training images, for the ranges of activations.
        scratch: local folder for intermediate files.

    Raises:
        ConfigError: there are no training images.
        ExportError: ONNX Runtime cannot quantize the network.
    """
    if train is None:
        raise ConfigError("int8 needs training images, for the ranges of activations. Give --data.")
    source, prepared, target = (scratch / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
    source.write_bytes(network.SerializeToString())
    chosen = np.unique(np.linspace(0, len(train.pixels) - 1, CALIBRATION_IMAGES).astype(np.int64))
    with quiet():
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                _Calibration(model, train.pixels[chosen]),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=OPERATORS,
                nodes_to_exclude=_depthwise(onnx.load(str(prepared))),
                extra_options={"OpTypesToExcludeOutputQuantization": OPERATORS},
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        except Exception as error:  # of any class
            raise ExportError(
                f"ONNX Runtime cannot quantize {model.description.backbone}: {error}. Leave out int8."
            ) from error
    return onnx.load(str(target))


def _depthwise(network: onnx.ModelProto) -> list[str]:
    """Names of the convolutions whose filters see one channel."""
    shapes = {weights.name: weights.dims for weights in network.graph.initializer}
    convolutions = (node for node in network.graph.node if node.op_type == "Conv")
    return [node.name for node in convolutions if shapes.get(node.input[1], [0, 0])[1] == 1]


def accuracy_loss(
    run: Run, model: TrainedModel, kind: InputKind, images: ImageSet | None, calibration_images: int, limit: float
) -> Quantization:
    """Compare an int8 network with the checkpoint's on validation images.

    Args:
        run: runs the int8 network.
        model: the checkpoint's network.
        kind: of the int8 network's input.
        images: validation images.
        calibration_images: number of training images that were used.
        limit: largest loss to accept.

    Raises:
        ExportError: the loss is larger.
    """
    several = model.description.task == "multilabel"
    metric: Literal["accuracy", "micro_f1"] = "micro_f1" if several else "accuracy"
    labelled = images is not None and images.has_labels and (several or images.targets.any())
    if images is None or not labelled:
        log.warning("the accuracy loss of int8 was not measured: there are no validation images with labels")
        return Quantization(calibration_images, 0, metric, None, None, None, limit)
    rows = np.arange(len(images.pixels)) if several else np.flatnonzero(images.targets.any(axis=1))
    targets, pixels = images.targets[rows], images.pixels[rows]
    batches = torch.split(pixels, BATCH_SIZE)
    floats = np.concatenate([model.probabilities(batch) for batch in batches])
    ints = np.concatenate([run(model.input_of(batch, kind)) for batch in batches])
    thresholds = np.array(model.description.thresholds, np.float32)
    before, after = (
        _micro_f1(each >= thresholds, targets) if several else _accuracy(each, targets) for each in (floats, ints)
    )
    loss = before - after
    if not np.isfinite(ints).all() or loss > limit:
        raise ExportError(
            f"int8 has {metric} {after:.4f} on {len(rows)} validation images, where the checkpoint has {before:.4f}: a "
            f"loss of {loss:.4f}, more than --max_int8_loss {limit:g}. Nothing was written. Leave out int8, or accept "
            "the loss by a higher limit."
        )
    return Quantization(calibration_images, len(rows), metric, before, after, loss, limit)


def _accuracy(probabilities: npt.NDArray[np.float32], targets: npt.NDArray[np.uint8]) -> float:
    return float(targets[np.arange(len(targets)), probabilities.argmax(axis=1)].mean())


def _micro_f1(chosen: npt.NDArray[np.bool_], targets: npt.NDArray[np.uint8]) -> float:
    labels = targets.astype(bool)
    total = int(chosen.sum() + labels.sum())
    return 2 * int((chosen & labels).sum()) / total if total else 1.0
