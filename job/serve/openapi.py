"""The OpenAPI document: request and response types come from the structs that decode them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from job.serve.protocols.instances import PredictRequest, PredictResponse
from job.serve.protocols.open_inference import InferRequest, InferResponse

Body = Literal["predict", "instances", "infer", "form"]

_REFERENCE = "#/components/schemas/{name}"
_TYPES = (PredictRequest, PredictResponse, InferRequest, InferResponse)
_ERROR = "Error"
_FORM = {
    "type": "object",
    "properties": {
        "image": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}},
        "top_k": {"type": "integer", "minimum": 1, "maximum": 1_000_000},
    },
    "required": ["image"],
}
_FILE = {"type": "string", "format": "binary"}
_INSTANCES = {"$ref": _REFERENCE.format(name="PredictRequest")}
_BODIES: dict[Body, dict[str, Any]] = {
    "predict": {
        "application/json": _INSTANCES,
        "multipart/form-data": _FORM,
        "image/*": _FILE,
        "application/octet-stream": _FILE,
    },
    "instances": {"application/json": _INSTANCES},
    "infer": {"application/json": {"$ref": _REFERENCE.format(name="InferRequest")}},
    "form": {"multipart/form-data": _FORM},
}
_STATUSES = {
    "400": "The request is not valid, or no image could be read.",
    "408": "The body did not arrive in time.",
    "413": "The request is too large.",
    "415": "The body is compressed.",
    "429": "The queue is full.",
    "500": "The model failed.",
    "503": "The model is not ready, or took too long.",
}


@dataclass(frozen=True)
class Operation:
    """Description of a route.

    Attributes:
        summary: what it does.
        body: the kind of body that it takes.
        media_type: of its answer.
        unavailable: whether it may answer 503.
    """

    summary: str
    body: Body | None = None
    media_type: str = "application/json"
    unavailable: bool = False

    def route_options(self) -> dict[str, Any]:
        """Arguments of FastAPI's ``add_api_route``."""
        error = {"application/json": {"schema": {"$ref": _REFERENCE.format(name=_ERROR)}}}
        schema: dict[str, Any] = {"type": "string"} if self.media_type.startswith("text/") else {"type": "object"}
        if self.body in ("predict", "instances", "infer"):
            schema = {"$ref": _REFERENCE.format(name="InferResponse" if self.body == "infer" else "PredictResponse")}
        responses: dict[str, Any] = {
            "200": {"description": "The answer.", "content": {self.media_type: {"schema": schema}}}
        }
        extra: dict[str, Any] = {"responses": responses}
        if self.body is not None:
            content = {kind: {"schema": body} for kind, body in _BODIES[self.body].items()}
            extra["requestBody"] = {"required": True, "content": content}
            responses |= {status: {"description": text, "content": error} for status, text in _STATUSES.items()}
        elif self.unavailable:
            unavailable = {"application/json": {"schema": {"type": "object"}}}
            responses["503"] = {"description": "Not ready.", "content": unavailable}
        return {"summary": self.summary, "openapi_extra": extra, "response_class": _no_schema()}


def _no_schema() -> Any:
    """A response class for which FastAPI writes no schema: :meth:`Operation.route_options` has it."""
    from starlette.responses import Response

    return Response


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application."""
    described = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template=_REFERENCE)
    schemas[_ERROR] = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    described.setdefault("components", {})["schemas"] = schemas
    return described
