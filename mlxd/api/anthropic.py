"""The Anthropic dialect: /v1/messages and /v1/messages/count_tokens. Requests in, named server-sent events out."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from mlxd.api import fields
from mlxd.api.exchange import Exchange
from mlxd.api.fields import Budget, Fraction, Integer, Malformed, Positive, StopString, Temperature, whole
from mlxd.api.service import Service
from mlxd.errors import Refused
from mlxd.journal import Answered, Request
from mlxd.messages import Call, Format, Sampling, Token
from mlxd.models import Model

#: What is below it is answered in this dialect, refusals included.
ROOT = "/v1/messages"
SSE = b"text/event-stream"
JSON = b"application/json"
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
#: Clients send the thinking back with it; mlxd does not look at it.
SIGNATURE = "mlxd"
#: Claude Code puts this before its system text, with another checksum in each request: no prefix of the prompt would be in the cache.
BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")

encode = msgspec.json.encode

# --- what comes in ---------------------------------------------------------------------------------------------------------------


class Block(Struct):
    """Of any type; what a type has no use for is left out."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = fields.free()
    tool_use_id: str | None = None
    content: msgspec.Raw = fields.free()
    is_error: bool | None = None


Content = str | Annotated[list[Block], Meta(max_length=4096)]


class Turn(Struct):
    role: Literal["user", "assistant", "system"]
    content: Content


class Tool(Struct):
    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: msgspec.Raw = fields.free()
    strict: bool | None = None


class ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class Thinking(Struct):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Integer | None = None


class OutputFormat(Struct):
    type: Literal["json_schema"]
    schema: msgspec.Raw = fields.free()


class OutputConfig(Struct):
    effort: Literal["minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Messages(fields.Body):
    """What is not here (metadata, service_tier, context_management, container, ...) is ignored. `seed` is mlxd's own."""

    model: str | None = None
    messages: Annotated[list[Turn], Meta(max_length=4096)] | None = None
    max_tokens: Positive | None = None
    system: Content | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: Integer | None = None
    seed: Integer | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=16)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None


calls = msgspec.json.Decoder(Messages)
contents = msgspec.json.Decoder(Content | None)
objects = msgspec.json.Decoder(dict[str, Any])
inputs = msgspec.json.Decoder(dict[str, Any] | None)


def conversation(call: Messages, budget: Budget) -> list[dict[str, Any]]:
    """As chat templates know them. Raises Malformed."""
    system = call.system or ""
    texts = [system] if isinstance(system, str) else [block.text or "" for block in system if block.type == "text"]
    told = "\n\n".join(filter(None, (BILLING.sub("", text) for text in texts)))
    result: list[dict[str, Any]] = [{"role": "system", "content": told}] if told else []
    names: dict[str, str] = {}
    for index, turn in enumerate(call.messages or []):
        result += said(turn, f"messages[{index}].content", names, budget)
    return result


