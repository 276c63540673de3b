"""The real engine: a process, a link, a socket. Most of it on the built-in model, whose words are known."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_client import DEADLINE_S, GREEDY, PLENTY, EngineProcess, Result, Wire, make_tiny_model, spoil_row
from known_answers import KNOWN, LONG, THINKING, UNICODE

import mlxd
from mlxd import config, messages
from mlxd.engine.text import bytes_left, truncated
from mlxd.engine.view import make_view
from mlxd.messages import Bye, Hello, Load, Loaded, Progress, Sampling, Stop, Token
from mlxd.modelfiles import Broken
from mlxd.policy import PRODUCTIVE_TOKENS

BUILTIN = Path(mlxd.__file__).parent / "builtin"
STUCK_ENGINE = str(Path(__file__).parent / "stuck_engine.py")
QUESTION = "What is mlxd?"


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path_factory.mktemp("engine")) as process:
        yield process.load(BUILTIN, "mlxd-tiny")


@pytest.fixture
def wire(engine: EngineProcess) -> Iterator[Wire]:
    with engine.connect() as connection:
        yield connection


def stir(seed: int, **fields: Any) -> Sampling:
    return Sampling(**{"seed": seed, "temperature": 0.9, "top_p": 0.95, "top_k": 50} | fields)


# --- answers ---------------------------------------------------------------------------------------------------------------


def test_the_first_frame_says_what_the_engine_serves(wire: Wire, engine: EngineProcess) -> None:
    assert wire.loaded == Loaded(pid=engine.process.pid, model="mlxd-tiny", context_length=4096)


def test_a_question_gets_its_known_answer_and_true_counts(wire: Wire) -> None:
    result = wire.ask(messages=user(QUESTION))
    assert result.text == KNOWN[QUESTION]
    assert result.done is not None
    assert (result.done.reason, result.done.stop_string) == ("stop", None)
    assert result.done.prompt_tokens == len(result.prompt_ids)
    assert result.done.completion_tokens == len(result.ids) + 1  # the end token, drawn like any other
    assert result.done.prompt_ns > 0
    assert result.done.eval_ns > 0
    assert [type(event).__name__ for event in result.events[:1] + result.events[-1:]] == ["Accepted", "Done"]


def test_characters_of_several_bytes_arrive_whole(wire: Wire) -> None:
    for question, answer in UNICODE.items():
        result = wire.ask(messages=user(question))
        assert result.text == answer
        assert not any("\ufffd" in event.text for event in result.events if isinstance(event, Token))


def test_thinking_is_told_apart_and_loses_its_tags_and_blanks(wire: Wire) -> None:
    for question, (thought, answer) in THINKING.items():
        result = wire.ask(messages=user(question), think=True)
        assert (result.thinking, result.text) == (thought, answer)


def test_a_user_who_writes_a_thinking_tag_does_not_make_the_model_think(wire: Wire) -> None:
    result = wire.ask(messages=user("<think> " + QUESTION), max_tokens=8)
    assert result.thinking == ""
    assert result.text


def mixed(index: int) -> dict[str, Any]:
    """Sixteen requests: greedy, seeded, seeded with each filter, short and long, with a limit or without."""
    questions = list(KNOWN)[:12] + list(LONG)[:4]
    samplings = [GREEDY, stir(index), stir(index, top_k=0), stir(index, top_k=0, top_p=1.0, min_p=0.05)]
    return {"messages": user(questions[index]), "sampling": samplings[index % 4], "max_tokens": 60 + index}


def outcome(result: Result) -> tuple[list[int], str, str | None]:
    assert result.failed is None, result.failed
    return result.ids, result.text, result.done.reason if result.done else None


@pytest.fixture(scope="module")
def alone(engine: EngineProcess) -> list[tuple[list[int], str, str | None]]:
    with engine.connect() as wire:
        return [outcome(wire.ask(**mixed(i))) for i in range(16)]


def test_sixteen_requests_in_one_batch_give_each_the_words_it_gives_alone(wire: Wire, alone: list[Any]) -> None:
    jobs = [wire.submit(**mixed(i)) for i in range(16)]
    wire.finish(jobs)
    assert [outcome(wire.results[job]) for job in jobs] == alone


def test_half_of_them_cancelled_halfway_leave_the_rest_unchanged(wire: Wire, alone: list[Any]) -> None:
    jobs = [wire.submit(**mixed(i)) for i in range(16)]
    wire.until(lambda: all(len(wire.results[job].ids) >= min(30, len(alone[i][0]) - 2) for i, job in enumerate(jobs)))
    for job in jobs[::2]:
        wire.cancel(job)
    wire.finish(jobs[1::2])
    assert [outcome(wire.results[job]) for job in jobs[1::2]] == alone[1::2]
    for i, job in enumerate(jobs[::2]):
        got = wire.results[job].ids
        assert got == alone[2 * i][0][: len(got)]


def test_a_seed_gives_its_words_again_and_another_seed_gives_others(wire: Wire) -> None:
    def words(seed: int) -> str:
        return wire.ask(messages=user("Say something random."), sampling=Sampling(seed=seed, temperature=1.5), max_tokens=40).text

    assert words(1) == words(1)
    assert len({words(seed) for seed in range(6)}) > 1


def test_top_k_1_is_greedy(wire: Wire) -> None:
    result = wire.ask(messages=user(QUESTION), sampling=Sampling(seed=5, temperature=2.0, top_k=1))
    assert result.text == KNOWN[QUESTION]


# --- penalties, biases, log-probabilities ------------------------------------------------------------------------------------

TILTED: dict[str, dict[str, Any]] = {
    "penalties": {"repeat_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "temperature": 0.8},
    "answer alone": {"frequency_penalty": 1.5, "penalty_last_n": -1, "penalize_prompt": False},
    "bias": {"logit_bias": dict.fromkeys(range(20, 60), 9.0), "temperature": 0.8},
}


@pytest.mark.parametrize("name", TILTED)
def test_a_tilted_row_says_its_own_words_alone_in_company_and_resumed(wire: Wire, name: str) -> None:
    fields = {"messages": user("Count from 1 to 100."), "sampling": Sampling(seed=3, **TILTED[name]), "max_tokens": 60}
    plain = {"messages": user(QUESTION), "sampling": GREEDY, "top_logprobs": 3}
    whole = wire.ask(**fields)
    assert whole.ids != wire.ask(**fields | {"sampling": Sampling(seed=3, temperature=TILTED[name].get("temperature", 0))}).ids
    cuts = range(0, len(whole.ids), 7)
    jobs = [wire.submit(**plain), *(wire.submit(**fields, emitted=whole.ids[:cut]) for cut in cuts)]
    wire.finish(jobs)
    assert wire.results[jobs[0]].text == KNOWN[QUESTION]
    assert [whole.ids[:cut] + wire.results[job].ids for cut, job in zip(cuts, jobs[1:], strict=True)] == [whole.ids] * len(cuts)


def test_a_banned_token_never_comes_and_a_token_that_is_none_is_a_400(wire: Wire) -> None:
    usual = wire.ask(messages=user(QUESTION)).ids
    for seed in range(3):
        banned = Sampling(seed=seed, temperature=1.0, logit_bias=dict.fromkeys(usual, -100.0))
        result = wire.ask(messages=user(QUESTION), sampling=banned, max_tokens=40)
        assert result.ids
        assert set(usual).isdisjoint(result.ids)
    for token in (-1, 1024, 2**40):
        failed = wire.ask(messages=user(QUESTION), sampling=Sampling(seed=0, logit_bias={token: 1.0})).failed
        assert failed is not None
        assert (failed.status, failed.message) == (400, f"logit_bias names token {token}, and this model's are 0 to 1023")


def test_each_token_comes_with_its_log_probability_and_the_best_beside_it(wire: Wire) -> None:
    question = list(UNICODE)[-1]
    result = wire.ask(messages=user(question), top_logprobs=5)
    assert len(result.logprobs) == len(result.ids)
    assert b"".join(told.token.raw for told in result.logprobs).decode() == UNICODE[question]
    assert any("\ufffd" in told.token.text for told in result.logprobs), "no token was a part of a character"
    for told in result.logprobs:
        assert told.token == told.top[0], "greedy"
        best = [alternative.logprob for alternative in told.top]
        assert best == sorted(best, reverse=True)
        assert len(best) == 5
        assert sum(math.exp(logprob) for logprob in best) <= 1 + 1e-6
    hot = {"messages": user(question), "sampling": Sampling(seed=1, temperature=2.0), "max_tokens": 12}
    drawn = wire.ask(**hot, top_logprobs=0)
    assert [told.top for told in drawn.logprobs] == [[]] * 12
    assert all(told.token.logprob <= 0 for told in drawn.logprobs)
    assert wire.ask(**hot).logprobs == []
    rest = wire.ask(**hot, top_logprobs=0, emitted=drawn.ids[:5])
    assert [told.token.text for told in rest.logprobs] == [told.token.text for told in drawn.logprobs[5:]]
    assert all(abs(a.token.logprob - b.token.logprob) < 1e-3 for a, b in zip(rest.logprobs, drawn.logprobs[5:], strict=True))


# --- stop strings, limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["engine", "rvives th", " a request", "LLM", "that works on it."])
def test_a_stop_string_ends_the_answer_wherever_its_tokens_begin(wire: Wire, stop: str) -> None:
    result = wire.ask(messages=user(QUESTION), stop=["never said", stop, ""])
    assert result.text == KNOWN[QUESTION].partition(stop)[0]
    assert result.done is not None
    assert (result.done.reason, result.done.stop_string) == ("stop", stop)
    assert result.done.completion_tokens == len(result.ids)


def test_text_that_only_looked_like_a_stop_string_comes_after_all(wire: Wire) -> None:
    result = wire.ask(messages=user(QUESTION), stop=["works on it. And", "an always-on locust"])
    assert result.text == KNOWN[QUESTION]
    assert result.done is not None
    assert result.done.stop_string is None


def test_max_tokens_ends_with_length_and_zero_ends_at_once(wire: Wire) -> None:
    whole = wire.ask(messages=user(QUESTION))
    for most in (0, 1, 7):
        result = wire.ask(messages=user(QUESTION), max_tokens=most)
        assert result.ids == whole.ids[:most]
        assert result.done is not None
        assert (result.done.reason, result.done.completion_tokens) == ("length", most)


def test_the_context_bounds_the_answer(wire: Wire) -> None:
    result = wire.ask(messages=user("Count from 1 to 100."), num_ctx=64)
    assert result.done is not None
    assert result.done.reason == "length"
    assert result.done.prompt_tokens + result.done.completion_tokens == 64


# --- prompts ---------------------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_a_400_with_both_numbers(wire: Wire) -> None:
    result = wire.ask(prompt_ids=[5] * 5000)
    assert result.failed is not None
    assert (result.failed.status, result.failed.message) == (
        400,
        "input length (5000 tokens) exceeds the model's maximum context length (4096 tokens)",
    )


def test_text_far_too_long_is_a_400_before_it_is_tokenised(wire: Wire) -> None:
    result = wire.ask(prompt="word " * 200_000)
    assert result.failed is not None
    assert result.failed.status == 400
    assert "1000000 bytes" in result.failed.message


def test_an_empty_prompt_is_a_400(wire: Wire) -> None:
    result = wire.ask(prompt_ids=[])
    assert result.failed is not None
    assert (result.failed.status, result.failed.message) == (400, "the prompt is empty")


@pytest.mark.parametrize("ids", [[5, 1024], [-1, 5], [2**40]])
def test_numbers_that_are_no_tokens_are_a_400(wire: Wire, ids: list[int]) -> None:
    for fields in ({"prompt_ids": ids}, {"prompt_ids": [5], "emitted": ids}):
        result = wire.ask(**fields)
        assert result.failed is not None
        assert result.failed.status == 400
        assert "is not a token of this model, whose tokens are 0 to 1023" in result.failed.message


def test_a_raw_prompt_is_gone_on_with_to_the_very_space(wire: Wire) -> None:
    chat = wire.ask(messages=user(QUESTION))
    text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\nmlxd is"
    raw = wire.ask(prompt=text)
    assert raw.prompt_ids[: len(chat.prompt_ids)] == chat.prompt_ids
    assert "mlxd is" + raw.text == KNOWN[QUESTION]
    again = wire.ask(prompt_ids=raw.prompt_ids)
    assert (again.prompt_ids, again.text) == (raw.prompt_ids, raw.text)


def test_truncation_drops_the_oldest_and_keeps_system_and_the_last(wire: Wire) -> None:
    history = [{"role": "system", "content": "Be kind."}]
    for i in range(50):
        history += [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]
    history += user(QUESTION)
    refused = wire.ask(messages=history, num_ctx=256)
    assert refused.failed is not None
    assert refused.failed.status == 400
    cut = wire.ask(messages=history, num_ctx=256, truncate=True, max_tokens=4)
    assert cut.failed is None
    system = wire.ask(messages=[history[0], history[-1]], max_tokens=1).prompt_ids
    shared = 8  # the system message and the tags around it
    assert cut.prompt_ids[:shared] == system[:shared]
    assert cut.prompt_ids[-10:] == system[-10:]
    assert 200 < len(cut.prompt_ids) < 256
    hopeless = wire.ask(messages=user("word " * 500), num_ctx=256, truncate=True)
    assert hopeless.failed is not None
    assert "exceeds the model's maximum context length (256 tokens)" in hopeless.failed.message


@pytest.mark.parametrize("sizes", [[10] * 3000, [1] * 900 + [500] * 9, [5000] + [3] * 500, [1, 900, 1, 900, 1], [2000], [3, 2000]])
def test_truncation_takes_few_renderings_and_drops_little(sizes: list[int]) -> None:
    """The template puts 5 tokens around each message, and a token is 1 to 4 bytes, less in older messages."""
    context, rendered = 1000, 0
    messages = [{"role": "user", "content": "x" * (size if i % 3 else 4 * size)} for i, size in enumerate(sizes)] + user("last")

    def render(dropped: int) -> list[int]:
        nonlocal rendered
        rendered += 1
        return [0] * (5 * (len(sizes) - dropped + 1) + sum(sizes[dropped:]))

    ids = truncated(render, bytes_left(messages), context)
    assert rendered <= 5
    best = next(length for dropped in range(len(sizes) + 1) if (length := len(render(dropped))) < context)
    assert 0.8 * best <= len(ids) <= best


def test_a_long_chat_is_truncated_to_what_fits(tmp_path: Path) -> None:
    """0.9 MB, in as few renderings as the deadline of text has time for; the deadline itself is not what is asked here."""
    model = make_tiny_model(tmp_path / "m", config={"max_position_embeddings": 131072})
    history = [
        {"role": ("user", "assistant")[i % 2], "content": f"{i} the engine of mlxd is asked again. " * 100} for i in range(240)
    ]
    patient = config.Config(engine=config.Engine(text_s=DEADLINE_S))
    with EngineProcess(tmp_path / "e", patient) as process, process.load(model).connect() as wire:
        cut = wire.ask(messages=history + user("hi"), truncate=True, max_tokens=0)
        assert cut.failed is None
        assert 120_000 < len(cut.prompt_ids) < 131072


def test_a_trailing_assistant_message_is_gone_on_with(wire: Wire) -> None:
    whole = KNOWN[QUESTION]
    begun = whole[:30]
    result = wire.ask(messages=[*user(QUESTION), {"role": "assistant", "content": begun}])
    assert begun + result.text == whole


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be first') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HISTORIES = [
    [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "System", "content": "a"}, {"role": "USER", "content": "b"}, {"role": "system", "content": "c"}],
    [{"role": "assistant", "content": "first"}, {"role": "user", "content": "second"}],
    [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
    [{"role": "developer", "content": "brief"}, {"role": "narrator", "content": [{"type": "text", "text": "x"}]}],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ],
    [{"role": "user", "content": "go on"}, {"role": "assistant", "content": " and so "}],
]


@pytest.mark.parametrize("template", [GEMMA, QWEN], ids=["gemma", "qwen"])
def test_histories_that_templates_refuse_are_put_in_order(tmp_path: Path, template: str) -> None:
    with (
        EngineProcess(tmp_path / "e") as process,
        process.load(make_tiny_model(tmp_path / "m", template=template)).connect() as wire,
    ):
        for history in HISTORIES:
            result = wire.ask(messages=history, max_tokens=2)
            assert result.failed is None, (history, result.failed)
            for message in history:
                text = message["content"][0]["text"] if isinstance(message["content"], list) else message["content"]
                assert not text or result.prompt_ids, message


# --- resume ----------------------------------------------------------------------------------------------------------------

RESUMED = {
    "greedy": {"messages": user(QUESTION)},
    "seeded": {"messages": user("Why was mlxd made?"), "sampling": stir(11)},
    "unicode": {"messages": user(list(UNICODE)[0])},
    "thinking": {"messages": user(list(THINKING)[0]), "think": True},
    "half a stop string": {"messages": user(QUESTION), "stop": ["request survived", "works on it. No"]},
    "a stop string": {"messages": user(QUESTION), "stop": ["survives the crash"]},
    "length": {"messages": user(QUESTION), "max_tokens": 13},
    "emoji and seed": {"messages": user(list(UNICODE)[-1]), "sampling": stir(3, top_k=0, top_p=1.0), "max_tokens": 40},
}


def before_token(whole: Result, cut: int) -> Result:
    """What had come of `whole` when its token number `cut` came."""
    before = Result()
    for event in whole.events:
        if isinstance(event, Token):
            if len(before.ids) + len(event.ids) > cut:
                break
            before.take(event)
    return before


def resumed(fields: dict[str, Any], whole: Result) -> dict[str, Any]:
    """What the journal makes of `fields`: an engine that got as far as the prompt's tokens has said what they are."""
    rest = {name: value for name, value in fields.items() if name != "messages"}
    return rest | {"prompt_ids": whole.prompt_ids, "continued": whole.continued}


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", RESUMED)
def test_a_request_resumed_at_any_position_ends_as_if_nothing_had_happened(wire: Wire, name: str, every: int) -> None:
    fields = RESUMED[name]
    whole = wire.ask(**fields)
    assert whole.done is not None
    assert len(whole.ids) > 5
    befores = [before_token(whole, cut) for cut in range(0, len(whole.ids), every)]
    jobs = [wire.submit(**resumed(fields, whole), emitted=before.ids) for before in befores]
    wire.finish(jobs)
    for before, job in zip(befores, jobs, strict=True):
        cut = len(before.ids)
        rest = wire.results[job]
        assert before.ids + rest.ids == whole.ids, cut
        assert before.text + rest.text == whole.text, cut
        assert before.thinking + rest.thinking == whole.thinking, cut
        assert rest.done is not None
        assert (rest.done.reason, rest.done.stop_string) == (whole.done.reason, whole.done.stop_string)
        assert rest.done.completion_tokens == whole.done.completion_tokens


