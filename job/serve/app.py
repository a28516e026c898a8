"""The HTTP application: routes and the protocols behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from importlib import metadata
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from job.model.tasks import TASKS
from job.predict.predictor import Predictor
from job.serve import metrics
from job.serve.access_log import CLIENT_GONE, AccessLog
from job.serve.batching import Batcher, Result
from job.serve.body import BodyReader
from job.serve.errors import ClientGone, RequestError
from job.serve.images import Image
from job.serve.lifecycle import Lifecycle
from job.serve.openapi import Operation, document
from job.serve.page import POLICY, render_page
from job.serve.protocols import instances, open_inference, upload
from job.serve.settings import Settings

T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

PAGE, PREDICT, METRICS = "/", "/predict", "/metrics"
LIVE, READY = "/v2/health/live", "/v2/health/ready"
INLINE_BYTES = 65_536
"""Size up to which a body is parsed in the event loop; handing it to a thread takes as long."""


class Application:
    """Handlers of all routes.

    Args:
        batcher: the model.
        lifecycle: whether the server is ready.
        metrics: of the server.
        settings: of the server.
    """

    def __init__(self, batcher: Batcher, lifecycle: Lifecycle, metrics: metrics.Metrics, settings: Settings) -> None:
        self.batcher = batcher
        self.lifecycle = lifecycle
        self.metrics = metrics
        self.settings = settings
        self.bodies = BodyReader(settings.limits)

    def routes(self) -> list[tuple[str, str, Handler, Operation]]:
        """Method, path, handler and description of all routes."""
        name, settings = self.settings.name, self.settings
        v1, v2 = f"/v1/models/{name}", f"/v2/models/{name}"
        predict = Operation("Classify images: JSON, files of a form, or one image file as it is.", "predict")
        routes: list[tuple[str, str, Handler, Operation]] = [
            ("POST", PREDICT, self.predict, predict),
            ("POST", f"{v1}:predict", self.predict_json, Operation("KServe V1: classify images.", "instances")),
            ("GET", v1, self.v1_model, Operation("KServe V1: whether the model is ready.", unavailable=True)),
            ("GET", "/v1/models", self.v1_models, Operation("KServe V1: name of the model.")),
            ("POST", f"{v2}/infer", self.infer, Operation("Open Inference Protocol: classify images.", "infer")),
            ("GET", v2, self.v2_model, Operation("Open Inference Protocol: inputs and outputs.", unavailable=True)),
            ("GET", f"{v2}/ready", self.v2_ready, Operation("Whether the model is ready.", unavailable=True)),
            ("GET", "/v2", self.v2_server, Operation("Open Inference Protocol: name and version of the server.")),
            ("GET", LIVE, self.live, Operation("Liveness.", unavailable=True)),
            ("GET", READY, self.ready, Operation("Readiness.", unavailable=True)),
            ("GET", METRICS, self.prometheus, Operation("Metrics for Prometheus.", media_type="text/plain")),
            ("GET", PAGE, self.page, Operation("A page with a form.", media_type="text/html")),
            ("POST", PAGE, self.page_with_predictions, Operation("The form's answer.", "form", media_type="text/html")),
        ]
        taken = {path for _, path, _, _ in routes}
        if settings.predict_route is not None and settings.predict_route not in taken:
            routes.append(("POST", settings.predict_route, self.predict, predict))
        if settings.health_route is not None and settings.health_route not in taken - {PAGE}:
            routes.insert(0, ("GET", settings.health_route, self.ready, Operation("Readiness.", unavailable=True)))
        return routes

    async def predict(self, request: Request) -> Response:
        """Answer a request by its Content-Type."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return await self.predict_json(request)
        async with self.bodies.read(request) as body:
            if kind == "multipart/form-data":
                files, parameters = await self._read_form(request, body)
                images = [file.content for file in files]
            else:  # image/…, application/octet-stream, and what curl calls --data-binary
                images, parameters = [body], instances.Parameters()
            results = await self._classify(request, images)
        return self._json(instances.write_predictions(results, parameters))

    async def predict_json(self, request: Request) -> Response:
        """Answer a request of Vertex AI or KServe V1."""
        most = self.settings.limits.max_instances
        async with self.bodies.read(request) as body:
            images, parameters = await self._parse(body, lambda: instances.read_instances(body, most))
            results = await self._classify(request, images)
        return self._json(instances.write_predictions(results, parameters))

    async def infer(self, request: Request) -> Response:
        """Answer a request of the Open Inference Protocol."""
        most = self.settings.limits.max_instances
        json_length = request.headers.get(open_inference.JSON_LENGTH_HEADER)
        async with self.bodies.read(request) as body:
            images, infer = await self._parse(body, lambda: open_inference.read_infer(body, json_length, most))
            results = await self._classify(request, images)
        return self._json(open_inference.write_infer(self.settings.name, infer, results))

    async def page(self, request: Request) -> Response:
        """The page."""
        return self._page([])

    async def page_with_predictions(self, request: Request) -> Response:
        """The page, with predictions of the form's files."""
        async with self.bodies.read(request) as body:
            files, _ = await self._read_form(request, body)
            results = await self._classify(request, [file.content for file in files])
        return self._page([(file.name, result) for file, result in zip(files, results, strict=True)])

    async def v1_models(self, request: Request) -> Response:
        """Names of models."""
        return self._json(msgspec.json.encode({"models": [self.settings.name]}))

    async def v1_model(self, request: Request) -> Response:
        """Whether the model is ready."""
        return self._state({"name": self.settings.name, "ready": self.lifecycle.is_ready}, ok=self.lifecycle.is_ready)

    async def v2_model(self, request: Request) -> Response:
        """Inputs and outputs of the model."""
        net = self._predictor().net
        several = TASKS[net.task].takes_several_labels
        described = open_inference.model_metadata(self.settings.name, len(net.classes), several_labels=several)
        return self._json(msgspec.json.encode(described))

    async def v2_ready(self, request: Request) -> Response:
        """Whether the model is ready."""
        return await self.v1_model(request)

    async def v2_server(self, request: Request) -> Response:
        """Name and version of the server."""
        described = {"name": "job", "version": metadata.version("job"), "extensions": ["binary_tensor_data"]}
        return self._json(msgspec.json.encode(described))

    async def live(self, request: Request) -> Response:
        """Liveness."""
        return self._state({"live": self.lifecycle.is_live}, ok=self.lifecycle.is_live)

    async def ready(self, request: Request) -> Response:
        """Readiness."""
        return self._state({"ready": self.lifecycle.is_ready}, ok=self.lifecycle.is_ready)

    async def prometheus(self, request: Request) -> Response:
        """Metrics."""
        self.metrics.queue.set(self.batcher.admitted)
        self.metrics.in_flight.set(self.lifecycle.in_flight)
        self.metrics.ready.set(self.lifecycle.is_ready)
        return Response(self.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE})

    async def _read_form(self, request: Request, body: bytes) -> tuple[list[upload.UploadedFile], instances.Parameters]:
        content_type, most = request.headers.get("content-type", ""), self.settings.limits.max_instances
        return await self._parse(body, lambda: upload.read_form(body, content_type, most))

    async def _parse(self, body: bytes, parse: Callable[[], T]) -> T:
        """Parse a body, a large one in a thread, so that other requests and probes are answered."""
        return parse() if len(body) <= INLINE_BYTES else await self.batcher.run_in_thread(parse)

    async def _classify(self, request: Request, images: Sequence[Image]) -> list[Result]:
        """Predictions of images, unless the client leaves or it takes too long.

        Raises:
            ClientGone: the client has closed the connection.
            RequestError: there are no predictions in time, or at all.
        """
        results = await _while_connected(request, self.batcher.predict(images), self.settings.limits.timeout)
        self.metrics.unreadable.inc(sum(isinstance(result, Exception) for result in results))
        return results

    def _predictor(self) -> Predictor:
        if self.batcher.predictor is None:
            raise RequestError(503, "the model is not ready yet.")
        return self.batcher.predictor

    def _page(self, rows: Sequence[tuple[str, Result]]) -> Response:
        operations = [(method, path, operation.summary) for method, path, _, operation in self.routes()]
        html = render_page(
            self.settings.name, self.batcher.predictor, operations, rows, is_ready=self.lifecycle.is_ready
        )
        return HTMLResponse(html, headers={"content-security-policy": POLICY})

    def _state(self, state: dict[str, Any], *, ok: bool) -> Response:
        return self._json(msgspec.json.encode(state), status=200 if ok else 503)

    def _json(self, body: bytes, status: int = 200) -> Response:
        predictor = self.batcher.predictor
        headers = {} if predictor is None else {"x-model-sha256": predictor.fingerprint}
        return Response(body, status, headers, "application/json")


