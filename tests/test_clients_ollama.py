"""The packages that speak Ollama's dialect, against a server with the real engine and the built-in model: its known answers, streamed and
whole, and the very same when the engine is killed in the middle of them."""

from __future__ import annotations

import asyncio
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import ollama
import pytest
from known_answers import KNOWN, RANDOM, THINKING, TOOL
from server_client import PATIENCE_S, Background, said, supervised, until
from test_resume import PHASES, Stage, tokens

from mlxd.messages import Call, Done, Event, Submit, Token

# LangChain is imported where it is used: each worker would take 4 s for it.
if TYPE_CHECKING:
    from langchain_ollama import ChatOllama

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices when it is imported

MODEL = "mlxd-tiny"
QUESTION = "Which port does mlxd use?"
GREEDY = {"temperature": 0}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), ()) as server:
        yield Stage(server)


@pytest.fixture(scope="module")
def client(stage: Stage) -> ollama.Client:
    return ollama.Client(host=stage.server.url, trust_env=False, timeout=PATIENCE_S)


def get_weather(city: str) -> str:
    """Get the current weather for a city

    Args:
        city: The name of the city
    """
    assert city == "Paris"
    return str(TOOL["result"])


# --- ollama --------------------------------------------------------------------------------------------------------------------------


def test_a_chat_and_a_prompt_have_the_known_answer_whole_and_streamed(client: ollama.Client) -> None:
    known = KNOWN[QUESTION]
    asked: dict[str, Any] = {"messages": said(QUESTION), "options": GREEDY}
    whole = client.chat(MODEL, **asked)
    parts = list(client.chat(MODEL, stream=True, **asked))
    assert whole.message.content == "".join(part.message.content or "" for part in parts) == known
    assert (whole.done_reason, parts[-1].done_reason, parts[-1].done) == ("stop", "stop", True)
    assert whole.eval_count == parts[-1].eval_count
    generated = client.generate(MODEL, QUESTION, options=GREEDY)
    pieces = list(client.generate(MODEL, QUESTION, stream=True, options=GREEDY))
    assert generated.response == "".join(piece.response for piece in pieces) == known
    assert pieces[-1].context == generated.context
    assert whole.prompt_eval_count == generated.prompt_eval_count


def test_the_context_of_an_answer_goes_on_with_it(client: ollama.Client) -> None:
    first = client.generate(MODEL, "What is mlxd?", options=GREEDY)
    second = client.generate(MODEL, QUESTION, context=first.context, options=GREEDY)
    assert second.response == KNOWN[QUESTION]
    assert second.context is not None
    assert first.context is not None
    assert list(second.context[: len(first.context)]) == list(first.context)


def test_the_asynchronous_client_reads_the_same(stage: Stage) -> None:
    async def read() -> str:
        client = ollama.AsyncClient(host=stage.server.url, trust_env=False)
        return "".join(
            [part.message.content or "" async for part in await client.chat(MODEL, said(QUESTION), stream=True, options=GREEDY)]
        )

    assert asyncio.run(read()) == KNOWN[QUESTION]


@pytest.mark.parametrize("question", RANDOM[:2])
def test_a_stream_is_the_whole_answer_for_the_same_seed(client: ollama.Client, question: str) -> None:
    options = {"temperature": 1.2, "seed": 5, "num_predict": 60}
    whole = client.chat(MODEL, said(question), options=options)
    parts = client.chat(MODEL, said(question), stream=True, options=options)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    other = client.chat(MODEL, said(question), options=options | {"seed": 6})
    assert other.message.content != whole.message.content


def test_thinking_has_a_field_of_its_own(client: ollama.Client) -> None:
    thought, known = THINKING[QUESTION]
    asked: dict[str, Any] = {"messages": said(QUESTION), "think": True, "options": GREEDY}
    message = client.chat(MODEL, **asked).message
    assert ((message.thinking or "").strip(), message.content) == (thought, known)
    parts = [part.message for part in client.chat(MODEL, stream=True, **asked)]
    assert "".join(part.thinking or "" for part in parts) == message.thinking
    assert "".join(part.content or "" for part in parts) == known