def test_a_space_before_the_first_word_is_left_out_of_a_resumed_answer_too(tmp_path: Path) -> None:
    with EngineProcess(tmp_path / "e") as process, process.load(make_tiny_model(tmp_path / "m")).connect() as wire:
        spaces = 0
        for seed in range(16):
            fields = {"messages": user(f"w{seed}"), "sampling": Sampling(seed=seed, temperature=1.5), "max_tokens": 6}
            whole = wire.ask(**fields)
            assert wire.ask(**resumed(fields, whole)).text == whole.text
            spaces += wire.ask(**resumed(fields, whole) | {"continued": True}).text != whole.text
        assert spaces, "no answer began with a space"


def test_a_request_that_was_complete_is_done_at_once(wire: Wire) -> None:
    whole = wire.ask(messages=user(QUESTION), max_tokens=9)
    again = wire.ask(messages=user(QUESTION), max_tokens=9, emitted=whole.ids)
    assert (again.ids, again.prompt_ids) == ([], whole.prompt_ids)
    assert again.done is not None
    assert (again.done.reason, again.done.completion_tokens) == ("length", 9)
    stopped = wire.ask(messages=user(QUESTION), stop=["always"])
    again = wire.ask(messages=user(QUESTION), stop=["always"], emitted=stopped.ids)
    assert (again.ids, again.text) == ([], "")
    assert again.done is not None
    assert (again.done.reason, again.done.stop_string) == ("stop", "always")


