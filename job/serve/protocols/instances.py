"""``{"instances": [...]}``: the protocol of Vertex AI, and version 1 of KServe's, which TensorFlow Serving began.

Sources: https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements#request_requirements,
https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from job.errors import DataError
from job.predict.predictor import Prediction
from job.serve.batching import Result
from job.serve.errors import RequestError
from job.serve.images import reason
from job.serve.protocols.base64_text import decode_base64
from job.serve.protocols.json_body import decode_json

VALUES_PER_INSTANCE = 16
"""Objects, arrays and strings that an instance may consist of, keys included."""


class Encoded(msgspec.Struct, frozen=True):
    """Bytes in JSON.

    Attributes:
        b64: an image file in base64.
    """

    b64: str


class Instance(msgspec.Struct, frozen=True):
    """An image, under one of the names that clients use.

    Attributes:
        b64: an image file in base64.
        image: the same, one level deeper.
        image_bytes: the same.
        content: an image file in base64, as for AutoML models.
    """

    b64: str | None = None
    image: Encoded | None = None
    image_bytes: Encoded | None = None
    content: str | None = None


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a request.

    Attributes:
        top_k: number of most probable classes whose probabilities are returned, in falling order; all by default.
    """

    top_k: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class PredictRequest(msgspec.Struct, frozen=True):
    """A request of Vertex AI or KServe's version 1.

    Attributes:
        instances: images.
        parameters: options.
    """

    instances: Annotated[list[str | Instance], Meta(min_length=1)]
    parameters: Parameters | None = None


class ImagePrediction(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer for one image.

    Attributes:
        label: the most probable class.
        labels: the classes that reach their threshold, in place of ``label``, of a model for several labels.
        probabilities: by class.
        error: why the image cannot be read, in place of all others.
    """

    label: str | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float] | None = None
    error: str | None = None


class PredictResponse(msgspec.Struct, frozen=True):
    """An answer for each image, in the order of the request.

    Attributes:
        predictions: one per image.
    """

    predictions: list[ImagePrediction]


def read_instances(body: bytes, max_instances: int) -> tuple[list[bytes], Parameters]:
    """Images and options of a JSON body.

    Raises:
        RequestError: it is no such request, or has too many images.
    """
    request = decode_json(body, PredictRequest, most_values=VALUES_PER_INSTANCE * (max_instances + 4))
    require_count(len(request.instances), max_instances)
    images = []
    for number, instance in enumerate(request.instances):
        where = f"instances[{number}]"
        if isinstance(instance, str):
            images.append(decode_base64(instance, where))
            continue
        nested = [encoded.b64 for encoded in (instance.image, instance.image_bytes) if encoded is not None]
        texts = [text for text in (instance.b64, instance.content, *nested) if text is not None]
        if len(texts) != 1:
            raise RequestError(400, f'{where} must hold one image, as {{"b64": "…"}}.')
        images.append(decode_base64(texts[0], where))
    return images, request.parameters or Parameters()


def require_count(images: int, most: int) -> None:
    """Check the number of images of a request.

    Raises:
        RequestError: there are none, or too many.
    """
    if images < 1:
        raise RequestError(400, "the request holds no image.")
    if images > most:
        raise RequestError(413, f"the request holds {images} images, more than {most} (--max_instances).")


def write_predictions(results: Sequence[Result], parameters: Parameters) -> bytes:
    """The answer.

    Raises:
        RequestError: no image could be read; the message is that of the first one.
    """
    first = results[0]
    if isinstance(first, DataError) and all(isinstance(result, DataError) for result in results):
        raise RequestError(400, f"{reason(first)}.")
    return msgspec.json.encode({"predictions": [prediction_entry(result, parameters.top_k) for result in results]})


def prediction_entry(result: Result, top_k: int | None) -> dict[str, Any]:
    """The entry of one image; see :class:`ImagePrediction`."""
    if not isinstance(result, Prediction):
        return {"error": f"{reason(result)}."}
    entry = result.as_json()
    if top_k is not None:
        most = heapq.nlargest(top_k, result.probabilities.items(), key=lambda item: item[1])
        entry["probabilities"] = dict(most)
    return entry