@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_of_a_tool_ends_with_its_result_in_words(client: ollama.Client, stream: bool) -> None:
    messages = said(TOOL["question"])

    def ask() -> ollama.Message:
        asked: dict[str, Any] = {"messages": messages, "tools": [get_weather], "options": GREEDY}
        if not stream:
            return client.chat(MODEL, **asked).message
        parts = [part.message for part in client.chat(MODEL, stream=True, **asked)]
        calls = [call for part in parts for call in part.tool_calls or []]
        return ollama.Message(role="assistant", content="".join(part.content or "" for part in parts), tool_calls=calls or None)

    answer = ask()
    assert answer.content == ""
    (call,) = answer.tool_calls or []
    assert (call.function.name, dict(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    messages += [
        answer.model_dump(),
        {"role": "tool", "tool_name": "get_weather", "content": get_weather(**call.function.arguments)},
    ]
    answer = ask()
    assert (answer.content, answer.tool_calls) == (TOOL["answer"], None)


def test_a_result_finds_its_call_also_without_a_name(client: ollama.Client) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    messages = [*said(TOOL["question"]), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": TOOL["result"]}]
    assert client.chat(MODEL, messages, tools=TOOL["tools"], options=GREEDY).message.content == TOOL["answer"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_format_is_kept(client: ollama.Client, stream: bool) -> None:
    def ask(form: Any) -> Any:
        asked: dict[str, Any] = {"messages": said("Answer in JSON: a person."), "format": form, "options": GREEDY}
        if not stream:
            return json.loads(client.chat(MODEL, **asked).message.content or "")
        return json.loads("".join(part.message.content or "" for part in client.chat(MODEL, stream=True, **asked)))

    assert isinstance(ask("json"), dict)
    person = ask(PERSON)
    assert person.keys() == {"name", "age"}
    assert isinstance(person["age"], int)


def test_log_probabilities_are_those_of_the_tokens(client: ollama.Client) -> None:
    answer = client.chat(MODEL, said(QUESTION), logprobs=True, top_logprobs=2, options=GREEDY)
    told = answer.logprobs or []
    assert len(told) == answer.eval_count
    assert KNOWN[QUESTION] in "".join(one.token for one in told)
    for one in told:
        best = [other.logprob for other in one.top_logprobs or []]
        assert best == sorted(best, reverse=True)
        assert len(best) == 2
        assert math.isclose(best[0], one.logprob)
        assert one.logprob <= 0


def test_a_penalty_on_repetition_changes_what_is_said(client: ollama.Client) -> None:
    options = GREEDY | {"num_predict": 30}
    plain = client.chat(MODEL, said("Count to ten."), options=options).message.content
    assert plain == KNOWN["Count to ten."]
    assert client.chat(MODEL, said("Count to ten."), options=options | {"repeat_penalty": 5.0}).message.content != plain
    neutral = options | {"repeat_penalty": 5.0, "repeat_last_n": 0}
    assert client.chat(MODEL, said("Count to ten."), options=neutral).message.content == plain


def test_errors_are_the_packages_own_with_our_sentence(client: ollama.Client) -> None:
    for call, status, sentence in (
        (lambda: client.chat("nope", said("x")), 404, "model 'nope' not found"),
        (lambda: list(client.chat("nope", said("x"), stream=True)), 404, "model 'nope' not found"),
        (lambda: client.generate(MODEL, "x", suffix="y"), 400, "mlxd-tiny does not support insert"),
        (lambda: client.chat(MODEL, said("x"), options={"typical_p": 0.5}), 400, "typical_p"),
        (lambda: client.pull("new"), 404, "model 'new' not found"),
        (lambda: list(client.pull("new", stream=True)), 404, "model 'new' not found"),
        (lambda: client.push("new"), 501, "does not push"),
        (lambda: client.delete(MODEL), 400, "cannot be deleted"),
    ):
        with pytest.raises(ollama.ResponseError) as raised:
            call()
        assert (raised.value.status_code, sentence in raised.value.error) == (status, True)


def test_a_client_that_leaves_frees_its_place(stage: Stage, client: ollama.Client) -> None:
    parts = client.chat(MODEL, said("Count from 1 to 100."), stream=True, options=GREEDY)
    next(parts)
    parts.close()
    until("nothing in hand", lambda: stage.server.health()["requests"]["in_hand"] == 0, stage.server.told)


def test_a_model_is_copied_created_shown_listed_and_deleted(stage: Stage, client: ollama.Client) -> None:
    client.copy(MODEL, "claude-tiny")
    created = list(
        client.create("brief", from_="claude-tiny", system="s", parameters={"num_predict": 3, "temperature": 0}, stream=True)
    )
    assert created[-1].status == "success"
    assert {model.model for model in client.list().models} == {"mlxd-tiny:latest", "claude-tiny:latest", "brief:latest"}
    shown = client.show("brief")
    assert (shown.parameters or "").split() == ["temperature", "0.0", "num_predict", "3"]
    assert set(shown.capabilities or []) >= {"completion", "tools", "thinking"}
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 4096
    answer = client.chat("brief", said(QUESTION))
    assert (answer.done_reason, answer.eval_count, answer.model) == ("length", 3, "brief")
    assert KNOWN[QUESTION].startswith(answer.message.content or "?")
    assert client.chat("claude-tiny", said(QUESTION), options=GREEDY).message.content == KNOWN[QUESTION]
    assert {model.model for model in client.ps().models} == {"mlxd-tiny:latest", "claude-tiny:latest", "brief:latest"}
    assert len([engine for engine in stage.server.engines if engine.process.poll() is None]) == 1
    for name in ("claude-tiny", "brief"):
        assert client.delete(name).status == "success"
    with pytest.raises(ollama.ResponseError):
        client.chat("brief", said("x"))


# --- langchain-ollama ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def langchain(stage: Stage) -> ChatOllama:
    """It sends a wide bag of options, and asks for the list of models when it is made."""
    from langchain_ollama import ChatOllama

    return ChatOllama(
        model=MODEL,
        base_url=stage.server.url,
        temperature=0,
        repeat_penalty=1.0,
        num_ctx=2048,
        mirostat=0,
        validate_model_on_init=True,
        client_kwargs={"trust_env": False},
    )


def test_langchain_has_the_known_answer_and_counts(langchain: ChatOllama) -> None:
    answer = langchain.invoke(QUESTION)
    assert answer.content == KNOWN[QUESTION]
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] == answer.usage_metadata["input_tokens"] + answer.usage_metadata["output_tokens"]
    assert "".join(str(chunk.content) for chunk in langchain.stream(QUESTION)) == KNOWN[QUESTION]
    assert answer.response_metadata["done_reason"] == "stop"


def test_langchain_keeps_thinking_apart(stage: Stage) -> None:
    from langchain_ollama import ChatOllama

    model = ChatOllama(model=MODEL, base_url=stage.server.url, temperature=0, reasoning=True, client_kwargs={"trust_env": False})
    answer = model.invoke(QUESTION)
    assert (str(answer.additional_kwargs["reasoning_content"]).strip(), answer.content) == THINKING[QUESTION]


def test_langchain_goes_through_the_loop_of_a_tool(langchain: ChatOllama) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    bound = langchain.bind_tools([get_weather])
    history: list[Any] = [HumanMessage(TOOL["question"])]
    answer = bound.invoke(history)
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    history += [answer, ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"] or "")]
    assert bound.invoke(history).content == TOOL["answer"]


def test_langchain_gets_structured_output(langchain: ChatOllama) -> None:
    person = langchain.with_structured_output(PERSON | {"title": "Person"}, method="json_schema").invoke(
        "Answer in JSON: a person."
    )
    assert isinstance(person, dict)
    assert person.keys() == {"name", "age"}


# --- litellm ------------------------------------------------------------------------------------------------------------------------


def lite(stage: Stage, prefix: str = "ollama_chat", **more: Any) -> Any:
    import litellm

    return litellm.completion(
        f"{prefix}/{MODEL}", api_base=stage.server.url, temperature=0, timeout=PATIENCE_S, num_retries=0, **more
    )


def test_litellm_has_the_known_answer_whole_and_streamed(stage: Stage) -> None:
    whole = lite(stage, messages=said(QUESTION))
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (KNOWN[QUESTION], "stop")
    assert whole.usage.completion_tokens > 0
    chunks = lite(stage, messages=said(QUESTION), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == KNOWN[QUESTION]


def test_litellm_generates_the_same_whole_and_streamed(stage: Stage) -> None:
    whole = lite(stage, "ollama", messages=said(QUESTION)).choices[0].message.content
    chunks = lite(stage, "ollama", messages=said(QUESTION), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole != ""


def test_litellm_goes_through_the_loop_of_a_tool(stage: Stage) -> None:
    messages = said(TOOL["question"])
    answer = lite(stage, messages=messages, tools=TOOL["tools"]).choices[0].message
    (call,) = answer.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    messages += [answer.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": TOOL["result"]}]
    assert lite(stage, messages=messages, tools=TOOL["tools"]).choices[0].message.content == TOOL["answer"]


def test_litellm_raises_its_own_error_for_an_unknown_model(stage: Stage) -> None:
    import litellm

    with pytest.raises(litellm.NotFoundError, match="not found"):
        litellm.completion("ollama_chat/nope", messages=said("x"), api_base=stage.server.url, num_retries=0)


# --- the engine is killed -----------------------------------------------------------------------------------------------------------


def in_thought(submit: Submit, seen: list[Event], event: Event) -> bool:
    return not (sum(isinstance(one, Token) and one.thinking for one in seen) >= 4)


def in_call(submit: Submit, seen: list[Event], event: Event) -> bool:
    """In the middle of its text, which nobody sees."""
    return not isinstance(event, (Call, Done)) and tokens(seen) < 9


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "thinking": (in_thought, {"messages": said(QUESTION), "think": True}),
    "call": (in_call, {"messages": said(TOOL["question"]), "tools": TOOL["tools"]}),
    "format": (PHASES["decode"], {"messages": said("Answer in JSON: a person."), "format": PERSON}),
}


def told(answer: httpx.Response) -> list[Any]:
    """Everything but what differs by chance or by the clock."""
    assert answer.status_code == 200, answer.text
    lines = [json.loads(line) for line in answer.text.splitlines()]
    text = "".join(line["message"]["content"] for line in lines)
    thinking = "".join(line["message"].get("thinking", "") for line in lines)
    calls = [call["function"] for line in lines for call in line["message"].get("tool_calls", [])]
    return [text, thinking, calls, lines[-1]["done_reason"], lines[-1]["eval_count"], lines[-1]["prompt_eval_count"]]


@pytest.mark.parametrize(
    "case", ["call", pytest.param("thinking", marks=pytest.mark.full), pytest.param("format", marks=pytest.mark.full)]
)
def test_an_engine_killed_in_a_thought_a_call_or_a_format_changes_nothing(stage: Stage, case: str) -> None:
    phase, asked = CASES[case]

    def ask(stream: bool) -> list[Any]:
        with stage.server.client() as http:
            body = {"model": MODEL, "stream": stream, "options": GREEDY | {"num_predict": 100}} | asked
            return told(http.post("/api/chat", json=body))

    def ask_both() -> list[Background]:
        return [Background(lambda stream=stream: ask(stream)) for stream in (True, False)]

    calm = [call.result() for call in ask_both()]
    assert calm[0] == calm[1]
    assert any(calm[0][:3])
    stage.phase = phase
    disturbed = ask_both()
    until("both to be held", lambda: stage.held() == 2, stage.told)
    stage.kill()
    assert [call.result() for call in disturbed] == calm