# --- prefix index, prefill ---------------------------------------------------------------------------------------------------


def test_a_follow_up_reuses_what_the_first_turn_computed_and_says_the_same(tmp_path: Path) -> None:
    turn = user("Tell me a long story about mlxd.")
    with EngineProcess(tmp_path / "a") as process, process.load(BUILTIN).connect() as wire:
        first = wire.ask(messages=turn, max_tokens=80)
        follow_up = [*turn, {"role": "assistant", "content": first.text}, *user(QUESTION)]
        hit = wire.ask(messages=follow_up)
        seeded_hit = wire.ask(messages=follow_up, sampling=stir(2), max_tokens=30)
        assert hit.cached > 80
        assert seeded_hit.cached > 80
        assert hit.done is not None
        assert hit.done.cached_tokens == hit.cached
        repeated = wire.ask(messages=turn, max_tokens=80)
        assert repeated.cached == 0 or repeated.ids == first.ids
    without = config.Config(engine=config.Engine(cache_bytes=1))
    with EngineProcess(tmp_path / "b", without) as process, process.load(BUILTIN).connect() as wire:
        miss = wire.ask(messages=follow_up)
        assert miss.cached == 0
        assert (miss.ids, miss.text) == (hit.ids, hit.text)
        assert wire.ask(messages=follow_up, sampling=stir(2), max_tokens=30).ids == seeded_hit.ids


