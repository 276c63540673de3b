"""docs/compatibility.md against the code: every route and every field of a request is on that page and no other, "no" is a 400 that
names the field, and "ignored" changes nothing."""

from __future__ import annotations

import copy
import re
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from msgspec import Struct
from server_client import Supervised, supervised

from mlxd import openapi
from mlxd.api import ollama
from mlxd.server import ROUTES

PAGE = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()
ENDPOINTS = {(method, path.replace(":path}", "}")): endpoint for method, path, endpoint in ROUTES}
#: Fields that a struct holds undecoded, and what they are decoded to later.
UNDECODED: dict[tuple[type[Struct], str], Any] = {(ollama.Chat, "tools"): list[ollama.Tool]}


class Section(NamedTuple):
    """The fields of an endpoint, each with its word; `same_as`: the endpoint whose fields they are."""

    fields: dict[str, str]
    same_as: tuple[str, str] | None


def sections() -> Iterator[tuple[tuple[str, str], Section]]:
    for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        match = re.fullmatch(r"`([A-Z]+) (\S+)`", head)
        assert match, head
        rows = re.findall(r"^\| (`.+?`) \| (\S+) \|.*\|$", text, flags=re.MULTILINE)
        assert len(rows) == len(re.findall(r"^\| `", text, flags=re.MULTILINE)), head
        fields = [(field, word) for names, word in rows for field in re.findall(r"`([^`]+)`", names)]
        assert len(dict(fields)) == len(fields), f"{head}: a field is there twice"
        other = re.search(r"^Fields: those of `([A-Z]+) (\S+)`", text, flags=re.MULTILINE)
        yield (match[1], match[2]), Section(dict(fields), (other[1], other[2]) if other else None)


SECTIONS = dict(sections())


def structs(kind: Any) -> Iterator[tuple[type[Struct], str]]:
    """The structs in a type, each with "[]" when it is one of many."""
    if isinstance(kind, type) and issubclass(kind, Struct):
        yield kind, ""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Literal, dict):
        return
    for one in inner[:1] if origin is typing.Annotated else inner:
        for found, many in structs(one):
            yield found, "[]" + many if origin is list else many


