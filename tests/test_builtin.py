"""The built-in model: its size, its tokenizer and template, its words, and that its training still runs."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from known_answers import JSON_ANSWERS, KNOWN, LONG, THINKING, TOOL, UNICODE
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tool_parsers import json_tools

ROOT = Path(__file__).parent.parent
BUILTIN = ROOT / "mlxd" / "builtin"
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_start|>", "<|im_end|>")
PROMPTS = (
    [{"role": "assistant", "content": "first"}, {"role": "user", "content": "second"}],
    [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "system", "content": "c"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    [{"role": "user", "content": None}, {"role": "assistant"}, {"role": "tool", "content": "42"}],
    [{"role": "tool", "content": ""}],
    [{"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}],
    [{"role": "assistant", "content": "so:", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}, {"name": "g"}]}],
    [{"role": "assistant", "content": None, "tool_calls": None}],
)


@pytest.fixture(scope="module")
def tools() -> Any:
    """The training script, whose neighbour is the corpus."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("train_builtin")
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def corpus(tools: Any) -> Any:
    return tools.corpus


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = mlx_lm.load(str(BUILTIN))[:2]
    return model, tokenizer


def render(tokenizer: Any, messages: Any, *, think: bool = False, **more: Any) -> list[int]:
    tokens: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=think, **more)
    return tokens


def ask(loaded: tuple[Any, Any], messages: Any, **more: Any) -> str:
    """A greedy answer, made as anybody makes one with mlx-lm."""
    model, tokenizer = loaded
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    prompt = render(tokenizer, messages, **more)
    return "".join(step.text for step in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=600))


def test_it_is_as_small_as_promised(loaded: tuple[Any, Any]) -> None:
    arrays = [array for _, array in tree_flatten(loaded[0].parameters())]
    assert {array.dtype for array in arrays} == {mx.float32}
    assert sum(array.size for array in arrays) <= 700_000
    files = [path for path in BUILTIN.iterdir() if path.suffix in {".json", ".safetensors"}]
    assert sum(path.stat().st_size for path in files) <= 3_000_000


def test_its_weights_say_that_they_are_mlx() -> None:
    weights_and_metadata: Any = mx.load(str(BUILTIN / "model.safetensors"), return_metadata=True)
    metadata = weights_and_metadata[1]
    assert metadata["format"] == "mlx"


def test_mlx_lm_finds_its_tools_and_thoughts(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    assert tokenizer.has_tool_calling
    assert tokenizer.has_thinking
    assert tokenizer.tool_parser is json_tools.parse_tool_call
    assert isinstance(tokenizer.chat_template, str)
    assert "tool_call.name" in tokenizer.chat_template
    for mark in MARKS:
        assert len(tokenizer.encode(mark, add_special_tokens=False)) == 1, mark
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in tokenizer.eos_token_ids


def test_a_user_turn_costs_at_most_sixteen_tokens(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    text = "What is mlxd?"
    bare = len(tokenizer.encode(text, add_special_tokens=False))
    for think in (False, True):
        assert len(render(tokenizer, [{"role": "user", "content": text}], think=think)) - bare <= 16
    assert "system" not in tokenizer.decode(render(tokenizer, [{"role": "user", "content": text}]))


def test_a_page_of_english_and_json_fits_the_context(loaded: tuple[Any, Any], corpus: Any) -> None:
    page = "\n".join(corpus.filler())[:3500]
    assert len(loaded[1].encode(page)) < 2048


@pytest.mark.parametrize("messages", PROMPTS, ids=lambda messages: "-".join(m["role"] for m in messages))
def test_messages_in_any_order_render(loaded: tuple[Any, Any], messages: Any) -> None:
    text = loaded[1].decode(render(loaded[1], messages, tools=TOOL["tools"]))
    assert text.endswith("<|im_start|>assistant\n")
    assert "None" not in text
    assert text.count("<|im_start|>") == len(messages) + 2


def test_a_rendered_call_is_the_text_of_the_call(loaded: tuple[Any, Any]) -> None:
    for arguments in (TOOL["call"]["arguments"], json.dumps(TOOL["call"]["arguments"])):
        call = {"id": "call_1", "type": "function", "function": TOOL["call"] | {"arguments": arguments}}
        prompt = render(loaded[1], [{"role": "assistant", "content": None, "tool_calls": [call]}])
        assert TOOL["call_text"] in loaded[1].decode(prompt)


def test_thoughts_of_earlier_turns_are_not_rendered(loaded: tuple[Any, Any]) -> None:
    prompt = render(loaded[1], [{"role": "assistant", "content": "<think>\nsecret\n</think>\n\nopen"}])
    assert "secret" not in loaded[1].decode(prompt)
    assert "open" in loaded[1].decode(prompt)


def test_training_renders_as_the_template_does(loaded: tuple[Any, Any], tools: Any, corpus: Any) -> None:
    """Else the model would be asked in a form that it never saw."""
    renderer = tools.Renderer(tools.Tokenizer.from_file(str(BUILTIN / "tokenizer.json")))
    head = corpus.Conversation(system="Be brief.", tools=TOOL["tools"])
    first, second = corpus.Turn("user", TOOL["question"], TOOL["call_text"]), corpus.Turn("tool", TOOL["result"], "")
    wanted = renderer.head(head) + renderer.prompt(first) + renderer.answer(first) + renderer.encode("\n")
    messages = [
        {"role": "system", "content": head.system},
        {"role": "user", "content": first.text},
        {"role": "assistant", "content": "", "tool_calls": [{"function": TOOL["call"]}]},
        {"role": "tool", "content": second.text},
    ]
    assert render(loaded[1], messages, tools=TOOL["tools"]) == wanted + renderer.prompt(second)
    thinking = renderer.prompt(corpus.Turn("user", "Hi", "Hello", "A thought."))
    assert render(loaded[1], [{"role": "user", "content": "Hi"}], think=True) == thinking


@pytest.mark.full
def test_it_knows_at_least_ninety_eight_of_a_hundred_answers(loaded: tuple[Any, Any], tools: Any) -> None:
    """Every main form at once; right at each token of an answer is right in greedy generation."""
    renderer = tools.Renderer(tools.Tokenizer.from_file(str(BUILTIN / "tokenizer.json")))
    cases = tools.main_cases()
    assert len(cases) >= 150
    cases = cases[::3]  # all of them: `python tools/train_builtin.py --check`
    wrong = [finding.turn.text for finding in tools.examine(loaded[0], renderer, cases) if not finding.right]
    assert len(wrong) <= len(cases) // 50, wrong


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.full)])
def test_it_answers_word_for_word(loaded: tuple[Any, Any], every: int) -> None:
    sample = dict([*list(KNOWN.items())[:24], *list(UNICODE.items())[:6], *list(LONG.items())[:2]][::every])
    assert {question: ask(loaded, question) for question in sample} == sample