def test_a_cancelled_prefill_leaves_its_prefix_for_the_next(wire: Wire) -> None:
    prompt = [(7 * i) % 900 + 10 for i in range(1800)]
    job = wire.submit(prompt_ids=prompt, max_tokens=5)
    wire.until(lambda: sum(isinstance(event, Progress) for event in wire.results[job].events) >= 1)
    wire.cancel(job)
    again = wire.ask(prompt_ids=prompt, max_tokens=5)
    assert 512 <= again.cached < 1800


def test_a_long_prompt_does_not_stop_another_stream(wire: Wire) -> None:
    """Progress of the one and tokens of the other come in turn, 512 prompt tokens a step."""
    order: list[tuple[str, int]] = []
    stream = wire.submit(messages=user("Tell me a long story about mlxd."))
    wire.until(lambda: len(wire.results[stream].ids) > 5)
    long = wire.submit(prompt_ids=[(11 * i) % 900 + 10 for i in range(2000)], max_tokens=1)
    while not wire.results[long].ended:
        frame = wire.read(time.monotonic() + DEADLINE_S)
        assert isinstance(frame, messages.Step | messages.Pulse)
        for event in frame.events if isinstance(frame, messages.Step) else []:
            wire.results[event.job].take(event)
            if isinstance(event, Progress):
                order.append(("prefill", event.done))
            elif event.job == stream:
                order.append(("token", 0))
    chunks = [i for i, (kind, _) in enumerate(order) if kind == "prefill"]
    assert len(chunks) == 5  # four of up to 512, and the last token, which is the first step's input
    assert all(b - a > 1 for a, b in zip(chunks, chunks[1:], strict=False)), order
    assert [done for kind, done in order if kind == "prefill"][:3] == [512, 1024, 1536]


