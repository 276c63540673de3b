"""The OpenAI dialect: /v1/models and /v1/chat/completions. Requests in, server-sent events out."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from mlxd.api import fields, vectors
from mlxd.api.exchange import Exchange
from mlxd.api.fields import NULL, Budget, Fraction, Integer, Malformed, Penalty, Positive, StopStrings, whole
from mlxd.api.service import Service
from mlxd.errors import Refused
from mlxd.journal import Answered, Request, Summary
from mlxd.messages import Call, Sampling, Token
from mlxd.models import Model

SSE = b"text/event-stream"
JSON = b"application/json"
ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error"}

encode = msgspec.json.encode

# --- what comes in ---------------------------------------------------------------------------------------------------------------


class Part(Struct):
    type: str
    text: str | None = None


class Function(Struct):
    name: str
    arguments: str | None = None


class ToolCall(Struct):
    function: Function
    id: str | None = None


class Message(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=1024)] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class StreamOptions(Struct):
    include_usage: bool | None = None


class Reasoning(Struct):
    effort: str | None = None


class ResponseFormat(Struct):
    type: str


class Chat(Struct):
    """What is not here (user, n, logit_bias, tool_choice, store, metadata, ...) is ignored."""

    model: str | None = None
    messages: Annotated[list[Message], Meta(max_length=4096)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    top_k: Integer | None = None
    min_p: Fraction | None = None
    seed: Integer | None = None
    stop: StopStrings | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    tools: msgspec.Raw = NULL
    tool_choice: msgspec.Raw = NULL
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    reasoning_effort: str | None = None
    reasoning: Reasoning | None = None


chats = msgspec.json.Decoder(Chat)

EFFORTS = ("minimal", "low", "medium", "high", "max", "xhigh", "ultra")


def think(call: Chat, model: Model) -> bool | None:
    """A model without thinking ignores the wish. Raises Malformed on an unknown effort."""
    effort = call.reasoning_effort or (call.reasoning.effort if call.reasoning else None)
    if effort is None:
        return None
    if effort != "none" and effort not in EFFORTS:
        raise Malformed("reasoning_effort", f"must be none, {', '.join(EFFORTS)}, not {effort[:40]!r}")
    return effort != "none" if model.thinks else None


def refuse_unsupported(call: Chat) -> None:
    """Raises Refused for what this version cannot do."""
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(call, name):
            raise Malformed(name, "not supported by mlxd; leave it out or set it to 0")
    if call.logprobs:
        raise Malformed("logprobs", "not supported by this version of mlxd")
    if call.response_format and call.response_format.type != "text":
        raise Malformed("response_format", "structured output is not supported by this version of mlxd")
    if fields.has_objects("tools", call.tools) and bytes(call.tool_choice) != b'"none"':
        raise Malformed("tools", f"{call.model} does not support tools")


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """As chat templates know them: arguments are objects, a tool's result bears its name. Raises Malformed."""
    result: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    budget = Budget()
    for index, message in enumerate(messages):
        item: dict[str, Any] = {
            "role": {"developer": "system", "function": "tool"}.get(message.role, message.role),
            "content": text_of(message.content, f"messages[{index}].content"),
        }
        if message.reasoning:
            item["reasoning_content"] = message.reasoning
        if message.tool_calls:
            item["tool_calls"] = [
                tool_call(call, f"messages[{index}].tool_calls[{n}]", budget) for n, call in enumerate(message.tool_calls)
            ]
            names |= {call.id: call.function.name for call in message.tool_calls if call.id}
        if item["role"] == "tool":
            item["name"] = message.name or names.get(message.tool_call_id or "", "")
            if message.tool_call_id:
                item["tool_call_id"] = message.tool_call_id
        result.append(item)
    return result


def text_of(content: str | list[Part] | None, path: str) -> str:
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text"):
            raise Malformed(path, f"this model reads text only, not {part.type[:40]!r}")
    return "".join(part.text or "" for part in content)


arguments = msgspec.json.Decoder(dict[str, Any])


def tool_call(call: ToolCall, path: str, budget: Budget) -> dict[str, Any]:
    """Raises Malformed."""
    value = budget.decode(f"{path}.function.arguments", arguments, (call.function.arguments or "{}").encode())
    item: dict[str, Any] = {"type": "function", "function": {"name": call.function.name, "arguments": value}}
    return item | {"id": call.id} if call.id else item


def request(call: Chat, model: Model, service: Service) -> Request:
    """The one internal request. Raises Refused."""
    refuse_unsupported(call)
    most = whole("max_tokens", call.max_tokens)
    most = most if call.max_completion_tokens is None else whole("max_completion_tokens", call.max_completion_tokens)
    drawn = whole("seed", call.seed)
    return Request(
        model=model,
        sampling=Sampling(
            seed=secrets.randbits(63) if drawn is None else drawn % 2**63,
            temperature=1.0 if call.temperature is None else call.temperature,
            top_k=max(0, whole("top_k", call.top_k) or 0),
            top_p=1.0 if call.top_p is None else call.top_p,
            min_p=call.min_p or 0.0,
        ),
        messages=conversation(call.messages or []),
        think=think(call, model),
        max_tokens=most,
        num_ctx=service.config.models.context_length or None,
        stop=fields.strings(call.stop),
    )


# --- what goes out ---------------------------------------------------------------------------------------------------------------


