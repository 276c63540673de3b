"""The `openai` package against a server with the real engine and the built-in model: its known answers, streamed and whole."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from known_answers import JSON_ANSWERS, KNOWN, LONG, RANDOM, THINKING, TOOL, UNICODE
from openai import OpenAI
from pydantic import BaseModel
from server_client import CHATML, PATIENCE_S, Background, said, supervised, until
from test_resume import Stage, in_decode

QUESTION = "What is mlxd?"
MODEL = "mlxd-tiny"
ASK_PERSON = "Answer in JSON: a person."
FLAT_TOOLS: Any = [{"type": "function"} | tool["function"] for tool in TOOL["tools"]]


class Person(BaseModel):
    name: str
    age: int
    city: str


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), ()) as server:
        yield Stage(server)


@pytest.fixture(scope="module")
def client(stage: Stage) -> Iterator[OpenAI]:
    with httpx.Client(trust_env=False) as http, made(stage, http) as client:
        yield client


def made(stage: Stage, http: httpx.Client) -> OpenAI:
    return OpenAI(base_url=f"{stage.server.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE_S, http_client=http)


# --- chat --------------------------------------------------------------------------------------------------------------------------


def streamed_chat(client: OpenAI, **more: Any) -> tuple[str, str, Any, list[Any]]:
    """Text, thinking, reason and calls of a stream; the calls as the package's users join them."""
    text, thinking, reason = "", "", None
    calls: list[Any] = []
    for chunk in client.chat.completions.create(model=MODEL, stream=True, **more):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            thinking += getattr(choice.delta, "reasoning", None) or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                if call.index == len(calls):
                    calls.append(call)
                else:
                    calls[call.index].function.arguments += call.function.arguments
    return text, thinking, reason, calls


@pytest.mark.parametrize("question", [QUESTION, "Write hello in many languages.", "Show me a family emoji."])
def test_a_chat_has_the_known_answer_whole_and_streamed(client: OpenAI, question: str) -> None:
    known = (KNOWN | UNICODE)[question]
    whole = client.chat.completions.create(model=MODEL, messages=said(question), temperature=0)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (known, "stop")
    assert whole.usage and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert streamed_chat(client, messages=said(question), temperature=0)[:3] == (known, "", "stop")


@pytest.mark.parametrize("question", RANDOM[:2])
def test_a_stream_is_the_whole_answer_for_the_same_seed(client: OpenAI, question: str) -> None:
    drawn: Any = {"temperature": 1.0, "seed": 5, "max_tokens": 40}
    whole = client.chat.completions.create(model=MODEL, messages=said(question), **drawn).choices[0]
    assert streamed_chat(client, messages=said(question), **drawn)[:3] == (whole.message.content, "", whole.finish_reason)
    prompt = CHATML.format(question)
    text = client.completions.create(model=MODEL, prompt=prompt, **drawn).choices[0].text
    chunks = client.completions.create(model=MODEL, prompt=prompt, stream=True, **drawn)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text == whole.message.content


def test_every_choice_of_n_is_the_answer_of_its_own_seed(client: OpenAI) -> None:
    drawn: Any = {"messages": said(RANDOM[0]), "max_tokens": 20}
    choices = client.chat.completions.create(model=MODEL, n=3, seed=7, **drawn).choices
    alone = [client.chat.completions.create(model=MODEL, seed=7 + i, **drawn).choices[0].message.content for i in range(3)]
    assert [choice.message.content for choice in choices] == alone
    assert len(set(alone)) > 1


def test_thinking_has_a_field_of_its_own(client: OpenAI) -> None:
    thought, known = THINKING["Which port does mlxd use?"]
    asked: Any = {"messages": said("Which port does mlxd use?"), "temperature": 0, "reasoning_effort": "low"}
    message = client.chat.completions.create(model=MODEL, **asked).choices[0].message
    assert ((message.model_extra or {})["reasoning"].strip(), message.content) == (thought, known)
    text, thinking, _, _ = streamed_chat(client, **asked)
    assert (thinking.strip(), text) == (thought, known)