def test_the_prefill_budget_is_shared_by_all_prompts_of_a_step(wire: Wire) -> None:
    jobs = [wire.submit(prompt_ids=[(13 * i + 17 * n) % 900 + 10 for i in range(300)], max_tokens=1) for n in range(4)]
    spent: list[int] = []
    seen = dict.fromkeys(jobs, 0)
    while not all(wire.results[job].ended for job in jobs):
        frame = wire.read(time.monotonic() + DEADLINE_S)
        if isinstance(frame, messages.Step):
            spent.append(0)
            for event in frame.events:
                wire.results[event.job].take(event)
                if isinstance(event, Progress):
                    spent[-1] += event.done - seen[event.job]
                    seen[event.job] = event.done
    assert max(spent) <= 512
    assert sum(spent) == 1200


def test_a_model_with_a_sliding_window_is_as_exact(tmp_path: Path) -> None:
    """Its caches cannot go back: the index serves them from snapshots at the end of prompts."""
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    model = make_tiny_model(tmp_path / "m", config=window)
    asked = [
        {"prompt_ids": [(7 * i + 31 * n) % 500 + 2 for i in range(60 + 40 * n)], "max_tokens": 40, "sampling": stir(n)}
        for n in range(6)
    ]
    with EngineProcess(tmp_path / "e") as process, process.load(model).connect() as wire:
        alone = [wire.ask(**fields) for fields in asked]
        jobs = [wire.submit(**fields) for fields in asked]
        wire.finish(jobs)
        resumed = [wire.ask(**fields, emitted=whole.ids[:25]) for fields, whole in zip(asked, alone, strict=True)]
    assert [wire.results[job].ids for job in jobs] == [whole.ids for whole in alone]
    assert [wire.results[job].cached for job in jobs] == [len(fields["prompt_ids"]) - 1 for fields in asked]
    assert [whole.ids[:25] + rest.ids for whole, rest in zip(alone, resumed, strict=True)] == [whole.ids for whole in alone]


# --- connections -----------------------------------------------------------------------------------------------------------


def test_two_servers_may_use_the_same_numbers(engine: EngineProcess) -> None:
    questions = list(KNOWN)[:2]
    with engine.connect() as one, engine.connect() as two:
        jobs = [one.submit(messages=user(questions[0])), two.submit(messages=user(questions[1]))]
        assert jobs == [1, 1]
        one.finish([1])
        two.finish([1])
        assert [one.results[1].text, two.results[1].text] == [KNOWN[q] for q in questions]


def running(wire: Wire) -> int:
    wire.pulses.clear()
    wire.until(lambda: wire.pulses)
    return wire.pulses[-1].counters.running


def test_a_closed_connection_takes_its_jobs_with_it(engine: EngineProcess, wire: Wire) -> None:
    gone = engine.connect()
    for i in range(4):
        gone.submit(prompt_ids=[9 + i] * 20, sampling=Sampling(seed=i, temperature=5.0))
    wire.until(lambda: running(wire) == 4 or not gone.until(lambda: len(gone.results[4].ids) > 3))
    gone.sock.close()
    wire.until(lambda: running(wire) == 0)


def test_a_reader_that_does_not_read_does_not_hold_up_the_others(engine: EngineProcess, wire: Wire) -> None:
    deaf = engine.connect()
    deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for i in range(8):
        deaf.submit(messages=user("Count from 1 to 100."), sampling=Sampling(seed=i))
    assert wire.ask(messages=user(QUESTION)).text == KNOWN[QUESTION]
    deaf.sock.close()


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff\xff\xff\xff",
        messages.LENGTH.pack(4) + b"\xc1\xc1\xc1\xc1",
        messages.LENGTH.pack(6) + b"\x81\xa4type\xa4",
        messages.LENGTH.pack(200_000) + b"\x91" * 200_000,
    ],
    ids=["http", "huge", "no msgpack", "no message", "deep"],
)
def test_a_broken_frame_closes_its_connection_and_no_other(engine: EngineProcess, wire: Wire, junk: bytes) -> None:
    with engine.connect() as broken:
        broken.sock.sendall(junk)
        assert broken.read(time.monotonic() + DEADLINE_S) is None
    assert wire.ask(messages=user(QUESTION)).text == KNOWN[QUESTION]