def said(turn: Turn, path: str, names: dict[str, str], budget: Budget) -> list[dict[str, Any]]:
    """The messages of a turn: results of tools first, each with the name of its tool. `names`: of the calls so far, by id. Raises
    Malformed."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    uses: list[dict[str, Any]] = []
    for n, block in enumerate(turn.content):
        if block.type == "tool_result":
            results.append(tool_result(block, f"{path}[{n}]", names))
        elif block.type == "tool_use":
            uses.append(tool_use(block, f"{path}[{n}]", names, budget))
    item: dict[str, Any] = {"role": turn.role, "content": text_of(turn.content, path)}
    if thoughts := "".join(block.thinking or "" for block in turn.content if block.type == "thinking"):
        item["reasoning_content"] = thoughts
    if uses:
        item["tool_calls"] = uses
    return [*results, item] if item["content"] or len(item) > 2 or not results else results


def text_of(content: Content | None, path: str) -> str:
    """Blocks of unknown types say nothing; what cannot be read and would be missed is refused. Raises Malformed."""
    if not isinstance(content, list):
        return content or ""
    for n, block in enumerate(content):
        if block.type in ("image", "document"):
            raise Malformed(f"{path}[{n}]", f"this model reads text only, not {block.type}s")
    return "".join(block.text or "" for block in content if block.type == "text")


def tool_use(block: Block, path: str, names: dict[str, str], budget: Budget) -> dict[str, Any]:
    """Raises Malformed."""
    if not block.id or not block.name:
        raise Malformed(path, "a tool_use needs an id and a name")
    names[block.id] = block.name
    arguments = budget.decode(f"{path}.input", inputs, block.input) or {}
    return {"type": "function", "id": block.id, "function": {"name": block.name, "arguments": arguments}}


def tool_result(block: Block, path: str, names: dict[str, str]) -> dict[str, Any]:
    """Templates know no errors: such a result says so itself. Raises Malformed."""
    if not block.tool_use_id:
        raise Malformed(path, "a tool_result needs a tool_use_id")
    path += ".content"
    try:
        content = fields.decode(contents, bytes(block.content))
    except Malformed as wrong:
        raise Malformed(path + wrong.path, wrong.sentence) from None
    text = text_of(content, path)
    return {
        "role": "tool",
        "content": f"Error: {text}" if block.is_error else text,
        "name": names.get(block.tool_use_id, ""),
        "tool_call_id": block.tool_use_id,
    }


def functions(call: Messages, model: Model, budget: Budget) -> list[dict[str, Any]]:
    """The tools that may be called. Those that only Anthropic knows (a type, and no schema) are left out. Raises Malformed."""
    found = [
        function(tool, f"tools[{n}]", budget)
        for n, tool in enumerate(call.tools or [])
        if tool.type in (None, "custom") or bytes(tool.input_schema) != b"null"
    ]
    if call.tool_choice and call.tool_choice.type == "none":
        return []
    if found and not model.calls:
        raise Malformed("tools", f"{call.model} does not support tools")
    return found


def function(tool: Tool, path: str, budget: Budget) -> dict[str, Any]:
    """Raises Malformed."""
    if not tool.name:
        raise Malformed(f"{path}.name", "is required")
    described = {"name": tool.name} | ({"description": tool.description} if tool.description else {})
    schema = budget.decode(f"{path}.input_schema", objects, tool.input_schema)
    strict = {} if tool.strict is None else {"strict": tool.strict}
    return {"type": "function", "function": described | {"parameters": schema} | strict}


def tool_choice(choice: ToolChoice | None, tools: list[dict[str, Any]]) -> str:
    """As in messages.Submit. Raises Malformed when what must be called is not there."""
    if choice is None or choice.type in ("auto", "none"):
        return "auto"
    if choice.type == "any":
        if not tools:
            raise Malformed("tool_choice", "there is no tool to be called")
        return "required"
    name = choice.name or ""
    if not any(tool["function"]["name"] == name for tool in tools):
        raise Malformed("tool_choice.name", f"there is no tool {name[:80]!r} to be called")
    return name


def think(call: Messages, model: Model) -> bool | None:
    """A model without thinking ignores the wish: Claude Code has it of every model."""
    if not model.thinks:
        return None
    if call.thinking:
        return call.thinking.type != "disabled"
    return True if call.output_config and call.output_config.effort else None


def output_format(call: Messages, budget: Budget) -> Format | None:
    """Raises Malformed."""
    found, path = call.output_format, "output_format.schema"
    if call.output_config and call.output_config.format:
        found, path = call.output_config.format, "output_config.format.schema"
    if found is None:
        return None
    return Format(kind="json_schema", source=encode(budget.decode(path, objects, found.schema)).decode())


def request(call: Messages, model: Model) -> Request:
    """The one internal request; what is not said is as in /api/chat. Raises Refused."""
    if not call.messages:
        raise Malformed("messages", "at least one message is required")
    budget = Budget()
    tools = functions(call, model, budget)
    drawn, top_k = whole("seed", call.seed), whole("top_k", call.top_k)
    return Request(
        model=model,
        sampling=model.sampling(
            Sampling(seed=secrets.randbits(63), temperature=0.8, top_k=40, top_p=0.9),
            seed=None if drawn is None else drawn % 2**63,
            temperature=call.temperature,
            top_k=None if top_k is None else max(0, top_k),
            top_p=call.top_p,
        ),
        messages=conversation(call, budget),
        tools=tools or None,
        tool_choice=tool_choice(call.tool_choice, tools),
        format=output_format(call, budget),
        think=think(call, model),
        max_tokens=whole("max_tokens", call.max_tokens),
        stop=fields.strings(call.stop_sequences),
    )


# --- what goes out ---------------------------------------------------------------------------------------------------------------


class Events:
    """An answer as events, or as one message. `block`: the type of the open content block, "" when none is; `index`: its number, or the
    next one's."""

    stream_type = SSE
    whole_type = JSON

    def __init__(self, name: str, request_id: str):
        self.name = name
        self.request_id = request_id
        self.id = "msg_" + secrets.token_hex(12)
        self.block = ""
        self.index = 0

    def message(self, content: list[dict[str, Any]], ending: dict[str, Any], figures: dict[str, int]) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.name, "content": content}
        return head | ending | {"usage": figures}

    def begin(self, choice: int, prompt_tokens: int, cached_tokens: int) -> bytes:
        message = self.message([], {"stop_reason": None, "stop_sequence": None}, usage(prompt_tokens, 0))
        return event("message_start", message=message)

    def token(self, choice: int, token: Token) -> bytes:
        kind = "thinking" if token.thinking else "text"
        opened = b"" if self.block == kind else self.leave() + self.enter(thinking("") if token.thinking else text(""))
        return opened + self.delta(kind + "_delta", **{kind: token.text})

    def call(self, choice: int, call: Call) -> bytes:
        opened = self.leave() + self.enter(tool_used(call, b"{}"))
        return opened + self.delta("input_json_delta", partial_json=call.arguments) + self.leave()

    def enter(self, block: dict[str, Any]) -> bytes:
        self.block = block["type"]
        return event("content_block_start", index=self.index, content_block=block)

    def delta(self, kind: str, **more: str) -> bytes:
        return event("content_block_delta", index=self.index, delta={"type": kind} | more)

    def leave(self) -> bytes:
        """The end of the open block, if one is."""
        if not self.block:
            return b""
        signed = self.delta("signature_delta", signature=SIGNATURE) if self.block == "thinking" else b""
        ended = event("content_block_stop", index=self.index)
        self.block = ""
        self.index += 1
        return signed + ended

    def progress(self, done: int, total: int) -> bytes:
        return self.ping()

    def resumed(self, times: int) -> bytes:
        return b": x-mlxd-resumed: %d\n\n" % times

    def ping(self) -> bytes:
        return event("ping")

    def end(self, choice: int, answered: Answered) -> bytes:
        summary = answered.summary
        figures = usage(len(summary.prompt_ids), len(summary.emitted))
        return self.leave() + event("message_delta", delta=ending(answered), usage=figures)

    def close(self, answers: list[Answered]) -> bytes:
        return event("message_stop")

    def error(self, refused: Refused) -> bytes:
        return b"event: error\ndata: " + error_body(refused, self.request_id) + b"\n\n"

    def whole(self, answers: list[Answered]) -> bytes:
        (answered,) = answers
        content = [thinking(answered.thinking) | {"signature": SIGNATURE}] if answered.thinking else []
        content += [text(answered.text)] if answered.text else []
        content += [tool_used(call, call.arguments.encode()) for call in answered.calls]
        summary = answered.summary
        return encode(self.message(content, ending(answered), usage(len(summary.prompt_ids), len(summary.emitted))))


