"""The OpenAPI document, and what comes of requests that schemathesis makes from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from server_client import Supervised, supervised

from mlxd import openapi, server

#: What mlxd does not do: push, and blobs.
NOT_YET = ("/api/push", "/api/blobs/{digest}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    with supervised(tmp_path_factory.mktemp("openapi")) as running:
        yield running


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in openapi.document(server.ROUTES)["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_the_document_is_served_and_names_every_route(service: Supervised) -> None:
    document = httpx.get(f"{service.url}/openapi.json", timeout=30).json()
    assert document["openapi"].startswith("3.1")
    routes = {(method.lower(), path.replace(":path}", "}")) for method, path, _ in server.ROUTES}
    assert {(method, path) for path, methods in document["paths"].items() for method in methods} == routes
    assert all(operation["summary"] for _, _, operation in operations())


def test_every_endpoint_that_is_sent_something_says_what_it_reads() -> None:
    bodiless = {("post", "/api/blobs/{digest}"), ("delete", "/v1/responses/{id}")}
    silent = {
        (method, path)
        for method, path, operation in operations()
        if method in ("post", "delete") and "requestBody" not in operation
    }
    assert silent == bodiless


def test_integers_are_integers_in_the_document() -> None:
    schemas = openapi.document(server.ROUTES)["components"]["schemas"]
    seed_field = schemas["Options"]["properties"]["seed"]
    assert [choice["type"] for choice in seed_field["anyOf"]] == ["integer", "null"]
    assert not [name for name, schema in schemas.items() if {"integer", "number"} <= kinds(schema)]


def kinds(schema: Any) -> set[str]:
    """The types that stand side by side in one choice of a schema; the richest choice there is."""
    found = [{str(choice.get("type")) for choice in schema["anyOf"]}] if isinstance(schema, dict) and "anyOf" in schema else []
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    return max([*found, *map(kinds, children)], key=len, default=set())


class Caller:
    """Sends one operation's cases, with a right model's name if one is given, and looks at what comes back."""

    def __init__(self, url: str, cases: int, operation: Any, model: str | None, counts: Counter[tuple[str, int]]):
        self.url = url
        self.cases = cases
        self.operation = operation
        self.model = model
        self.counts = counts

    def run(self) -> None:
        def call(case: Any) -> None:
            self.call(case)

        limits = settings(
            max_examples=self.cases, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        seed(11435)(limits(given(case=self.operation.as_strategy())(call)))()

    def call(self, case: Any) -> None:
        if self.model and isinstance(case.body, dict):
            case.body["model"] = self.model
        answer = case.call(base_url=self.url, timeout=60)
        self.counts[self.operation.label, answer.status_code] += 1
        if answer.status_code in (503, 507):
            assert answer.text and "retry-after" in answer.headers
        elif answer.status_code == 501:
            assert self.operation.path in NOT_YET
        else:
            assert answer.status_code < 500, answer.text


@pytest.mark.parametrize("cases", [3, pytest.param(60, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_whatever_the_document_allows_is_answered_and_never_with_a_failure(service: Supervised, cases: int) -> None:
    """`cases` of each operation, and as many with a model that is there, which get further: 2,000 of them in the long run. 501: push and
    blobs; 503 and 507 give a reason."""
    document = json.loads(openapi.encoded(tuple(server.ROUTES)))
    counts: Counter[tuple[str, int]] = Counter()
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()
        for model in (None, "mlxd-tiny") if operation.body else (None,):
            Caller(service.url, cases, operation, model, counts).run()
    told = "\n".join(f"{label} {status}: {count}" for (label, status), count in sorted(counts.items()))
    print(told)
    for path in (
        "/api/chat",
        "/api/generate",
        "/api/embed",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
    ):
        assert counts[f"POST {path}", 400], told
    assert sum(count for (_, status), count in counts.items() if status == 200) > len(server.ROUTES) // 4, told
    assert cases < 60 or sum(counts.values()) >= 2000, told