def paths(kind: type[Struct], prefix: str = "", above: tuple[type[Struct], ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every field, at every depth, with its type; a struct within itself is not followed again."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        path, hint = prefix + field.encode_name, UNDECODED.get((kind, field.name), hints[field.name])
        yield path, hint
        for found, many in structs(hint):
            if found is not kind and found not in above:
                yield from paths(found, f"{path}{many}.", (*above, kind))


def known(endpoint: tuple[str, str]) -> dict[str, Any]:
    """The fields of an endpoint's struct."""
    body = openapi.BODIES.get(ENDPOINTS[endpoint])
    return dict(paths(body)) if body else {}


# --- the page and the structs --------------------------------------------------------------------------------------------------------


def test_every_route_has_a_section_and_every_section_a_route() -> None:
    assert list(SECTIONS) == list(ENDPOINTS), "the same, in the same order"


@pytest.mark.parametrize("endpoint", SECTIONS, ids=" ".join)
def test_the_fields_of_a_section_are_those_of_the_struct_and_ignored_ones(endpoint: tuple[str, str]) -> None:
    """A field that no struct has cannot be refused, so it can only be ignored."""
    fields, same_as = SECTIONS[endpoint]
    if same_as:
        assert not fields
        assert openapi.BODIES[ENDPOINTS[endpoint]] is openapi.BODIES[ENDPOINTS[same_as]]
        return
    assert set(fields.values()) <= {"yes", "no", "ignored"}
    assert known(endpoint).keys() - fields.keys() == set(), "not on the page"
    assert {field for field in fields.keys() - known(endpoint).keys() if fields[field] != "ignored"} == set(), "not in the code"


# --- the page and the server ---------------------------------------------------------------------------------------------------------

ASK = "n=1"
TURN: dict[str, Any] = {"role": "user", "content": ASK}
PARTS = [{"type": "text", "text": ASK}]
FUNCTION = {"name": "f", "arguments": {}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
#: What each endpoint is sent, with a place for every field on the page.
BODIES: dict[str, dict[str, Any]] = {
    "/api/show": {"options": {}},
    "/api/generate": {"prompt": ASK, "stream": False, "options": {}},
    "/api/chat": {
        "messages": [TURN | {"tool_calls": [{"function": FUNCTION}]}, TURN],
        "stream": False,
        "tools": [TOOL],
        "options": {},
    },
    "/api/embed": {"input": "one", "options": {}},
    "/api/embeddings": {"prompt": "one", "options": {}},
    "/api/create": {"model": "named", "from": "caller", "parameters": {}},
    "/v1/chat/completions": {
        "messages": [
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            TURN | {"content": PARTS},
        ],
        "stream_options": {},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    },
    "/v1/completions": {"prompt": ASK},
    "/v1/embeddings": {"input": "one"},
    "/v1/responses": {
        "input": [TURN],
        "tools": [TOOL["function"] | {"type": "function"}],
        "text": {"format": SCHEMA},
        "reasoning": {},
    },
    "/v1/messages": {
        "max_tokens": 4,
        "messages": [TURN | {"content": PARTS}],
        "system": PARTS,
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
    },
}
#: For fields that are refused with some values only, or that hold a list.
REFUSED: dict[str, Any] = {"typical_p": 0.5, "best_of": 2, "images": ["aGk="]}
#: For ignored fields that no struct has.
ODD: list[Any] = ["odd", -7.5, [None], {"odd": {"deep": [1]}}]


def marked(word: str) -> list[tuple[str, str, str]]:
    return [(*endpoint, field) for endpoint, section in SECTIONS.items() for field, said in section.fields.items() if said == word]


def body_of(path: str) -> dict[str, Any]:
    return {"model": "caller"} | copy.deepcopy(BODIES.get(path, {}))


def put(body: dict[str, Any], field: str, value: Any) -> None:
    """Set the field, in the first item where there are many."""
    *above, last = field.split(".")
    place: Any = body
    for step in above:
        place = place[step.removesuffix("[]")]
        place = place[0] if step.endswith("[]") else place
    place[last] = value


def fitting(hint: Any) -> Any:
    """Something that the type allows."""
    options = [one for one in typing.get_args(hint) if one is not type(None)]
    if typing.get_origin(hint) in (typing.Annotated, typing.Literal):
        return options[0] if typing.get_origin(hint) is typing.Literal else fitting(options[0])
    if options and typing.get_origin(hint) is not list:
        return fitting(options[0])
    return {bool: True, str: "odd", int: 1, float: 1.0}.get(hint, {"odd": [1]} if hint is msgspec.Raw else [])


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), ("caller",)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Supervised) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize(("method", "path", "field"), marked("no"))
def test_what_is_not_supported_is_a_400_that_names_it(client: httpx.Client, method: str, path: str, field: str) -> None:
    """Of a value that its type allows."""
    body, name = body_of(path), field.rpartition(".")[2]
    put(body, field, REFUSED.get(name) or fitting(known((method, path))[field]))
    answer = client.request(method, path, json=body)
    assert answer.status_code == 400, answer.text
    assert name in answer.text


@pytest.mark.parametrize("path", dict.fromkeys(path for _, path, _ in marked("ignored")))
def test_what_is_ignored_changes_nothing(client: httpx.Client, path: str) -> None:
    """Those that no struct has with whatever there is, the others with what their type allows."""
    (endpoint,) = (endpoint for endpoint in SECTIONS if endpoint[1] == path)
    ignored = [field for field, word in SECTIONS[endpoint].fields.items() if word == "ignored"]
    expected = client.request(*endpoint, json=body_of(path))
    assert expected.status_code == (501 if path == "/api/push" else 200), expected.text
    for value in ODD:
        body, kinds = body_of(path), known(endpoint)
        for field in ignored:
            put(body, field, fitting(kinds[field]) if field in kinds else value)
        answer = client.request(*endpoint, json=body)
        assert answer.status_code == expected.status_code, answer.text
