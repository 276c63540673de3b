"""What may not be in the source (SEC-05, SEC-11, SEC-16, SEC-18): each has let somebody in elsewhere, and none is needed here."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxd
from mlxd import desk

PACKAGE = Path(mlxd.__file__).parent
TREES = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}

#: Bytes that become code or objects (vLLM CVE-2024-11041, SGLang CVE-2026-3059), and templates that do (SEC-16, llama-cpp-python
#: CVE-2024-34359): transformers renders them, in its sandbox, and nobody here makes an Environment or a Template of Jinja's own.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "multiprocessing", "yaml", "torch", "jinja2"}
BUILTINS = {"eval", "exec", "compile", "__import__", "execfile"}
ATTRIBUTES = {"recv_pyobj", "send_pyobj", "allow_pickle", "trust_remote_code"}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            own = ast.unparse(node.args[0]).startswith("f'{__name__}.")
            yield mlxd.__name__ if own else ast.literal_eval(node.args[0])  # raises when the name is not in the source


@pytest.mark.parametrize("file", TREES)
def test_sec_18_nothing_makes_code_or_objects_of_bytes(file: str) -> None:
    tree = TREES[file]
    assert not [name for name in imported(tree) if name.partition(".")[0] in MODULES]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [ast.unparse(call) for call in calls if isinstance(call.func, ast.Name) and call.func.id in BUILTINS]
    assert not [
        ast.unparse(call) for call in calls if {keyword.arg for keyword in call.keywords} & (ATTRIBUTES | {"shell", "preexec_fn"})
    ]
    assert not [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES]


@pytest.mark.parametrize("file", TREES)
def test_sec_05_nothing_reads_an_address_that_was_rebuilt_from_the_host_header(file: str) -> None:
    """Starlette CVE-2026-48710: vLLM's keys were asked for by `request.url.path`, and the router took the raw one."""
    tree = TREES[file]
    assert not [name for name in imported(tree) if name in ("starlette.requests", "starlette.datastructures")]
    assert "request.url" not in [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


@functools.cache
def verbs() -> list[str]:
    """Of the supervisor, which has them in a literal table."""
    (function,) = [node for node in ast.walk(TREES["supervisor.py"]) if isinstance(node, ast.FunctionDef) and node.name == "verbs"]
    (returned,) = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    assert isinstance(returned, ast.Dict)
    return [ast.literal_eval(key) for key in returned.keys if key is not None]


def test_sec_11_no_attribute_is_looked_up_by_a_name_that_came_in() -> None:
    """supervisord CVE-2017-11610: dotted names walked the attributes of its objects."""
    for file in ("desk.py", "control.py"):
        assert not [
            node.id for node in ast.walk(TREES[file]) if isinstance(node, ast.Name) and node.id in ("getattr", "globals", "vars")
        ]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
NEARLY = st.sampled_from(verbs()).flatmap(
    lambda verb: st.sampled_from(
        [f"{verb} ", f" {verb}", verb.upper(), f"do_{verb}", f"{verb}.__class__", f"{verb}\n", verb[:-1], f"_{verb}"]
    )
)
WORDS = ANYTHING | NEARLY | st.sampled_from(["__class__", "__init__", "verbs", "stop.__call__", "status.__globals__", ""])


def reply(asked: bytes) -> tuple[dict[str, Any], list[str]]:
    """The answer, and the verbs that were carried out."""
    done = []

    def named(verb: str) -> desk.Verb:
        async def carry_out(_: dict[str, Any]) -> dict[str, Any]:
            done.append(verb)
            return {}

        return carry_out

    with pytest.raises(StopIteration) as ended:  # it waits for nothing
        desk.reply(asked, {verb: named(verb) for verb in verbs()}).send(None)
    return ended.value.value, done


def test_sec_11_every_verb_of_the_table_is_carried_out_by_its_name() -> None:
    for verb in verbs():
        assert reply(json.dumps({"verb": verb, "more": 1}).encode()) == ({}, [verb])


@settings(deadline=None)
@given(WORDS.filter(lambda word: word not in verbs()))
def test_sec_11_every_other_verb_is_unknown(word: Any) -> None:
    answer, done = reply(json.dumps({"verb": word}).encode())
    assert answer["error"].startswith("unknown verb; known are ") and not done


@settings(deadline=None)
@given(st.binary() | ANYTHING.map(lambda thing: json.dumps(thing).encode()))
def test_sec_11_a_line_that_asks_for_nothing_is_answered_so(line: bytes) -> None:
    answer, done = reply(line)
    assert answer["error"].startswith("unknown verb; known are ") and not done
