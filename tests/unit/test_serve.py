"""The protocols of the server, its batches and its limits; through real sockets, in this process."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import Running, Slow, running, tiny_predictor
from support import COLOURS, picture, run_here, wait_for

from job.errors import ConfigError, DivergedError
from job.serve.batching import Batcher, Pending
from job.serve.metrics import Metrics
from job.serve.settings import Limits, Settings, VertexEnvironment

PICTURES = [picture(colour, seed) for seed, colour in enumerate(COLOURS.values())]


@pytest.fixture(scope="module")
def server() -> Any:
    with running(limits={"max_instances": 8, "max_body_mb": 2, "max_image_pixels": 1_000_000}) as run:
        yield run


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def expected(images: list[Any]) -> list[dict[str, Any]]:
    return [prediction.as_json() for prediction in tiny_predictor().predict(images)]


def assert_same(answers: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> None:
    assert [answer["label"] for answer in answers] == [prediction["label"] for prediction in predictions]
    for answer, prediction in zip(answers, predictions, strict=True):
        assert answer["probabilities"] == pytest.approx(prediction["probabilities"], abs=1e-6)


@pytest.mark.parametrize(
    "instance",
    [
        lambda text: {"b64": text},
        lambda text: {"image": {"b64": text}},
        lambda text: {"image_bytes": {"b64": text}, "key": "7"},
        lambda text: {"content": text, "mimeType": "image/jpeg"},
        lambda text: text,
        lambda text: {"b64": f"data:image/jpeg;base64,{text}"},
        lambda text: {"b64": "\n".join(re.findall(".{1,76}", text))},
        lambda text: {"b64": text.rstrip("=").replace("+", "-").replace("/", "_")},
    ],
)
@pytest.mark.parametrize("route", ["/predict", "/v1/models/model:predict"])
def test_instances_as_vertex_and_kserve_v1_send_them(server: Running, route: str, instance: Any) -> None:
    body = {"instances": [instance(b64(content)) for content in PICTURES]}
    answer = server.client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"predictions"}
    assert_same(answer.json()["predictions"], expected(PICTURES))
    assert answer.headers["x-model-sha256"] == "0123456789abcdef"


def test_top_k(server: Running) -> None:
    body = {"instances": [{"b64": b64(PICTURES[0])}], "parameters": {"top_k": 2}}
    (whole,) = expected(PICTURES[:1])
    for answer in (
        server.client.post("/predict", json=body),
        server.client.post("/predict", files={"image": PICTURES[0]}, data={"top_k": "2"}),
    ):
        (prediction,) = answer.json()["predictions"]
        chances = sorted(whole["probabilities"].items(), key=lambda item: -item[1])
        assert list(prediction["probabilities"]) == [name for name, _ in chances[:2]]


def test_files_and_one_file_as_it_is(server: Running) -> None:
    files = [("image", (f"{number}.jpg", content)) for number, content in enumerate(PICTURES)]
    assert_same(server.client.post("/predict", files=files).json()["predictions"], expected(PICTURES))
    for kind in ("image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", ""):
        answer = server.client.post("/predict", content=PICTURES[1], headers={"content-type": kind})
        assert_same(answer.json()["predictions"], expected(PICTURES[1:2]))


def test_an_unreadable_image_has_an_error_beside_the_predictions_of_others(server: Running) -> None:
    body = {"instances": [b64(PICTURES[0]), b64(b"no image"), b64(PICTURES[2])]}
    answer = server.client.post("/predict", json=body)
    assert answer.status_code == 200
    first, second, third = answer.json()["predictions"]
    assert_same([first, third], expected([PICTURES[0], PICTURES[2]]))
    assert second == {"error": "the file is no image of a known format (8 bytes)."}


def infer(server: Running, tensor: dict[str, Any], **more: Any) -> httpx.Response:
    return server.client.post("/v2/models/model/infer", json={"inputs": [{"name": "image", **tensor}], **more})


def outputs_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_name"] == "model"
    return {output["name"]: output for output in answer.json()["outputs"]}


def test_open_inference_protocol(server: Running) -> None:
    described = server.client.get("/v2/models/model").json()
    assert described["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    tensor = {"datatype": "BYTES", "shape": [3], "data": [b64(content) for content in PICTURES]}
    answer = infer(server, tensor, id="42")
    assert answer.json()["id"] == "42"
    outputs = outputs_of(answer)
    assert [(each["name"], each["datatype"]) for each in described["outputs"]] == [
        (each["name"], each["datatype"]) for each in outputs.values()
    ]
    predictions = expected(PICTURES)
    assert outputs["label"]["shape"] == [3]
    assert outputs["label"]["data"] == [prediction["label"] for prediction in predictions]
    assert outputs["probabilities"]["shape"] == [3, 3]
    flat = [value for prediction in predictions for value in prediction["probabilities"].values()]
    assert outputs["probabilities"]["data"] == pytest.approx(flat, abs=1e-6)
    assert set(outputs_of(infer(server, tensor, outputs=[{"name": "label"}]))) == {"label"}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("nested", [False, True])
def test_pixels_by_open_inference_protocol(server: Running, channels: int, nested: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, channels), np.uint8)
    data = pixels.tolist() if nested else pixels.reshape(-1).tolist()
    outputs = outputs_of(infer(server, {"datatype": "UINT8", "shape": list(pixels.shape), "data": data}))
    predictions = expected(list(pixels))
    assert outputs["label"]["data"] == [prediction["label"] for prediction in predictions]
    flat = [value for prediction in predictions for value in prediction["probabilities"].values()]
    assert outputs["probabilities"]["data"] == pytest.approx(flat, abs=1e-6)


def binary_request(tensor: dict[str, Any], binary: bytes, size: int | None = None) -> tuple[bytes, dict[str, str]]:
    parameters = {"binary_data_size": len(binary) if size is None else size}
    text = json.dumps({"inputs": [{"name": "image", "parameters": parameters, **tensor}]}).encode()
    headers = {"inference-header-content-length": str(len(text)), "content-type": "application/octet-stream"}
    return text + binary, headers


def test_binary_tensors_after_the_json(server: Running) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    elements = b"".join(len(content).to_bytes(4, "little") + content for content in PICTURES)
    for images, tensor, binary in (
        (PICTURES, {"datatype": "BYTES", "shape": [3]}, elements),
        ([pixels], {"datatype": "UINT8", "shape": [1, 5, 7, 3]}, pixels.tobytes()),
    ):
        content, headers = binary_request(tensor, binary)
        answer = server.client.post("/v2/models/model/infer", content=content, headers=headers)
        assert outputs_of(answer)["label"]["data"] == [prediction["label"] for prediction in expected(images)]
    for binary, size in ((elements[:-1], None), (elements, 1), (b"\xff\xff\xff\xff", None)):
        content, headers = binary_request({"datatype": "BYTES", "shape": [3]}, binary, size)
        assert server.client.post("/v2/models/model/infer", content=content, headers=headers).status_code == 400


def test_several_labels() -> None:
    with running(lambda: tiny_predictor(task="multilabel")) as run:
        (wanted,) = tiny_predictor(task="multilabel").predict(PICTURES[:1])
        (prediction,) = run.client.post("/predict", files={"image": PICTURES[0]}).json()["predictions"]
        assert prediction["labels"] == wanted.as_json()["labels"]
        outputs = outputs_of(infer(run, {"datatype": "BYTES", "shape": [1], "data": [b64(PICTURES[0])]}))
        assert outputs["is_predicted"]["data"] == [name in prediction["labels"] for name in ("blue", "red", "green")]
        assert "is_predicted" in {each["name"] for each in run.client.get("/v2/models/model").json()["outputs"]}
        page = run.client.post("/", files={"image": PICTURES[0]})
        assert page.status_code == 200


def test_state_routes(server: Running) -> None:
    for route, answer in {
        "/v1/models": {"models": ["model"]},
        "/v1/models/model": {"name": "model", "ready": True},
        "/v2/models/model/ready": {"name": "model", "ready": True},
        "/v2/health/live": {"live": True},
        "/v2/health/ready": {"ready": True},
    }.items():
        assert server.client.get(route).json() == answer
    assert set(server.client.get("/v2").json()) == {"name", "version", "extensions"}
    missing = server.client.get("/v1/models/other")
    assert (missing.status_code, set(missing.json())) == (404, {"error"})
    refused = server.client.get("/predict")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_the_routes_that_vertex_ai_chooses() -> None:
    routes = {
        "health_route": "/v1/endpoints/1/deployedModels/2",
        "predict_route": "/v1/endpoints/1/deployedModels/2:predict",
    }
    with running(**routes) as run:
        assert run.client.get(routes["health_route"]).status_code == 200
        answer = run.client.post(routes["predict_route"], json={"instances": [{"b64": b64(PICTURES[0])}]})
        assert_same(answer.json()["predictions"], expected(PICTURES[:1]))
    with running(health_route="/", predict_route="/predict") as run:  # routes that exist already
        assert run.client.get("/").json() == {"ready": True}


def test_the_variables_of_vertex_ai() -> None:
    variables = {
        "AIP_HTTP_PORT": "8081",
        "AIP_HEALTH_ROUTE": "/health",
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_STORAGE_URI": "gs://bucket/model",
    }
    assert VertexEnvironment.of(variables) == VertexEnvironment(8081, "/predict", "/health", "gs://bucket/model")
    assert VertexEnvironment.of({"AIP_HTTP_PORT": ""}) == VertexEnvironment()
    with pytest.raises(ConfigError, match="AIP_HTTP_PORT"):
        VertexEnvironment.of({"AIP_HTTP_PORT": "tcp://10.0.0.1:80"})
    with pytest.raises(ConfigError, match="AIP_PREDICT_ROUTE"):
        Settings(predict_route="/{x}")


def bomb(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


GIF = b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"
BAD_IMAGES = {
    "empty": b"",
    "text": b"hello",
    "truncated": PICTURES[0][: len(PICTURES[0]) // 2],
    "bomb": bomb(3000),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "gif": GIF,
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(server: Running, name: str) -> None:
    content = BAD_IMAGES[name]
    for answer in (
        server.client.post("/predict", content=content, headers={"content-type": "image/png"}),
        server.client.post("/predict", files={"image": ("x.png", content)}),
        server.client.post("/predict", json={"instances": [{"b64": b64(content)}]}),
        infer(server, {"datatype": "BYTES", "shape": [1], "data": [b64(content)]}),
    ):
        assert answer.status_code == 400, answer.text
        assert set(answer.json()) == {"error"}
    page = server.client.post("/", files={"image": ("<script>.png", content)})
    assert page.status_code == 200
    assert "<script>" not in page.text


DEEP = b"[" * 100_000
PIXELS = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 1, 3]}
BAD_BODIES: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "text": (b"hello", 400),
    "null": (b"null", 400),
    "list": (b"[]", 400),
    "no instances": (b'{"instances": []}', 400),
    "a number": (b'{"instances": [7]}', 400),
    "NaN": (b'{"instances": [NaN]}', 400),
    "no image": (b'{"instances": [{}]}', 400),
    "two images": (b'{"instances": [{"b64": "AA==", "content": "AA=="}]}', 400),
    "no base64": (b'{"instances": [{"b64": "!!!"}]}', 400),
    "not ASCII": ('{"instances": [{"b64": "äöü"}]}'.encode(), 400),
    "a URI": (b'{"instances": [{"b64": "http://169.254.169.254/computeMetadata/v1/"}]}', 400),
    "a bucket": (b'{"instances": ["gs://bucket/image.jpg"]}', 400),
    "not UTF-8": (b'{"instances": ["\xff\xfe"]}', 400),
    "too many images": (b'{"instances": [%s]}' % b",".join([b'"AA=="'] * 9), 413),
    "deep": (b'{"instances": ' + b"[" * 100 + b"]" * 100 + b"}", 400),
    "too deep": (b'{"instances": ' + DEEP, 413),
    "many objects": (b'{"instances": [' + b"{}," * 100_000 + b"{}]}", 413),
    "many strings": (b'{"instances": [' + b'"",' * 100_000 + b'""]}', 413),
    "a huge number": (b'{"instances": [' + b"9" * 1_000_000 + b"]}", 400),
    "unknown parameter": (b'{"instances": ["AA=="], "parameters": {"topk": 1}}', 400),
    "negative parameter": (b'{"instances": ["AA=="], "parameters": {"top_k": -1}}', 400),
    "too large": (b" " * 2_000_001, 413),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_json(server: Running, name: str) -> None:
    body, status = BAD_BODIES[name]
    for route in ("/predict", "/v1/models/model:predict"):
        answer = server.client.post(route, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, set(answer.json())) == (status, {"error"}), answer.text
    answer = server.client.post("/v2/models/model/infer", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 413)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [1, 2]}, "does not fit"),
        ({"data": [1, 2, 256]}, "not valid"),
        ({"data": [1, 2, -1]}, "not valid"),
        ({"data": [1, 2, 0.5]}, "not valid"),
        ({"data": [1, 2, True]}, "not valid"),
        ({"data": [[[[1, 2], [3]]]]}, "different lengths"),
        ({"data": "abc"}, "not valid"),
        ({"data": None}, "not valid"),
        ({}, "no data"),
        ({"data": [[[[[1]]]]]}, "not valid"),
        ({"data": [1, 2, 3], "datatype": "FP32"}, "FP32"),
        ({"data": [1, 2, 3], "shape": [1, 3, 5, 5]}, "Channels come last"),
        ({"data": [], "shape": [0, 1, 1, 3]}, "no images"),
        ({"data": [1, 2, 3], "shape": [9, 1, 1, 3]}, "max_instances"),
        ({"data": [1], "shape": [2**31, 2**31, 2**31, 3]}, "max_instances"),
        ({"data": [1], "shape": [1, 2**31, 2**31, 3]}, "does not fit"),
        ({"data": [1], "shape": [1, 2000, 2000, 3]}, "does not fit"),
        ({"data": ["AA=="], "datatype": "BYTES", "shape": [2]}, "does not fit"),
        ({"data": [], "datatype": "BYTES", "shape": [0]}, "no image"),
        ({"data": [7], "datatype": "BYTES", "shape": [1]}, "not valid"),
    ],
)
def test_bad_tensors(server: Running, changes: dict[str, Any], message: str) -> None:
    answer = server.client.post("/v2/models/model/infer", json={"inputs": [{**PIXELS, **changes}]})
    assert answer.status_code in (400, 413), answer.text
    assert re.search(message, answer.json()["error"]), answer.text


def test_tensors_of_too_many_pixels(server: Running) -> None:
    content, headers = binary_request({"datatype": "UINT8", "shape": [1, 1001, 1000, 1]}, bytes(1001 * 1000))
    answer = server.client.post("/v2/models/model/infer", content=content, headers=headers)
    assert answer.status_code == 400
    assert "max_image_pixels" in answer.json()["error"]


def test_outputs_that_do_not_exist_and_several_inputs(server: Running) -> None:
    bad = {**PIXELS, "data": [1, 2, 3]}
    answer = server.client.post("/v2/models/model/infer", json={"inputs": [bad], "outputs": [{"name": "x"}]})
    assert "no output 'x'" in answer.json()["error"]
    assert server.client.post("/v2/models/model/infer", json={"inputs": [bad, bad]}).status_code == 400


FORM = "multipart/form-data; boundary=x"
FILE = b'--x\r\ncontent-disposition: form-data; name="a"; filename="b"\r\n\r\nabc'
FIELD = b'--x\r\ncontent-disposition: form-data; name="top_k"\r\n\r\n'
BAD_FORMS = {
    "no boundary": (b"", "multipart/form-data"),
    "a long boundary": (b"", f"multipart/form-data; boundary={'x' * 1000}"),
    "empty": (b"", FORM),
    "another boundary": (b"--y\r\n\r\n--y--", FORM),
    "no end": (FILE, FORM),
    "no file": (FIELD + b"1\r\n--x--", FORM),
    "no name": (b"--x\r\ncontent-type: text/plain\r\n\r\nabc\r\n--x--", FORM),
    "many headers": (b"--x\r\n" + b"a: b\r\n" * 10_000, FORM),
    "a long header": (b"--x\r\na: " + b"b" * 100_000, FORM),
    "many files": ((FILE + b"\r\n") * 1000 + b"--x--", FORM),
    "bad option": (FIELD + b'1,"x":{}\r\n' + FILE + b"\r\n--x--", FORM),
    "almost a boundary": (b"--x\r\n\r\n" + b"\r\n--" * 100_000, FORM),
}


@pytest.mark.parametrize("name", BAD_FORMS)
def test_bad_forms(server: Running, name: str) -> None:
    body, kind = BAD_FORMS[name]
    for route in ("/predict", "/"):
        answer = server.client.post(route, content=body, headers={"content-type": kind})
        assert answer.status_code in (400, 413), answer.text
        assert set(answer.json()) == {"error"}


def test_compressed_and_endless_bodies(server: Running) -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    assert server.client.post("/predict", content=b"\x1f\x8b", headers=headers).status_code == 415
    assert server.client.post("/predict", content=(bytes(100_000) for _ in range(1000))).status_code == 413


def test_concurrent_requests_share_batches_and_a_lone_one_does_not_wait() -> None:
    slow = Slow()
    with running(lambda: slow, limits={"max_batch_size": 8, "max_wait_ms": 2_000}) as run:
        slow.batches.clear()
        batcher, limits = run.server.lifecycle.batcher, run.server.lifecycle.batcher.limits
        # Longer than the client waits for the answer.
        batcher.limits = SimpleNamespace(**{**vars(limits), "max_wait_ms": 1e6})
        assert run.client.post("/predict", files={"image": PICTURES[0]}).status_code == 200
        batcher.limits = limits
        slow.go.clear()
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(run.client.post, "/predict", files={"image": PICTURES[n % 3]}) for n in range(12)]
            wait_for(lambda: run.server.lifecycle.batcher.admitted == 12)
            slow.go.set()
            for number, answer in enumerate(answers):
                (prediction,) = answer.result().json()["predictions"]
                assert_same([prediction], expected([PICTURES[number % 3]]))
        assert slow.batches[0] == 1
        assert len(slow.batches) < 8
        assert max(slow.batches) <= 8
        assert sum(slow.batches) == 13
        assert run.metric("job_serve_batch_size_count") == len(slow.batches)
        assert run.metric("job_serve_batch_size_sum") == 13


def test_a_full_queue_answers_429_and_forgets_clients_that_left() -> None:
    slow = Slow()
    with running(lambda: slow, limits={"max_queue": 4, "max_instances": 4, "max_batch_size": 2}) as run:
        slow.batches.clear()
        slow.go.clear()
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(run.client.post, "/predict", files={"image": PICTURES[0]})
            wait_for(lambda: slow.batches)
            with socket.create_connection(("127.0.0.1", run.port)) as leaving:  # a client that leaves
                header = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(PICTURES[0])}\r\n\r\n"
                leaving.sendall(header.encode() + PICTURES[0])
                wait_for(lambda: run.server.lifecycle.batcher.admitted == 2)
            others = [pool.submit(run.client.post, "/predict", files={"image": PICTURES[1]}) for _ in range(2)]
            wait_for(lambda: run.server.lifecycle.batcher.admitted == 4)
            refused = run.client.post("/predict", files={"image": PICTURES[0]})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert run.client.get("/v2/health/ready").status_code == 200
            for status in ("429", "499"):  # counted after the answer
                wait_for(lambda: run.metric("job_serve_requests_total", route="/predict", status=status) == 1)  # noqa: B023
            slow.go.set()
            assert [each.result().status_code for each in (first, *others)] == [200] * 3
        wait_for(lambda: run.server.lifecycle.batcher.admitted == 0)
        assert sum(slow.batches) == 3  # the image of the client that left was not computed


def test_bodies_of_all_requests_are_limited_together() -> None:
    slow = Slow()
    with running(lambda: slow, limits={"max_body_mb": 0.01, "max_pending_mb": 0.01}) as run:
        slow.go.clear()
        with ThreadPoolExecutor(1) as pool:
            content = PICTURES[0] + bytes(9000 - len(PICTURES[0]))
            first = pool.submit(run.client.post, "/predict", content=content)
            wait_for(lambda: run.server.lifecycle.batcher.admitted == 1)
            assert run.client.post("/predict", content=content).status_code == 429
            slow.go.set()
            assert first.result().status_code == 200
        assert run.client.post("/predict", content=content).status_code == 200


def test_a_request_without_predictions_in_time() -> None:
    slow = Slow()
    with running(lambda: slow, limits={"timeout": 0.5}) as run:
        slow.go.clear()
        answer = run.client.post("/predict", files={"image": PICTURES[0]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        slow.go.set()


def test_readiness_comes_when_the_model_is_warm() -> None:
    slow, loads = Slow(), threading.Event()

    def load() -> Any:
        assert loads.wait(60)
        return slow

    slow.go.clear()
    with running(load, ready=False, limits={"max_batch_size": 6}) as run:
        for _ in range(2):
            assert run.client.get("/v2/health/ready").status_code == 503
            assert run.client.get("/v1/models/model").json() == {"name": "model", "ready": False}
            assert run.client.get("/v2/health/live").status_code == 200
            refused = run.client.post("/predict", content=PICTURES[0])
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert run.client.get("/").status_code == 200
            loads.set()
            wait_for(lambda: slow.batches)  # it warms up
        slow.go.set()
        wait_for(lambda: run.client.get("/v2/health/ready").status_code == 200)
        assert slow.batches == [1, 2, 4, 6]
        assert run.client.post("/predict", content=PICTURES[0]).status_code == 200
        assert run.metric("job_serve_model_info", **_labels(slow)) == 1


def _labels(slow: Slow) -> dict[str, str]:
    return {"sha256": slow.fingerprint, "backbone": slow.net.name, "classes": "3", "device": "cpu"}


def test_a_batch_that_fails_and_a_model_that_fails_for_good() -> None:
    slow = Slow()
    with running(lambda: slow) as run:
        slow.error = DivergedError("not finite")
        assert run.client.post("/predict", content=PICTURES[0]).status_code == 500
        slow.error = None
        assert run.client.post("/predict", content=PICTURES[0]).status_code == 200
        slow.error = RuntimeError("a device that is lost, with a secret in the message")
        for _ in range(3):
            answer = run.client.post("/predict", content=PICTURES[0])
            assert answer.status_code == 500
            assert "secret" not in answer.text
        run.thread.join(240)
        assert not run.thread.is_alive()
        assert run.server.lifecycle.batcher.failure is slow.error


def test_requests_that_wait_for_a_model_that_fails_are_answered() -> None:
    slow = Slow()
    with running(lambda: slow, limits={"max_batch_size": 1}) as run, ThreadPoolExecutor(8) as pool:
        slow.go.clear()
        slow.error = RuntimeError("a device that is lost")
        waiting = [pool.submit(run.client.post, "/predict", content=PICTURES[0]) for _ in range(8)]
        wait_for(lambda: run.server.lifecycle.batcher.admitted == 8)
        slow.go.set()
        assert {each.result().status_code for each in waiting} == {500}  # the client waits shorter than the grace


def test_images_of_a_request_that_is_given_up_are_not_kept() -> None:
    async def main() -> None:
        batcher = Batcher(tiny_predictor, Settings(num_workers=1), Metrics(), lambda: None)
        batcher.start()
        while not batcher.is_ready:
            await asyncio.sleep(0.01)
        is_free = threading.Event()
        batcher.run_in_thread(is_free.wait)  # the only decoding thread
        try:
            task = asyncio.ensure_future(batcher.predict([PICTURES[0]]))
            await asyncio.sleep(0)
            (pending,) = (each for each in gc.get_objects() if isinstance(each, Pending) and each.image is not None)
            held = [pending.image]
            task.cancel()
            await asyncio.wait([task])
            held.append(pending.image)
            assert held == [PICTURES[0], None]
        finally:
            is_free.set()
        while batcher.admitted:
            await asyncio.sleep(0.01)
        assert batcher.close()

    asyncio.run(asyncio.wait_for(main(), 240))


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_draining_finishes_what_was_accepted() -> None:
    slow = Slow()
    with running(lambda: slow, drain_delay=2.0) as run, ThreadPoolExecutor(2) as pool:
        # The end of the delay takes effect when the late request was accepted, however long that takes.
        stopping, delay_ends = run.server.lifecycle.stopping, list[float]()
        run.server.lifecycle.stopping = SimpleNamespace(
            is_set=stopping.is_set, set=lambda: delay_ends.append(time.monotonic())
        )
        slow.go.clear()
        first = pool.submit(run.client.post, "/predict", content=PICTURES[0])
        wait_for(lambda: run.server.lifecycle.batcher.admitted == 1)
        began = time.monotonic()
        run.drain()
        wait_for(lambda: run.client.get("/v2/health/ready").status_code == 503)
        assert run.client.get("/v2/health/live").status_code == 200
        late = pool.submit(run.client.post, "/predict", content=PICTURES[1])  # a load balancer that does not know yet
        wait_for(lambda: run.server.lifecycle.batcher.admitted == 2)
        wait_for(lambda: delay_ends)
        assert delay_ends[0] - began > 1.9
        run.loop.call_soon_threadsafe(stopping.set)
        wait_for(lambda: is_refused(run.port))
        assert run.thread.is_alive()
        slow.go.set()
        for answer in (first.result(), late.result()):
            assert answer.status_code == 200
            assert answer.headers["connection"] == "close"
        run.thread.join(240)
        assert not run.thread.is_alive()
        assert run.server.lifecycle.in_flight == 0


def test_the_access_log_has_no_data_of_clients(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    def logged() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "job.serve.access_log"]

    with caplog.at_level(logging.INFO, "job.serve"):
        server.client.post("/predict?token=hunter2", content=PICTURES[0], headers={"authorization": "Bearer hunter2"})
        server.client.get("/secret-path-hunter2")
        server.client.get("/v2/health/ready")
        server.client.request("HUNTER2", "/predict")
        wait_for(lambda: len(logged()) == 3)  # a request is logged after the client has its answer
    records = logged()
    assert [record.getMessage().rsplit(" ", 2)[0] for record in records] == [
        "POST /predict 200",
        "GET other 404",
        "other /predict 405",
    ]
    own = [str(vars(record)) for record in caplog.records if record.name.startswith("job")]
    assert "hunter2" not in "".join(own).lower()
    assert records[0].fields["client"] == "127.0.0.1"


def test_metrics(server: Running) -> None:
    before = server.metric("job_serve_unreadable_images_total")
    server.client.post("/predict", content=b"no image")
    text = server.client.get("/metrics").text
    assert server.metric("job_serve_unreadable_images_total") == before + 1
    for name in ("job_serve_request_seconds_bucket", "job_serve_queue_images 0.0", "job_serve_ready 1.0"):
        assert name in text
    assert 'job_serve_model_info{backbone="timm/test_resnet"' in text
    assert "process_resident_memory_bytes" in text


def test_the_page_has_no_script_and_allows_none(server: Running) -> None:
    answer = server.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "<script" not in answer.text
    assert "http:" not in answer.text.replace(f"http://127.0.0.1:{server.port}", "")
    files = [("image", ("<b>&\u202e.jpg", PICTURES[0])), ("image", ("two.jpg", b"no image"))]
    shown = server.client.post("/", files=files).text
    assert "<b>" not in shown
    assert "the file is no image of a known format" in shown
    assert expected(PICTURES[:1])[0]["label"] in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "serve needs a checkpoint"),
        (["x", "--name", "a/b"], "--name"),
        (["x", "--port", "70000"], "--port"),
        (["x", "--max_batch_size", "0"], "--max_batch_size"),
        (["x", "--max_queue", "1"], "--max_queue 1 has no room"),
        (["x", "--max_body_mb", "nan"], "--max_body_mb"),
        (["x", "--max_pending_mb", "1"], "--max_pending_mb"),
        (["x", "--grace", "3"], "--drain_delay 5 must be at least 0 and below --grace 3"),
        (["x", "--max_wait_ms", "-1"], "--max_wait_ms"),
        (["x", "--prot", "80"], "--port"),
        (["/nowhere", "--port", "0"], "/nowhere"),
        (["x", "--host", "203.0.113.1"], "--host"),
        (["x", "--device", "gpu"], "--device gpu cannot be used"),
        (["x", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
    ],
)
def test_mistakes_end_with_2(options: list[str], message: str, tmp_path: Path) -> None:
    outcome = run_here("serve", *options)
    assert outcome.returncode == 2, outcome.output
    assert message in outcome.output
    assert "Traceback" not in outcome.output


def test_a_port_that_is_taken(server: Running) -> None:
    outcome = run_here("serve", "x", "--host", "127.0.0.1", "--port", server.port)
    assert outcome.returncode == 2
    assert "Choose another --host or --port" in outcome.output


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.cli.serve.PACKAGES", ("fastapi", "no_such_package"))
    outcome = run_here("serve", "x")
    assert outcome.returncode == 2
    assert 'pip install ".[serve]"' in outcome.output


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="--timeout"):
        Limits(timeout=float("inf"))