def test_a_number_submitted_twice_closes_the_connection(engine: EngineProcess) -> None:
    with engine.connect() as wire:
        wire.submit(messages=user(QUESTION))
        wire.send(messages.Submit(job=1, sampling=GREEDY, prompt_ids=[1]))
        with pytest.raises(AssertionError, match="None from the engine"):
            wire.finish([1])


def test_pulses_and_beats_show_the_work(engine: EngineProcess, wire: Wire) -> None:
    wire.until(lambda: wire.pulses)
    before = wire.pulses[-1].counters
    result = wire.ask(prompt_ids=[(3 * i) % 800 + 20 for i in range(100)], max_tokens=10)
    wire.pulses.clear()
    wire.until(lambda: wire.pulses)
    after = wire.pulses[-1].counters
    assert result.done is not None
    assert after.prefilled - before.prefilled == 100 - result.cached
    assert after.emitted - before.emitted == result.done.completion_tokens
    assert after.finished - before.finished == 1
    assert after.active_bytes > 1_000_000
    assert after.loaded >= 1_000_000
    beat = engine.word(messages.Beat)
    assert beat.counters.loaded == after.loaded


def counted(wire: Wire) -> messages.Counters:
    wire.pulses.clear()
    wire.until(lambda: wire.pulses)
    return wire.pulses[-1].counters


def test_work_that_a_stuck_model_thread_never_takes_up_is_told(tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    model = make_tiny_model(tmp_path / "m", config={"max_position_embeddings": 100_000})
    with (
        EngineProcess(tmp_path / "e", environ={"MLXD_FAKE_STUCK": str(stuck)}, script=STUCK_ENGINE) as process,
        process.load(model).connect() as wire,
    ):
        first = wire.submit(prompt="engine", sampling=Sampling(seed=1, temperature=5.0))
        wire.until(lambda: wire.results[first].ids)
        wire.until(lambda: (c := counted(wire)).running == 1 and c.prefilling == 0)
        stuck.touch()
        second = wire.submit(prompt="supervisor", max_tokens=2)
        wire.until(lambda: (c := counted(wire)).running == 2 and c.prefilling == 1)
        before = counted(wire)
        for job in (first, second):
            wire.cancel(job)
        third = wire.submit(prompt="server", max_tokens=2)
        # Nobody waits for two of them any more, and still the model thread has them.
        wire.until(lambda: counted(wire).running == 3)
        after = counted(wire)
        assert (after.prefilled, after.emitted, after.finished) == (before.prefilled, before.emitted, before.finished)
        stuck.unlink()
        wire.finish([third])
        wire.until(lambda: counted(wire).running == 0)
        assert counted(wire).finished == before.finished + 3


def test_requests_that_never_reach_the_model_count_as_ended(engine: EngineProcess, wire: Wire) -> None:
    before = counted(wire)
    assert wire.ask(prompt_ids=[]).failed is not None
    assert wire.ask(prompt="engine", max_tokens=0).done is not None
    assert counted(wire).finished == before.finished + 2


def test_an_idle_engine_gives_a_token_of_its_own_that_nobody_sees(tmp_path: Path) -> None:
    settings = config.Config(health=config.Health(canary_s=0.5))
    with EngineProcess(tmp_path, settings) as process, process.load(BUILTIN).connect() as wire:
        asked = wire.ask(messages=user(QUESTION))
        before = counted(wire)
        wire.until(lambda: counted(wire).canaries >= before.canaries + 2)
        after = counted(wire)
        assert asked.text == KNOWN[QUESTION]
        assert (after.emitted, after.finished, after.prefilled) == (before.emitted, before.finished, before.prefilled)
        assert (after.running, after.cache_bytes) == (0, before.cache_bytes)
        assert wire.ask(messages=user(QUESTION)).text == KNOWN[QUESTION]


def test_the_canary_finds_room_where_one_request_fills_the_batch(tmp_path: Path) -> None:
    settings = config.Config(server=config.Server(max_concurrent=1), health=config.Health(canary_s=0.5))
    with EngineProcess(tmp_path, settings) as process, process.load(BUILTIN).connect() as wire:
        wire.ask(messages=user(QUESTION))
        wire.until(lambda: counted(wire).canaries >= 2)
        assert wire.ask(messages=user(QUESTION)).text == KNOWN[QUESTION]


def test_the_canary_of_a_stuck_engine_shows_as_work_that_does_not_move(tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    settings = config.Config(health=config.Health(canary_s=0.5))
    with (
        EngineProcess(tmp_path / "e", settings, {"MLXD_FAKE_STUCK": str(stuck)}, STUCK_ENGINE) as process,
        process.load(make_tiny_model(tmp_path / "m")).connect() as wire,
    ):
        wire.until(lambda: counted(wire).canaries)
        stuck.touch()
        wire.until(lambda: counted(wire).running == 1)
        told = [counted(wire) for _ in range(3)]
        assert {(c.running, c.prefilling, c.canaries) for c in told} == {(1, 1, told[0].canaries)}
        stuck.unlink()
        wire.until(lambda: counted(wire).canaries > told[0].canaries)


# --- models that are refused -------------------------------------------------------------------------------------------------


def spoilt(tmp_path: Path, **changes: Any) -> Path:
    """A copy of the built-in model with other contents in some files; None: without the file."""
    directory = tmp_path / "model"
    shutil.copytree(BUILTIN, directory)
    for name, content in changes.items():
        path = directory / name.replace("__", ".")
        if content is None:
            path.unlink()
        elif isinstance(content, dict):
            found = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(found | content))
        else:
            path.write_bytes(content)
    return directory


def refusal(tmp_path: Path, directory: Path) -> str:
    with EngineProcess(tmp_path / "e") as process:
        process.word(Hello)
        process.say(Load("spoilt", str(directory), PLENTY))
        bye = process.word(Bye)
        assert bye.cause == "refused", bye
        assert process.wait() == 0
        return bye.text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model_file": (
        {"config__json": {"model_file": "evil.py"}},
        "config.json asks to run code that came with the model (model_file)",
    ),
    "trust": ({"tokenizer_config__json": {"x": [{"trust_remote_code": True}]}}, "tokenizer_config.json asks to run code"),
    "no config": ({"config__json": None}, "config.json is missing"),
    "config is no JSON": ({"config__json": b"{"}, "config.json is not valid JSON"),
    "config is a list": ({"config__json": b"[]"}, "config.json is not a JSON object"),
    "no type": ({"config__json": {"model_type": None}}, "config.json names no model_type"),
    "unknown type": ({"config__json": {"model_type": "bart"}}, "model_type 'bart', which mlx-lm cannot run"),
    "a path as type": ({"config__json": {"model_type": "../evil"}}, "model_type '../evil', which mlx-lm cannot run"),
    "no weights": ({"model__safetensors": None}, "model.safetensors is missing"),
    "truncated": ({"model__safetensors": (BUILTIN / "model.safetensors").read_bytes()[:100_000]}, "model.safetensors is cut short"),
    "garbage": ({"model__safetensors": b"garbage garbage garbage"}, "model.safetensors is cut short or no safetensors file"),
    "missing shard": (
        {"model__safetensors__index__json": {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}},
        "model-2.safetensors is missing, model.safetensors.index.json names it",
    ),
    "no tokenizer": ({"tokenizer__json": None}, "tokenizer.json is missing"),
    "unknown parser": ({"tokenizer_config__json": {"tool_parser_type": "os.path"}}, "tool_parser_type 'os.path'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_loaded_gets_no_view_but_a_sentence(tmp_path: Path, name: str) -> None:
    changes, sentence = REFUSED[name]
    with pytest.raises(Broken) as refused:
        make_view(spoilt(tmp_path, **changes), tmp_path / "view")
    assert sentence in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
    assert not (tmp_path / "view").exists()


#: The window is of no size, which shows when the first token is drawn.
MISFIT = {"layer_types": [*["sliding_attention"] * 3, "full_attention"], "sliding_window": "none"}
REFUSED_LATER: dict[str, tuple[dict[str, Any], str]] = {
    "before": REFUSED["truncated"],
    "wrong shapes": ({"config__json": {"hidden_size": 96}}, "mlx-lm cannot load"),
    "broken tokenizer": ({"tokenizer__json": b"{}"}, "mlx-lm cannot load"),
    "misfit": ({"config__json": MISFIT}, "mlx-lm cannot run"),
}


@pytest.mark.parametrize(
    "name", ["before", "misfit", *(pytest.param(name, marks=pytest.mark.full) for name in ("wrong shapes", "broken tokenizer"))]
)
def test_an_engine_says_the_sentence_and_ends(tmp_path: Path, name: str) -> None:
    changes, sentence = REFUSED_LATER[name]
    text = refusal(tmp_path, spoilt(tmp_path, **changes))
    assert sentence in text
    assert str(tmp_path) not in text


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, tmp_path / "nowhere").startswith("its directory cannot be read: ")


