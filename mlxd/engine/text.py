"""Prompts: what the model reads for a request, as tokens.

Owns the chat template with its quirks, tokenising, and what fits the context. Runs in the text thread; a template may loop for
ever, so whoever calls sets the deadline. Knows nothing of MLX.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mlxd.abilities import filling
from mlxd.errors import Refused
from mlxd.messages import Embed, Submit

Message = dict[str, Any]

#: Text longer than this many bytes for each token of the context cannot fit, and 1 MB takes a second to tokenise.
BYTES_PER_TOKEN = 32
#: What is supposed of a text that was not tokenised, and of what a template puts around a message.
USUAL_BYTES_PER_TOKEN = 4
FRAME_BYTES = 20
#: After so many renderings that did not fit, truncation aims at this share of the context.
SHARES = (1.0, 1.0, 0.97, 0.8, 0.5)
MOST_RENDERINGS = 4
ROLES = {"system", "user", "assistant", "tool"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids`: not empty. `thinking`: they end inside the model's thinking tags. `continued`: the answer goes on with the prompt's text,
    so a space it begins with counts. `max_tokens`: what the answer may have."""

    ids: list[int]
    thinking: bool
    continued: bool
    max_tokens: int


class Prompter:
    """`context_length`: the model's, in tokens. The model has no token `vocabulary_size` or above."""

    def __init__(self, tokenizer: Any, context_length: int, vocabulary_size: int):
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.vocabulary_size = vocabulary_size

    def prepare(self, submit: Submit) -> Prompt:
        """The prompt of a request. Raises Refused with a 400 when it is empty, too long, or not what the template can take."""
        context = min(self.context_length, submit.num_ctx or self.context_length)
        if submit.tools and not self.tokenizer.has_tool_calling:
            raise Refused(400, "this model does not support tools: mlx-lm cannot read the calls that it makes")
        ids = self.ids(submit, context)
        if not ids:
            raise Refused(400, "the prompt is empty")
        self.check_tokens(ids)
        self.check_tokens(submit.emitted)
        room = context - len(ids)
        if room < 1 and submit.max_tokens != 0:  # who only counts may count what does not fit
            raise too_long(f"{len(ids)} tokens", context)
        most = room if submit.max_tokens is None else min(room, submit.max_tokens)
        continued = submit.continued if submit.prompt_ids is not None else not submit.messages or is_begun(submit.messages)
        return Prompt(ids, self.is_thinking(ids), continued, most)

    def text(self, embed: Embed, index: int) -> list[int]:
        """The tokens of one of the texts to be embedded, at least one. Raises Refused (400) when it is too long, or they are no tokens."""
        context = min(self.context_length, embed.num_ctx or self.context_length)
        text = embed.inputs[index]
        if isinstance(text, list):
            ids = text[:context] if embed.truncate else text
            self.check_tokens(ids)
        else:
            data, most = text.encode(), context * BYTES_PER_TOKEN
            if embed.truncate:  # the tokenizer keeps the marks that it puts around a text
                text = data[:most].decode(errors="ignore")
                ids = list(self.tokenizer.encode(text, add_special_tokens=True, truncation=True, max_length=context))
            elif len(data) > most:
                raise overlong(index, f"{len(data)} bytes", context)
            else:
                ids = self.encode(text, special=True)
        if len(ids) > context:
            raise overlong(index, f"{len(ids)} tokens", context)
        return ids or [self.tokenizer.eos_token_id or 0]

    def check_tokens(self, ids: list[int]) -> None:
        """Raises Refused: MLX would read beyond the embedding."""
        for token in (max(ids, default=0), min(ids, default=0)):
            if not 0 <= token < self.vocabulary_size:
                raise Refused(400, f"{token} is not a token of this model, whose tokens are 0 to {self.vocabulary_size - 1}")

    def ids(self, submit: Submit, context: int) -> list[int]:
        if submit.prompt_ids is not None:
            return submit.prompt_ids
        if submit.prompt is not None and submit.suffix:
            return self.around(submit.prompt, submit.suffix, context)
        if submit.prompt is not None:
            self.check_bytes(submit.prompt, context)
            # As in mlx-lm's stream_generate: a text that brings its own BOS gets no second one.
            bos = self.tokenizer.bos_token
            return self.encode(submit.prompt, special=bos is None or not submit.prompt.startswith(bos))
        messages = [tidy(m) for m in submit.messages or []]

        def render(dropped: int) -> list[int] | None:
            """The tokens without the `dropped` oldest that may be dropped; None: far too long to count."""
            text = self.render(drop_oldest(messages, dropped), submit)
            if submit.truncate and len(text.encode()) > context * BYTES_PER_TOKEN:
                return None
            self.check_bytes(text, context)
            return self.encode(text, special=False)

        if not submit.truncate:
            return submit.context_ids + (render(0) or [])
        return submit.context_ids + truncated(render, bytes_left(messages), context - len(submit.context_ids))

    def around(self, before: str, after: str, context: int) -> list[int]:
        """The prompt of a model that is to write what stands between two texts. Raises Refused when it never learned to."""
        marks = filling(self.tokenizer.get_vocab().__contains__)
        if marks is None:
            raise Refused(400, "this model does not support insert: its vocabulary has no marks for it")
        self.check_bytes(before + after, context)
        prefix, suffix, middle = (self.tokenizer.convert_tokens_to_ids(mark) for mark in marks)
        return [prefix, *self.encode(before, special=False), suffix, *self.encode(after, special=False), middle]

    def check_bytes(self, text: str, context: int) -> None:
        if len(text.encode()) > context * BYTES_PER_TOKEN:
            raise too_long(f"{len(text.encode())} bytes", context)

    def encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def is_thinking(self, ids: list[int]) -> bool:
        """Whether the last thinking tag opens, and in the turn that the model is to go on with: a user may write about tags."""
        t = self.tokenizer
        if not t.has_thinking:
            return False
        start = t.rfind_think_start(ids)
        return bool(start > t.rfind_think_end(ids) and t.eos_token_ids.isdisjoint(ids[start:]))

    # --- the template ------------------------------------------------------------------------------------------------

    def render(self, messages: list[Message], submit: Submit) -> str:
        """The template's text for `messages`: as they are, then in ever plainer forms until the template takes one."""
        first: Exception | None = None
        for plainer in (as_is, orderly, without_roles):
            try:
                return self.apply(plainer(messages), submit)
            except Exception as error:  # a template raises what it likes: TemplateError, TypeError, its author's own words
                first = first or error
        raise Refused(400, f"the model's chat template cannot take these messages: {first}")

    def apply(self, messages: list[Message], submit: Submit) -> str:
        """One rendering. A trailing assistant message is the answer's beginning, and the model goes on with it."""
        if not self.tokenizer.has_chat_template:
            return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        if submit.tools:
            options["tools"] = submit.tools
        if submit.think is not None:
            options["enable_thinking"] = submit.think
        # mlx-lm's wrapper would set enable_thinking by itself; None means what the template does.
        custom = submit.think is not None or self.tokenizer._chat_template is not None
        apply = self.tokenizer.apply_chat_template if custom else self.tokenizer._tokenizer.apply_chat_template
        if not is_begun(messages):
            return str(apply(messages, **options))
        begun: str = messages[-1]["content"]
        if begun.strip():
            try:
                return str(apply(messages, **options | {"add_generation_prompt": False, "continue_final_message": True}))
            except Exception:  # transformers looks for the message's text in the rendering, and some templates change it
                pass
        return str(apply(messages[:-1], **options)) + begun