def event(kind: str, **more: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode({"type": kind} | more))


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def thinking(thought: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": thought, "signature": ""}


def tool_used(call: Call, arguments: bytes) -> dict[str, Any]:
    """`arguments`: a JSON object."""
    return {"type": "tool_use", "id": "toolu_" + secrets.token_hex(12), "name": call.name, "input": msgspec.Raw(arguments)}


def ending(answered: Answered) -> dict[str, Any]:
    """Why it ended. A call is there to be answered, whatever came after it; one that the limit has cut is none."""
    summary = answered.summary
    if summary.reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if answered.calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    return {"stop_reason": "stop_sequence" if summary.stop_string else "end_turn", "stop_sequence": summary.stop_string}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Clients add the three counts of input to learn how full the context is; the first has the whole prompt, as in all dialects."""
    return {
        "input_tokens": prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": completion_tokens,
    }


def error_body(refused: Refused, request_id: str) -> bytes:
    kind = ERROR_TYPES.get(refused.status, "api_error")
    return encode({"type": "error", "error": {"type": kind, "message": refused.message}, "request_id": request_id})


# --- the endpoints ---------------------------------------------------------------------------------------------------------------


async def messages(service: Service, exchange: Exchange) -> None:
    call = fields.decode(calls, await exchange.body())
    model = await service.find(call.model or "")
    if call.max_tokens is None:
        raise Malformed("max_tokens", "is required")
    events = Events(call.model or "", exchange.request_id)
    await service.answer(exchange, [request(call, model)], events, bool(call.stream))


async def count_tokens(service: Service, exchange: Exchange) -> None:
    call = fields.decode(calls, await exchange.body())
    model = await service.find(call.model or "")
    count = await service.count(exchange, request(call, model))
    await exchange.reply(200, encode({"input_tokens": count}))