def test_usage_comes_with_the_stream_and_counts_what_the_cache_supplied(client: OpenAI) -> None:
    system = {"role": "system", "content": "You are a model that knows about mlxd. " * 4}
    asked: Any = {"messages": [system, *said(QUESTION)], "temperature": 0}
    whole = client.chat.completions.create(model=MODEL, **asked).usage
    *_, last = client.chat.completions.create(model=MODEL, stream=True, stream_options={"include_usage": True}, **asked)
    assert (last.choices, last.usage.prompt_tokens, last.usage.total_tokens) == ([], whole.prompt_tokens, whole.total_tokens)
    assert 0 < last.usage.prompt_tokens_details.cached_tokens < last.usage.prompt_tokens


def test_logprobs_are_those_of_the_text(client: OpenAI) -> None:
    asked: Any = {"messages": said(QUESTION), "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(model=MODEL, **asked).choices[0]
    told = choice.logprobs.content
    assert b"".join(bytes(one.bytes) for one in told).decode() == choice.message.content
    for one in told:
        best = [top.logprob for top in one.top_logprobs]
        assert (one.logprob, best) == (best[0], sorted(best, reverse=True))
        assert one.logprob <= 0
    chunks = client.chat.completions.create(model=MODEL, stream=True, **asked)
    streamed = [one for chunk in chunks for choice in chunk.choices if choice.logprobs for one in choice.logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in told]


def test_a_bias_forbids_a_token(client: OpenAI) -> None:
    asked: Any = {"messages": said(QUESTION), "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 1}
    usual = client.chat.completions.create(model=MODEL, **asked).choices[0].message.content
    other = client.chat.completions.create(model=MODEL, logit_bias={str(id): -100 for id in range(500)}, **asked)
    assert other.choices[0].message.content != usual


# --- tools -------------------------------------------------------------------------------------------------------------------------


def check_call(name: str, arguments: str) -> None:
    assert {"name": name, "arguments": json.loads(arguments)} == TOOL["call"]


def test_a_tool_is_called_and_its_result_becomes_the_answer(client: OpenAI) -> None:
    messages = said(TOOL["question"])
    asked: Any = {"messages": messages, "tools": TOOL["tools"], "temperature": 0}
    choice = client.chat.completions.create(model=MODEL, **asked).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    check_call(call.function.name, call.function.arguments)
    text, _, reason, calls = streamed_chat(client, **asked)
    assert (text, reason, [one.type for one in calls]) == ("", "tool_calls", ["function"])
    check_call(calls[0].function.name, calls[0].function.arguments)
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": TOOL["result"]}]
    done = client.chat.completions.create(model=MODEL, **asked).choices[0]
    assert (done.message.content, done.finish_reason) == (TOOL["answer"], "stop")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_choice_of_tool_makes_the_model_call_one(client: OpenAI, choice: Any) -> None:
    asked: Any = {"messages": said(QUESTION), "tools": TOOL["tools"], "temperature": 0, "tool_choice": choice}
    answer = client.chat.completions.create(model=MODEL, **asked).choices[0]
    assert [call.function.name for call in answer.message.tool_calls] == ["get_weather"]
    assert set(json.loads(answer.message.tool_calls[0].function.arguments)) == {"city"}


def test_no_tool_is_called_when_none_is_chosen(client: OpenAI) -> None:
    asked: Any = {"messages": said(TOOL["question"]), "tools": TOOL["tools"], "temperature": 0, "tool_choice": "none"}
    assert client.chat.completions.create(model=MODEL, **asked).choices[0].message.tool_calls is None


# --- formats -----------------------------------------------------------------------------------------------------------------------


def test_a_schema_makes_an_object_of_a_class(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": said(ASK_PERSON), "temperature": 0, "response_format": Person}
    assert client.chat.completions.parse(**asked).choices[0].message.parsed == Person(name="Ada", age=36, city="London")
    with client.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Ada", age=36, city="London")
    parsed = client.responses.parse(model=MODEL, input=ASK_PERSON, temperature=0, text_format=Person).output_parsed
    assert parsed == Person(name="Ada", age=36, city="London")


def test_a_format_holds_whatever_the_question(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": said(QUESTION), "seed": 3, "max_tokens": 300}
    free = client.chat.completions.create(response_format={"type": "json_object"}, **asked).choices[0]
    assert free.finish_reason == "length" or isinstance(json.loads(free.message.content), dict)
    known = client.chat.completions.create(
        model=MODEL, messages=said("Answer in JSON: two plus two."), temperature=0, response_format={"type": "json_object"}
    )
    assert json.loads(known.choices[0].message.content) == json.loads(JSON_ANSWERS["Answer in JSON: two plus two."])


def test_a_schema_that_the_engine_cannot_follow_is_a_bad_request(client: OpenAI) -> None:
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "nonsense"}}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=MODEL, messages=said(QUESTION), response_format={"type": "json_schema", "json_schema": schema}
        )
    assert "nonsense" in refused.value.message


# --- completions, models -----------------------------------------------------------------------------------------------------------


def test_a_completion_goes_on_from_its_prompt_without_a_template(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": CHATML.format(QUESTION), "temperature": 0, "max_tokens": 100}
    whole = client.completions.create(**asked)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (KNOWN[QUESTION], "stop")
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **asked)) == KNOWN[QUESTION]
    begun = client.completions.create(**asked | {"prompt": CHATML.format(QUESTION) + KNOWN[QUESTION][:30], "stop": ["server"]})
    assert begun.choices[0].text == KNOWN[QUESTION][30:].partition("server")[0]