def test_no_code_of_a_model_runs_even_when_it_loads(tmp_path: Path) -> None:
    """`auto_map` is for other tools: the model loads without, and its Python is not even in the view."""
    canary = tmp_path / "canary"
    evil = f"open({str(canary)!r}, 'w')".encode()
    names = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", "evil.T"], "AutoModelForCausalLM": "evil.M"}
    directory = spoilt(tmp_path, config__json={"auto_map": names}, tokenizer_config__json={"auto_map": names})
    for name in ("evil.py", "tokenization_evil.py", "pytorch_model.bin"):
        (directory / name).write_bytes(evil)
    with EngineProcess(tmp_path / "e") as process, process.load(directory).connect() as wire:
        assert wire.ask(messages=user(QUESTION)).text == KNOWN[QUESTION]
        view = Path(process.settings.view)
        assert {p.name for p in view.iterdir()} == {p.name for p in BUILTIN.iterdir()}
        assert "auto_map" not in (view / "config.json").read_text() + (view / "tokenizer_config.json").read_text()
    assert not canary.exists()


# --- life and death --------------------------------------------------------------------------------------------------------


def test_a_blank_engine_says_hello_beats_and_stops_when_told(tmp_path: Path) -> None:
    with EngineProcess(tmp_path) as process:
        hello = process.word(Hello)
        assert (hello.kind, hello.pid, hello.nonce, hello.protocol) == ("engine", process.process.pid, "nonce", messages.PROTOCOL)
        assert process.word(messages.Beat).counters.running == 0
        process.say(Stop())
        assert process.word(Bye).cause == "stopped"
        assert process.wait() == 0


def test_an_engine_stops_at_once_with_requests_in_hand(tmp_path: Path) -> None:
    with EngineProcess(tmp_path) as process, process.load(BUILTIN).connect() as wire:
        job = wire.submit(messages=user("Tell me a long story about mlxd."))
        wire.until(lambda: wire.results[job].ids)
        process.say(Stop())
        assert process.wait(DEADLINE_S) == 0


