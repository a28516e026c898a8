"""The server's own OpenAPI document, and requests that schemathesis makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from serving import Running, running

EXAMPLES = 12
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(limits={"max_body_mb": 1}) as run:
        yield run


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    described: dict[str, Any] = server.client.get("/openapi.json").json()
    return described


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name.lower())
def test_answers_are_those_of_the_document(server: Running, document: dict[str, Any], mode: GenerationMode) -> None:
    """No answer is missing in the document, has another type, or says that the server failed.

    Bodies of the right form are refused nevertheless: random text is no image.
    """
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=f"http://127.0.0.1:{server.port}")
    checked = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode == GenerationMode.NEGATIVE and not operation.body:
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        def check(case: Any) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance()], timeout=240)

        check()
        checked.add((operation.method.upper(), operation.path))
    assert ("POST", "/v2/models/model/infer") in checked
    assert server.client.get("/v2/health/ready").status_code == 200


def positive_data_acceptance() -> Any:
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    return positive_data_acceptance


def test_every_route_is_described(document: dict[str, Any], server: Running) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"]
            answer = server.client.request(method, path)
            assert str(answer.status_code) in operation["responses"], (method, path, answer.text)
            kind = answer.headers["content-type"].partition(";")[0]
            assert kind in operation["responses"][str(answer.status_code)]["content"]


def test_references_resolve(document: dict[str, Any]) -> None:
    text = json.dumps(document, allow_nan=False)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