async def _while_connected(request: Request, awaitable: Awaitable[T], seconds: float) -> T:
    task = asyncio.ensure_future(awaitable)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        raise RequestError(503, f"there were no predictions within {seconds:g} s. Try again later.")
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(error.status, error.message, error.headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Routes and methods that do not exist."""
    assert isinstance(error, HTTPException)
    message = "there is no such route, or none for this method: GET /openapi.json lists them."
    return _error(error.status_code, message, dict(error.headers or {}))


async def _answer_client_gone(request: Request, error: Exception) -> Response:
    """An answer that nobody reads, for the log."""
    return _error(CLIENT_GONE, "the client has closed the connection.", {})


def _error(status: int, message: str, headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode({"error": message}), status, headers, "application/json")


def create_app(
    batcher: Batcher, lifecycle: Lifecycle, server_metrics: metrics.Metrics, settings: Settings
) -> AccessLog:
    """The ASGI application."""
    handlers = Application(batcher, lifecycle, server_metrics, settings)
    routes = handlers.routes()
    # FastAPI's pages of documentation load scripts from another server; job.serve.page has none.
    app = FastAPI(title="job serve", version=metadata.version("job"), docs_url=None, redoc_url=None)
    for method, path, handler, operation in routes:
        app.add_api_route(path, handler, methods=[method], response_model=None, **operation.route_options())
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientGone, _answer_client_gone)
    quiet = {LIVE, READY, METRICS, f"/v1/models/{settings.name}", f"/v2/models/{settings.name}/ready"}
    if settings.health_route is not None:
        quiet.add(settings.health_route)
    return AccessLog(app, {path for _, path, _, _ in routes} | {"/openapi.json"}, quiet, lifecycle, server_metrics)