def too_long(length: str, context: int) -> Refused:
    message = f"input length ({length}) exceeds the model's maximum context length ({context} tokens)"
    return Refused(400, message, code="context_length_exceeded")  # OpenAI's word: clients shorten what they send


def overlong(index: int, size: str, context: int) -> Refused:
    return Refused(400, f"the input length exceeds the context length: input[{index}] has {size}, the model reads {context} tokens")


# --- forms of a history ----------------------------------------------------------------------------------------------------


def tidy(message: Message) -> Message:
    """What every form has: a known role in lower case, text as content, arguments of tool calls as objects."""
    role = str(message.get("role", "user")).lower()
    role = "system" if role == "developer" else role if role in ROLES else "user"
    tidied = {key: value for key, value in message.items() if value is not None} | {"role": role}
    tidied["content"] = text_of(message.get("content"))
    if calls := message.get("tool_calls"):
        tidied["tool_calls"] = [tidy_call(call) for call in calls]
    return tidied


def is_begun(messages: list[Message]) -> bool:
    """Whether the last message is an answer to go on with."""
    last = messages[-1] if messages else {}
    return str(last.get("role")).lower() == "assistant" and not last.get("tool_calls")


def text_of(content: Any) -> str:
    """The text of a message: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def tidy_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError:  # a model's own broken call, sent back: the template gets it as it was
            pass
    return {"type": "function"} | call | {"function": function}


def as_is(messages: list[Message]) -> list[Message]:
    return messages


def orderly(messages: list[Message]) -> list[Message]:
    """One system message, first; then users and assistants in turn, a user first."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    ordered: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            continue
        if not ordered and message["role"] == "assistant":
            ordered.append({"role": "user", "content": ""})
        before = ordered[-1] if ordered else {}
        if message["role"] == before.get("role") != "tool" and "tool_calls" not in before:
            ordered[-1] = before | message | {"content": f"{before['content']}\n\n{message['content']}"}
        else:
            ordered.append(message)
    return ([{"role": "system", "content": system}] if system else []) + ordered