def test_prompts_of_a_list_are_answered_together_and_cut_at_openais_default(client: OpenAI) -> None:
    prompts = [CHATML.format(question) for question in (QUESTION, "Count to ten.")]
    answer = client.completions.create(model=MODEL, prompt=prompts, temperature=0)
    assert [KNOWN[q].startswith(c.text) for q, c in zip((QUESTION, "Count to ten."), answer.choices, strict=True)] == [True] * 2
    assert answer.usage and answer.usage.completion_tokens == 32


def test_models_are_listed_and_found(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mlxd-tiny:latest"]
    assert client.models.retrieve(MODEL).id == "mlxd-tiny:latest"
    with pytest.raises(openai.NotFoundError, match="model 'no/such' not found"):
        client.models.retrieve("no/such")


# --- responses ---------------------------------------------------------------------------------------------------------------------


def test_a_response_has_the_known_answer_whole_and_streamed(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "input": QUESTION, "temperature": 0}
    whole = client.responses.create(**asked)
    assert (whole.output_text, whole.status) == (KNOWN[QUESTION], "completed")
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == KNOWN[QUESTION]
    assert final.usage and whole.usage and final.usage.output_tokens == whole.usage.output_tokens


def test_a_conversation_goes_on_from_its_last_response(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "temperature": 0}
    first = client.responses.create(input="Count to ten.", **asked)
    second = client.responses.create(input=QUESTION, previous_response_id=first.id, **asked)
    assert second.output_text == KNOWN[QUESTION]
    turns = [*said("Count to ten."), {"role": "assistant", "content": KNOWN["Count to ten."]}, *said(QUESTION)]
    told = client.chat.completions.create(messages=turns, **asked).usage
    assert told and second.usage and second.usage.input_tokens == told.prompt_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input="x", previous_response_id=first.id, **asked)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_the_thinking_of_a_response_is_an_item(client: OpenAI) -> None:
    thought, known = THINKING["What is exact resume?"]
    answer = client.responses.create(model=MODEL, input="What is exact resume?", temperature=0, reasoning={"effort": "high"})
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert (answer.output[0].summary[0].text.strip(), answer.output_text) == (thought, known)
    assert answer.usage and 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens


def test_a_response_calls_a_tool_and_the_next_one_has_its_result(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "tools": FLAT_TOOLS, "temperature": 0}
    (call,) = client.responses.create(input=TOOL["question"], **asked).output
    check_call(call.name, call.arguments)
    with client.responses.stream(input=TOOL["question"], **asked) as stream:
        first = stream.get_final_response()
    (call,) = first.output
    check_call(call.name, call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": TOOL["result"]}
    assert client.responses.create(input=[result], previous_response_id=first.id, **asked).output_text == TOOL["answer"]


# --- errors and departures ---------------------------------------------------------------------------------------------------------


def test_errors_are_the_packages_own_and_name_the_field(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=said("x"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=said("x"), n=9)
    assert (wrong.value.param, wrong.value.type) == ("n", "invalid_request_error")


def test_a_prompt_beyond_the_context_is_told_by_its_code_and_codex_is_told_in_the_stream(client: OpenAI) -> None:
    long = "word " * 6000
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=MODEL, messages=said(long), stream=stream)
        assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=MODEL, input=long)
    *_, last = client.responses.create(model=MODEL, input=long, stream=True)
    assert (last.type, last.response.error.code) == ("response.failed", "context_length_exceeded")


def test_a_client_that_leaves_in_mid_stream_leaves_nothing_behind(stage: Stage, client: OpenAI) -> None:
    streams: list[Callable[[], Any]] = [
        lambda: client.chat.completions.create(model=MODEL, messages=said(next(iter(LONG))), n=3, stream=True),
        lambda: client.completions.create(model=MODEL, prompt=CHATML.format(next(iter(LONG))), max_tokens=2000, stream=True),
        lambda: client.responses.create(model=MODEL, input=next(iter(LONG)), stream=True),
    ]
    for begin in streams:
        with begin() as stream:
            assert next(iter(stream))
    queue = {"running": 0, "waiting": 0}
    until("an empty house", lambda: stage.server.health()["queue"] == queue, stage.server.told)


# --- death -------------------------------------------------------------------------------------------------------------------------


def outcome(client: OpenAI, form: str, question: str, more: dict[str, Any]) -> Any:
    """What a client makes of an answer, without the ids that are drawn anew each time."""
    if form == "chat":
        message = client.chat.completions.create(model=MODEL, messages=said(question), temperature=0, **more).choices[0].message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        return message.content or "", (message.model_extra or {}).get("reasoning", ""), calls
    if form == "streamed chat":
        text, thinking, _, calls = streamed_chat(client, messages=said(question), temperature=0, **more)
        return text, thinking, [(call.function.name, call.function.arguments) for call in calls]
    flat = {"tools": FLAT_TOOLS} if "tools" in more else {"reasoning": {"effort": more["reasoning_effort"]}}
    if form == "response":
        response = client.responses.create(model=MODEL, input=question, temperature=0, **flat)
    else:
        with client.responses.stream(model=MODEL, input=question, temperature=0, **flat) as stream:
            response = stream.get_final_response()
    thinking = "".join(part.text for item in response.output if item.type == "reasoning" for part in item.summary)
    return response.output_text, thinking, [(o.name, o.arguments) for o in response.output if o.type == "function_call"]


FORMS = ["chat", "streamed chat", "response", "streamed response"]


def killed(stage: Stage, client: OpenAI, question: str, more: dict[str, Any]) -> set[str]:
    """The outcomes of a question in all forms, calm and with an engine killed at the seventh token."""
    calm = [outcome(client, form, question, more) for form in FORMS]
    stage.phase = in_decode
    asked = [Background(lambda form=form: outcome(client, form, question, more)) for form in FORMS]
    until("all to be held", lambda: stage.held() == len(FORMS), stage.told)
    stage.kill()
    return {repr(one) for one in [*calm, *(call.result() for call in asked)]}


def test_an_engine_killed_inside_thinking_changes_no_word(stage: Stage, client: OpenAI) -> None:
    question = "What is exact resume?"
    (only,) = killed(stage, client, question, {"reasoning_effort": "high"})
    assert THINKING[question][1] in only


@pytest.mark.full
def test_an_engine_killed_inside_a_call_changes_nothing_of_it(stage: Stage, client: OpenAI) -> None:
    (only,) = killed(stage, client, TOOL["question"], {"tools": TOOL["tools"]})
    assert "get_weather" in only