class Chunks:
    """An answer as chat.completion chunks, or as one chat.completion."""

    stream_type = SSE
    whole_type = JSON

    def __init__(self, name: str, include_usage: bool):
        self.name = name
        self.include_usage = include_usage
        self.id = "chatcmpl-" + secrets.token_hex(12)
        self.created = int(time.time())
        self.opening = b"data: " + encode(self.head("chat.completion.chunk"))[:-1]
        self.role = b'"role":"assistant",'

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name, "system_fingerprint": "mlxd"}

    def chunk(self, delta: bytes, reason: bytes = b"null") -> bytes:
        """The role stands in the first delta and in no other."""
        role, self.role = self.role, b""
        delta = role + delta if delta else role[:-1]
        return b"".join((self.opening, b',"choices":[{"index":0,"delta":{', delta, b'},"finish_reason":', reason, b"}]}\n\n"))

    def begin(self, choice: int, prompt_tokens: int, cached_tokens: int) -> bytes:
        return b""

    def token(self, choice: int, token: Token) -> bytes:
        return self.chunk((b'"reasoning":' if token.thinking else b'"content":') + encode(token.text))

    def call(self, choice: int, call: Call) -> bytes:
        return b""

    def progress(self, done: int, total: int) -> bytes:
        """A comment keeps clients from giving up during a long prefill."""
        return b": prefill %d of %d\n\n" % (done, total)

    def resumed(self, times: int) -> bytes:
        return b": x-mlxd-resumed: %d\n\n" % times

    def ping(self) -> bytes:
        return b": ping\n\n"

    def end(self, choice: int, answered: Answered) -> bytes:
        return self.chunk(b"", encode(answered.summary.reason))

    def close(self, answers: list[Answered]) -> bytes:
        figures = b""
        if self.include_usage:
            figures = self.opening + b',"choices":[],"usage":' + encode(usage(answers[0].summary)) + b"}\n\n"
        return figures + b"data: [DONE]\n\n"

    def error(self, refused: Refused) -> bytes:
        return b"data: " + error_body(refused) + b"\n\n"

    def whole(self, answers: list[Answered]) -> bytes:
        (answered,) = answers
        summary = answered.summary
        message = {"role": "assistant", "content": answered.text}
        message |= {"reasoning": answered.thinking} if answered.thinking else {}
        choice = {"index": 0, "message": message, "finish_reason": summary.reason}
        return encode(self.head("chat.completion") | {"choices": [choice], "usage": usage(summary)})


def usage(summary: Summary) -> dict[str, Any]:
    prompt, completion = len(summary.prompt_ids), len(summary.emitted)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": summary.cached_tokens},
    }


def error_body(refused: Refused) -> bytes:
    kind = ERROR_TYPES.get(refused.status, "api_error")
    param = refused.path if isinstance(refused, Malformed) and refused.path else None
    return encode({"error": {"message": refused.message, "type": kind, "param": param, "code": refused.code}})


# --- the endpoints ---------------------------------------------------------------------------------------------------------------


async def chat(service: Service, exchange: Exchange) -> None:
    call = fields.decode(chats, await exchange.body())
    model = await service.find(call.model or "")
    if not call.messages:
        raise Malformed("messages", "at least one message is required")
    chunks = Chunks(call.model or "", bool(call.stream_options and call.stream_options.include_usage))
    await service.answer(exchange, [request(call, model, service)], chunks, bool(call.stream))


async def models(service: Service, exchange: Exchange) -> None:
    found = await service.models()
    await exchange.reply(200, encode({"object": "list", "data": [described(model) for model in found]}))


async def model(service: Service, exchange: Exchange) -> None:
    name = exchange.scope["path_params"]["id"]
    await exchange.reply(200, encode(described(await service.find(name))))


def described(model: Model) -> dict[str, Any]:
    owner = "mlxd (built-in, for self-test and demo)" if model.builtin else "mlxd"
    return {"id": model.name, "object": "model", "created": int(model.modified_at), "owned_by": owner}


# --- embeddings ------------------------------------------------------------------------------------------------------------------


class Embeddings(Struct):
    """`input`: a text, several, the tokens of one, or those of several."""

    model: str | None = None
    input: str | list[str | Integer | list[Integer]] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None


embeds = msgspec.json.Decoder(Embeddings)


async def embeddings(service: Service, exchange: Exchange) -> None:
    call = fields.decode(embeds, await exchange.body())
    dimensions = whole("dimensions", call.dimensions)
    model = await service.find(call.model or "")
    request = Request(model=model, inputs=vectors.bounded(inputs(call.input)), num_ctx=service.config.models.context_length or None)
    found, _ = await service.embed(exchange, request)
    render = vectors.as_base64 if call.encoding_format == "base64" else vectors.as_list
    entries = (
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, render(vectors.numbers(vector, dimensions)))
        for index, vector in enumerate(found.vectors)
    )
    used = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    tail = b"]," + encode({"model": call.model, "usage": used})[1:]
    await vectors.reply(exchange, b'{"object":"list","data":[', entries, tail, JSON)


def inputs(given: str | list[Any] | None) -> list[str | list[int]]:
    """What is to be embedded, at least one. Raises Malformed."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise Malformed("input", "invalid input: at least one text is required")
    if isinstance(given[0], (int, float)):
        return [tokens(given, "input")]
    return [item if isinstance(item, str) else tokens(item, f"input[{index}]") for index, item in enumerate(given)]


def tokens(given: Any, path: str) -> list[int]:
    """Raises Malformed on anything but a list of whole numbers, one at least."""
    if not isinstance(given, list) or not given or not all(isinstance(token, (int, float)) for token in given):
        raise Malformed(path, "invalid input: expected a text or a list of tokens, all of one kind")
    return [token if isinstance(token, int) else whole(f"{path}[{index}]", token) or 0 for index, token in enumerate(given)]