def test_an_engine_whose_supervisor_is_gone_ends_what_runs_and_then_itself(tmp_path: Path) -> None:
    with EngineProcess(tmp_path) as process, process.load(BUILTIN).connect() as wire:
        job = wire.submit(messages=user(QUESTION))
        wire.until(lambda: wire.results[job].ids)
        process.link.close()
        wire.finish([job])
        assert wire.results[job].text == KNOWN[QUESTION]
        assert process.wait() == 0


def test_an_engine_that_dies_before_its_next_beat_has_told_of_its_work(tmp_path: Path) -> None:
    """Else it would count as one that dies without having done any, and five of those are a cool-down."""
    with EngineProcess(tmp_path) as process, process.load(BUILTIN).connect() as wire:
        job = wire.submit(messages=user("Count from 1 to 100."))
        wire.until(lambda: len(wire.results[job].ids) > PRODUCTIVE_TOKENS)
        process.process.send_signal(signal.SIGABRT)
        process.wait()
        while (word := process.next_word(time.monotonic() + DEADLINE_S)) is not None:
            if isinstance(word, messages.Beat) and word.counters.emitted >= PRODUCTIVE_TOKENS:
                return
    raise AssertionError(process.story())


def test_a_term_ends_it(tmp_path: Path) -> None:
    with EngineProcess(tmp_path) as process:
        process.load(BUILTIN)
        process.process.terminate()
        assert process.wait() < 0


SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


PAUSED = """
import asyncio, sys, time
from concurrent.futures import ThreadPoolExecutor
from mlxd.engine.service import within

def prepare():
    for _ in range(5):
        time.sleep(0.1)

async def main():
    work = asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(), prepare)
    print("begun", flush=True)
    await within(1.0, work)

asyncio.run(main())
"""


def test_a_deadline_does_not_pass_while_the_engine_is_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", PAUSED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)  # the deadline and half
        process.send_signal(signal.SIGCONT)
        assert process.wait(DEADLINE_S) == 0


def test_a_template_that_never_ends_fails_its_request_and_the_engine(tmp_path: Path) -> None:
    settings = config.Config(engine=config.Engine(text_s=0.5))
    model = make_tiny_model(tmp_path / "m", template=SLOW)
    with EngineProcess(tmp_path / "e", settings) as process, process.load(model).connect() as wire:
        other = wire.submit(prompt="engine", max_tokens=1000)
        wire.until(lambda: wire.results[other].ids)
        result = wire.ask(messages=user("hi"))
        assert result.failed is not None
        assert "took over 0.5 s" in result.failed.message
        bye = process.word(Bye)
        assert (bye.cause, bye.text) == ("deadline", result.failed.message)
        assert process.wait() == 70


# --- output that is none -----------------------------------------------------------------------------------------------------

#: What the embedding of token 500 becomes, and so the output after it. The greeting does not hold it.
WRONG = {"nan": float("nan"), "infinite": float("inf"), "all equal": 0.0}


#: What, beside how many others, at which temperature. The rest of them say little that these do not.
FEW = [("nan", 3, 0.9), ("all equal", 0, 0.0)]
MORE = [case for case in itertools.product(WRONG, [0, 3], [0.0, 0.9]) if case not in FEW]


@pytest.mark.parametrize(
    ("value", "neighbours", "temperature"), [*FEW, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)]
)
def test_output_that_is_no_numbers_is_never_told(tmp_path: Path, value: str, neighbours: int, temperature: float) -> None:
    model = make_tiny_model(tmp_path / "m", config={"tie_word_embeddings": False, "max_position_embeddings": 100_000})
    asked = [
        {"prompt_ids": [9 + n] * 5, "sampling": Sampling(seed=n, temperature=5.0), "max_tokens": 400} for n in range(neighbours)
    ]
    with EngineProcess(tmp_path / "a") as process, process.load(model).connect() as wire:
        expected = [wire.ask(**fields).ids for fields in asked]
        guilty = {"prompt_ids": [500] * 4, "sampling": Sampling(seed=1, temperature=temperature), "max_tokens": 9}
        assert wire.ask(**guilty).done is not None
    spoil_row(model, "model.embed_tokens.weight", 500, WRONG[value])
    with EngineProcess(tmp_path / "b") as process, process.load(model).connect() as wire:
        jobs = [wire.submit(**fields) for fields in asked]
        wire.until(lambda: all(wire.results[job].ids for job in jobs))
        last = wire.submit(**guilty)
        with pytest.raises(AssertionError, match="None from the engine"):
            wire.finish([last])
        assert (wire.results[last].ids, wire.results[last].text) == ([], "")
        for job, ids in zip(jobs, expected, strict=True):
            assert wire.results[job].ids == ids[: len(wire.results[job].ids)]
        bye = process.word(Bye)
        assert (bye.cause, bye.text) == ("error", "the model gave no numbers, or the same for every token")
        assert process.wait() == 70


def test_a_model_that_never_gives_numbers_is_refused(tmp_path: Path) -> None:
    model = spoil_row(make_tiny_model(tmp_path / "m"), "model.norm.weight", 3, float("nan"))
    assert refusal(tmp_path, model) == "the model gave no numbers, or the same for every token"


SCANS = """
from mlxd.engine import libraries
libraries.prepare()
from transformers.utils import import_utils
(scan,) = [cell.cell_contents for cell in import_utils.create_import_structure_from_path.__closure__]
read = scan.cache_info().misses
import mlx_lm.tokenizer_utils, transformers
assert read > 300 and scan.cache_info().misses < read + 50, (read, scan.cache_info())
assert transformers.AutoTokenizer.__name__ == "AutoTokenizer" and transformers.LlamaConfig().model_type == "llama"
"""


def test_transformers_reads_its_files_once_in_an_engine() -> None:
    ran = subprocess.run([sys.executable, "-c", SCANS], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