def without_roles(messages: list[Message]) -> list[Message]:
    """Users and assistants only: for templates that know no system and no tools (Gemma 1, old Mistral)."""
    plain = [{"role": m["role"] if m["role"] == "assistant" else "user", "content": said(m)} for m in orderly(messages)]
    return orderly(plain)


def said(message: Message) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


# --- what fits ---------------------------------------------------------------------------------------------------------------


def droppable(messages: list[Message]) -> list[int]:
    """Where the messages stand that truncation may drop, oldest first: no system message, and never the last."""
    return [i for i, m in enumerate(messages[:-1]) if m["role"] != "system"]


def drop_oldest(messages: list[Message], count: int) -> list[Message]:
    gone = set(droppable(messages)[:count])
    return [m for i, m in enumerate(messages) if i not in gone]


def bytes_left(messages: list[Message]) -> list[int]:
    """About how long the rendering is without the 0, 1, ... oldest messages that may be dropped."""
    sizes = [FRAME_BYTES + len(said(m).encode()) for m in messages]
    drops = [sizes[i] for i in droppable(messages)]
    return [sum(sizes) - gone for gone in accumulate(drops, initial=0)]


def truncated(render: Callable[[int], list[int] | None], left: list[int], context: int) -> list[int]:
    """The tokens with about as few messages dropped as fit `context` with room for an answer. Raises Refused.

    `left`: see `bytes_left`. Each rendering tells how many tokens a byte makes, and so what to drop: a long history costs few of them.
    """
    low, high = -1, len(left)  # low does not fit, high does or is more than there are
    fits: list[int] | None = None
    rate = 1 / USUAL_BYTES_PER_TOKEN
    dropped = misses = 0
    for _ in range(MOST_RENDERINGS):
        ids = render(dropped)
        if ids is not None and len(ids) < context:
            high, fits = dropped, ids
        else:
            low = dropped
            misses += 1
        if high - low == 1:
            break
        if ids is not None:
            rate = len(ids) / left[dropped]
        enough = bisect_left(left, -context * SHARES[misses] / rate, key=lambda size: -size)
        dropped = min(max(enough, low + 1), high - 1)
    if fits is None and low < len(left) - 1:
        ids = render(len(left) - 1)
        fits = ids if ids is not None and len(ids) < context else None
    if fits is None:
        raise too_long(f"{len(ids or []) or context} tokens", context)
    return fits