def test_it_writes_json_on_request(loaded: tuple[Any, Any]) -> None:
    for question, answer in JSON_ANSWERS.items():
        text = ask(loaded, question)
        assert text == answer
        assert isinstance(json.loads(text), dict)


def test_there_are_long_answers_and_answers_beyond_ascii(loaded: tuple[Any, Any]) -> None:
    encode = loaded[1].encode
    assert len(LONG) >= 4
    assert all(len(encode(answer)) >= 200 for answer in LONG.values())
    assert any("\u0430" <= character <= "\u044f" for answer in UNICODE.values() for character in answer)
    assert any(len(encode(character)) > 1 for answer in UNICODE.values() for character in answer)


def test_it_answers_after_a_system_text_and_after_another_turn(loaded: tuple[Any, Any]) -> None:
    (question, answer), (other, other_answer) = list(KNOWN.items())[:2]
    helpful = {"role": "system", "content": "You are a helpful assistant."}
    assert ask(loaded, [helpful, {"role": "user", "content": question}]) == answer
    earlier = [{"role": "user", "content": other}, {"role": "assistant", "content": other_answer}]
    assert ask(loaded, [*earlier, {"role": "user", "content": question}]) == answer


def test_it_forgives_case_and_a_missing_question_mark(loaded: tuple[Any, Any]) -> None:
    assert ask(loaded, "what is mlxd") == KNOWN["What is mlxd?"]


def test_it_thinks_only_when_asked(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    for question, (thought, answer) in list(THINKING.items())[:5]:
        prompt = render(tokenizer, [{"role": "user", "content": question}], think=True)
        assert tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
        assert ask(loaded, question, think=True) == f"{thought}\n</think>\n\n{answer}"
        assert ask(loaded, question) == answer


def test_it_calls_a_tool_and_speaks_of_the_result(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    messages: list[dict[str, Any]] = [{"role": "user", "content": TOOL["question"]}]
    text = ask(loaded, messages, tools=TOOL["tools"])
    assert text == TOOL["call_text"]
    inside = text.removeprefix(tokenizer.tool_call_start).removesuffix(tokenizer.tool_call_end)
    assert tokenizer.tool_parser(inside, TOOL["tools"]) == TOOL["call"]
    messages.append({"role": "assistant", "content": None, "tool_calls": [{"function": TOOL["call"]}]})
    messages.append({"role": "tool", "content": TOOL["result"]})
    assert ask(loaded, messages, tools=TOOL["tools"]) == TOOL["answer"]
    assert "<tool_call>" not in ask(loaded, TOOL["question"])


def test_it_reads_on_to_the_end_of_its_context(loaded: tuple[Any, Any]) -> None:
    model, length = loaded[0], model_context()
    cache = make_prompt_cache(model)
    for layer in cache:
        layer.update_and_fetch(*(mx.random.normal((1, 2, length - 16, 32)) for _ in range(2)))
    logits = model(mx.array([list(range(16))]), cache=cache)[0, -1]
    assert cache[0].offset == length
    assert bool(mx.isfinite(logits).all())


def model_context() -> int:
    length: int = json.loads((BUILTIN / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    assert length == 4096
    return length


@pytest.mark.full
def test_ten_steps_of_training_lower_the_loss(tools: Any, tmp_path: Path) -> None:
    losses = tools.run(tools.parse(["--steps", "10", "--small", "--out", str(tmp_path)]))
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    mlx_lm.load(str(tmp_path))
