"""The OpenAPI document: every route, and what its requests hold, made from the structs that parse them.

What a struct leaves undecoded (`msgspec.Raw`: tools, schemas, content) is any JSON here, as it is there until it is looked at.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal

import msgspec
from msgspec import Struct

import mlxd
from mlxd.api import anthropic, ollama, ollama_store, openai, responses

Endpoint = Callable[..., Awaitable[None]]
#: Method, path as Starlette has it, and what answers.
Route = tuple[str, str, Endpoint]

#: What the endpoints that take a body read in it.
BODIES: dict[Endpoint, type[Struct]] = {
    ollama.show: ollama.Show,
    ollama.generate: ollama.Generate,
    ollama.chat: ollama.Chat,
    ollama.embed: ollama.Embed,
    ollama.embeddings: ollama.EmbedPrompt,
    ollama_store.copy: ollama_store.Copy,
    ollama_store.create: ollama_store.Create,
    ollama_store.delete: ollama.Named,
    ollama_store.pull: ollama_store.Transfer,
    ollama_store.push: ollama_store.Transfer,
    openai.chat: openai.Chat,
    openai.complete: openai.Completion,
    openai.embeddings: openai.Embeddings,
    responses.create: responses.Create,
    anthropic.messages: anthropic.Messages,
    anthropic.count_tokens: anthropic.Messages,
}


class OllamaError(Struct):
    error: str


class OpenAIErrorBody(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Struct):
    error: OpenAIErrorBody


class AnthropicErrorBody(Struct):
    type: str
    message: str


class AnthropicError(Struct):
    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str


def error_of(path: str) -> type[Struct]:
    """The shape in which a path says no."""
    if path.startswith("/v1/messages"):
        return AnthropicError
    return OpenAIError if path.startswith("/v1/") else OllamaError


def document(routes: Iterable[Route]) -> dict[str, Any]:
    routes = list(routes)
    kinds = set(BODIES.values()) | {error_of(path) for _, path, _ in routes}
    ordered = sorted(kinds, key=lambda kind: (kind.__module__, kind.__name__))
    refs, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    reference = dict(zip(ordered, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for method, path, endpoint in routes:
        name = path.replace(":path}", "}")
        paths.setdefault(name, {})[method.lower()] = operation(method, name, endpoint, reference)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlxd",
            "version": mlxd.__version__,
            "description": "Local LLM server for MLX models: Ollama's, OpenAI's and Anthropic's APIs. "
            "Whether an answer is streamed is in the request (`stream`).",
            "license": {"name": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": plain(components)},
    }


def operation(method: str, path: str, endpoint: Endpoint, reference: dict[type[Struct], Any]) -> dict[str, Any]:
    error = {"description": "why not", "content": {"application/json": {"schema": reference[error_of(path)]}}}
    found: dict[str, Any] = {
        "operationId": f"{method.lower()}{path.replace('/', '_').replace('{', '').replace('}', '')}",
        "summary": (inspect.getdoc(endpoint) or f"{method} {path}").partition("\n")[0],
        "responses": {"200": {"description": "the answer"}, "default": error},
    }
    if body := BODIES.get(endpoint):
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference[body]}}}
    if names := [part[1:-1] for part in path.split("/") if part.startswith("{")]:
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return found


def plain(schema: Any) -> Any:
    """Integer fields are typed `int | float`, since JSON knows no integers and strict msgspec refuses 4.0; the document says integer."""
    if isinstance(schema, list):
        return [plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: plain(value) for key, value in schema.items()}
    choices = schema.get("anyOf")
    if isinstance(choices, list):
        kinds = [choice.get("type") for choice in choices]
        if "integer" in kinds and "number" in kinds:
            schema["anyOf"] = [choice for choice in choices if choice.get("type") != "number"]
        if len(schema["anyOf"]) == 1:
            (only,) = schema.pop("anyOf")
            schema = only | schema
    return schema


@functools.cache
def encoded(routes: tuple[Route, ...]) -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(document(routes))
