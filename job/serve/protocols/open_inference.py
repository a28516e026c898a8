"""The Open Inference Protocol: version 2 of KServe's, which Triton has, too.

Sources: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md, and for
tensors after the JSON, https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from job import typed
from job.errors import DataError
from job.predict.predictor import MultilabelPrediction, Prediction
from job.serve.batching import Result
from job.serve.errors import RequestError
from job.serve.images import Image, reason
from job.serve.protocols.base64_text import decode_base64
from job.serve.protocols.instances import require_count
from job.serve.protocols.json_body import decode_json

INPUT = "image"
JSON_LENGTH_HEADER = "inference-header-content-length"
"""Header with the length of the JSON, where tensors follow it."""
MOST_VALUES = 1_000_000
"""Objects, arrays and strings of a request: nested arrays have one per row or per pixel."""
CHANNELS = (1, 3, 4)

Byte = Annotated[int, Meta(ge=0, le=255)]
Dimension = Annotated[int, Meta(ge=0, le=2**31)]
_NESTED: dict[int, Any] = {
    1: list[Byte],
    2: list[list[Byte]],
    3: list[list[list[Byte]]],
    4: list[list[list[list[Byte]]]],
}
"""Type of the data by the number of brackets that it begins with."""


class InferInput(msgspec.Struct, frozen=True):
    """Images as a tensor.

    Attributes:
        name: any.
        datatype: BYTES: image files, in base64; UINT8: pixels.
        shape: [N] of BYTES; [N, H, W, C] or [H, W, C] of UINT8, where C is 1, 3 or 4.
        data: the values, flat or nested.
        parameters: binary_data_size: length of the data after the JSON.
    """

    name: str
    datatype: str
    shape: Annotated[list[Dimension], Meta(min_length=1, max_length=4)]
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    parameters: dict[str, Any] = {}


class InferOutput(msgspec.Struct, frozen=True):
    """An output to return.

    Attributes:
        name: of the output.
    """

    name: str


class InferRequest(msgspec.Struct, frozen=True):
    """A request of the Open Inference Protocol.

    Attributes:
        inputs: one tensor of images.
        id: returned in the answer.
        outputs: the outputs to return; all by default.
        parameters: ignored.
    """

    inputs: Annotated[list[InferInput], Meta(min_length=1, max_length=1)]
    id: Annotated[str, Meta(max_length=1024)] | None = None
    outputs: list[InferOutput] | None = None
    parameters: dict[str, Any] = {}


class TensorMetadata(msgspec.Struct, frozen=True):
    """Name, type and shape of a tensor.

    Attributes:
        name: of the tensor.
        datatype: of its elements.
        shape: -1 for the number of images.
    """

    name: str
    datatype: str
    shape: list[int]


class InferResponseOutput(msgspec.Struct, frozen=True):
    """A tensor of predictions.

    Attributes:
        name: of the tensor.
        datatype: of its elements.
        shape: number of images first.
        data: flat.
    """

    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class InferResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """Predictions as tensors.

    Attributes:
        model_name: of the model.
        outputs: those of the request, or all.
        id: of the request.
    """

    model_name: str
    outputs: list[InferResponseOutput]
    id: str | None = None


class ModelMetadata(msgspec.Struct, frozen=True):
    """Inputs and outputs of the model.

    Attributes:
        name: of the model.
        platform: its framework.
        inputs: tensors of a request.
        outputs: tensors of an answer.
    """

    name: str
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


def model_metadata(name: str, classes: int, *, several_labels: bool) -> ModelMetadata:
    """Describe the model."""
    outputs = [TensorMetadata("label", "BYTES", [-1]), TensorMetadata("probabilities", "FP32", [-1, classes])]
    if several_labels:
        outputs.append(TensorMetadata("is_predicted", "BOOL", [-1, classes]))
    return ModelMetadata(name, "pytorch", [TensorMetadata(INPUT, "BYTES", [-1])], outputs)


def read_infer(body: bytes, json_length: str | None, max_instances: int) -> tuple[list[Image], InferRequest]:
    """Images of a request, and the request.

    Args:
        body: JSON, and binary data after it.
        json_length: the header :data:`JSON_LENGTH_HEADER`.
        max_instances: images of the largest request.

    Raises:
        RequestError: it is no such request, or has too many images.
    """
    text, binary = body, None
    if json_length is not None:
        if not (json_length.isascii() and json_length.isdecimal() and len(json_length) < 12):
            raise RequestError(400, f"{JSON_LENGTH_HEADER} is no number.")
        text, binary = body[: int(json_length)], body[int(json_length) :]
    request = decode_json(text, InferRequest, most_values=MOST_VALUES)
    tensor = request.inputs[0]
    has_data = bool(tensor.data)
    if binary is not None and not has_data:
        if tensor.parameters.get("binary_data_size") != len(binary):
            raise RequestError(400, f"binary_data_size is not the length of the binary data, {len(binary)}.")
    elif not has_data:
        raise RequestError(400, "the input has no data.")
    if tensor.datatype == "BYTES":
        require_count(math.prod(tensor.shape), max_instances)
        images: list[Image] = [*(_files(tensor) if has_data else _binary_files(binary or b""))]
        if len(images) != math.prod(tensor.shape):
            raise RequestError(400, f"the shape {tensor.shape} does not fit to {len(images)} elements.")
        return images, request
    if tensor.datatype != "UINT8":
        raise RequestError(
            400,
            f"the datatype {tensor.datatype[:20]!r} is not supported: give image files as BYTES, or pixels as UINT8.",
        )
    shape = _pixel_shape(tensor.shape)
    require_count(shape[0], max_instances)
    pixels = _pixels(tensor) if has_data else np.frombuffer(binary or b"", np.uint8)
    if pixels.size != math.prod(shape):
        raise RequestError(400, f"the shape {tensor.shape} does not fit to {pixels.size} values.")
    return list(pixels.reshape(shape)), request


def _pixel_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """[N, H, W, C]."""
    full = (1, *shape) if len(shape) == 3 else tuple(shape)
    if len(full) != 4 or 0 in full or full[3] not in CHANNELS:
        hint = " Channels come last." if len(full) == 4 and full[1] in CHANNELS else ""
        raise RequestError(400, f"pixels of shape {list(shape)} are no images [N, H, W, 3].{hint}")
    return full


def _files(tensor: InferInput) -> list[bytes]:
    texts = _data(tensor, list[str])
    return [decode_base64(text, f"data[{number}]") for number, text in enumerate(texts)]


def _binary_files(binary: bytes) -> list[bytes]:
    """Elements of BYTES, each after its length, in four bytes, little-endian."""
    files, place = [], 0
    while place < len(binary):
        length = int.from_bytes(binary[place : place + 4], "little")
        place += 4
        if place + length > len(binary):
            raise RequestError(400, "the binary data ends within an element.")
        files.append(binary[place : place + length])
        place += length
    return files


def _pixels(tensor: InferInput) -> np.ndarray[Any, np.dtype[np.uint8]]:
    start = bytes(memoryview(tensor.data)[:64]).translate(None, b" \t\r\n")
    depth = len(start) - len(start.lstrip(b"["))
    values = _data(tensor, _NESTED.get(depth, _NESTED[1]))
    try:
        return np.asarray(values, np.uint8).reshape(-1)
    except ValueError:
        raise RequestError(400, "the rows of data have different lengths.") from None


def _data(tensor: InferInput, kind: Any) -> Any:
    try:
        return typed.from_json(tensor.data, kind)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"data of {tensor.datatype} is not valid: {str(error)[:200]}.") from None


def write_infer(name: str, request: InferRequest, results: Sequence[Result]) -> bytes:
    """The answer.

    Raises:
        RequestError: an image could not be read, or an output does not exist.
    """
    predictions = []
    for number, result in enumerate(results):
        if isinstance(result, DataError):
            raise RequestError(400, f"image {number}: {reason(result)}.")
        predictions.append(result)
    outputs = {output.name: output for output in _outputs(predictions)}
    if request.outputs is not None:
        unknown = [output.name for output in request.outputs if output.name not in outputs]
        if unknown:
            raise RequestError(400, f"there is no output {unknown[0][:100]!r}; there are {', '.join(outputs)}.")
        outputs = {output.name: outputs[output.name] for output in request.outputs}
    return msgspec.json.encode(InferResponse(name, list(outputs.values()), request.id))


def _outputs(predictions: Sequence[Prediction]) -> list[InferResponseOutput]:
    images, classes = len(predictions), len(predictions[0].probabilities)
    probabilities = [value for each in predictions for value in each.probabilities.values()]
    outputs = [
        InferResponseOutput("label", "BYTES", [images], [each.label for each in predictions]),
        InferResponseOutput("probabilities", "FP32", [images, classes], probabilities),
    ]
    if isinstance(predictions[0], MultilabelPrediction):
        chosen = [
            name in each.labels
            for each in predictions
            if isinstance(each, MultilabelPrediction)
            for name in each.probabilities
        ]
        outputs.append(InferResponseOutput("is_predicted", "BOOL", [images, classes], chosen))
    return outputs
