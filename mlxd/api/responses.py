"""OpenAI's newer API: /v1/responses. Requests in, typed events out; answers are kept for `previous_response_id`, in bounded memory."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from mlxd.api import fields, openai
from mlxd.api.exchange import Exchange
from mlxd.api.fields import Budget, Fraction, Malformed, Positive, whole
from mlxd.api.openai import Function, FunctionName, Part, Sse, offered, text_of, tool_call, with_top
from mlxd.api.service import Service
from mlxd.api.store import Kept
from mlxd.errors import Refused
from mlxd.journal import Answered, Request, Summary
from mlxd.messages import Call, Token, TokenLogprob
from mlxd.models import Model

encode = msgspec.json.encode

# --- what comes in ---------------------------------------------------------------------------------------------------------------


class Item(Struct):
    """One of `message` (the default), `function_call`, `custom_tool_call`, `local_shell_call`, what these gave back (`..._output`),
    `reasoning`, and `web_search_call`, which is passed over."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    namespace: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    action: msgspec.Raw = fields.free()
    output: str | list[Part] | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None


class Tool(Struct, omit_defaults=True):
    """A `function`, a `custom` tool, or a `namespace` of them. Others, such as `web_search`, are left out of what the model is told."""

    type: str
    name: FunctionName | None = None
    description: str | None = None
    parameters: msgspec.Raw = fields.free()
    strict: bool | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None


class ToolChoice(Struct):
    type: Literal["function", "custom"]
    name: str


class TextFormat(Struct, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: msgspec.Raw = fields.free()
    strict: bool | None = None


class Text(Struct, omit_defaults=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Struct):
    effort: str | None = None
    summary: str | None = None


class Create(fields.Body):
    """The body of /v1/responses. What is not here (service_tier, user, prompt_cache_key, background, ...) is ignored."""

    model: str | None = None
    input: str | Annotated[list[Item], Meta(max_length=16384)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: msgspec.Raw = fields.free()
    conversation: msgspec.Raw = fields.free()
    prompt: msgspec.Raw = fields.free()


creates = msgspec.json.Decoder(Create)
conversations = msgspec.json.Decoder(list[dict[str, Any]])
free = msgspec.json.Decoder(dict[str, Any])

#: Known, of no use to anybody if left out silently, and not here.
UNSUPPORTED = {"conversation": "use previous_response_id", "prompt": "there are no stored prompts"}
LOGPROBS = "message.output_text.logprobs"
#: What a custom tool takes, as a function.
FREE_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


class Offer(NamedTuple):
    """A tool as the model knows it, and what its client calls it."""

    tool: dict[str, Any]
    kind: str
    name: str
    namespace: str | None


def offers(tools: list[Tool], path: str, budget: Budget, namespace: str | None = None) -> list[Offer]:
    """The tools of those kinds that a model can call. Raises Malformed."""
    found: list[Offer] = []
    for index, one in enumerate(tools):
        where = f"{path}[{index}]"
        if one.type not in ("function", "custom", "namespace"):
            continue
        if one.name is None:
            raise Malformed(f"{where}.name", f"a {one.type} needs a name")
        full = f"{namespace}.{one.name}" if namespace else one.name
        if one.type == "namespace":
            found += offers(one.tools or [], f"{where}.tools", budget, full)
        elif one.type == "function":
            told = openai.tool(Function(full, one.description, one.parameters, one.strict), where, budget)
            found.append(Offer(told, "function", one.name, namespace))
        else:
            function = {"name": full, "description": one.description or "", "parameters": FREE_TEXT}
            found.append(Offer({"type": "function", "function": function}, "custom", one.name, namespace))
    return found


def transcript(before: list[dict[str, Any]], items: list[Item], name: str, budget: Budget) -> list[dict[str, Any]]:
    """The conversation `before` and what the items add, as messages: what an assistant thought, said and called in one go is one of them.
    Raises Malformed."""
    messages = list(before)
    names = {call.get("id"): call["function"]["name"] for message in before for call in message.get("tool_calls", [])}
    thinking = ""
    for index, item in enumerate(items):
        path = f"input[{index}]"
        match item.type or "message":
            case "message":
                if item.role is None:
                    raise Malformed(f"{path}.role", "a message needs a role")
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": text_of(item.content, f"{path}.content", name)})
                if thinking and role == "assistant":
                    messages[-1]["reasoning_content"] = thinking
                thinking = ""
            case "reasoning":
                thinking += thought(item)
            case "function_call" | "custom_tool_call" | "local_shell_call" as kind:
                call = called(kind, item, path, budget)
                names[item.call_id] = call["function"]["name"]
                if thinking or len(messages) == len(before) or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""} | ({"reasoning_content": thinking} if thinking else {}))
                    thinking = ""
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
                result = {"role": "tool", "content": text_of(item.output, f"{path}.output", name)}
                result["name"] = names.get(item.call_id, "")
                messages.append(result | ({"tool_call_id": item.call_id} if item.call_id else {}))
            case "web_search_call":
                pass
            case other:
                raise Malformed(f"{path}.type", f"{other[:40]!r} is not a type of item that mlxd knows")
    return messages


def thought(item: Item) -> str:
    """What a reasoning item says: its summary, or what stands for it."""
    parts = item.summary or (item.content if isinstance(item.content, list) else [])
    return "".join(part.text or "" for part in parts) or item.encrypted_content or ""


def called(kind: str, item: Item, path: str, budget: Budget) -> dict[str, Any]:
    """An earlier call. Raises Malformed."""
    if kind == "local_shell_call":
        return tool_call(item.call_id, "local_shell", bytes(item.action).decode(), f"{path}.action", budget)
    if item.name is None:
        raise Malformed(f"{path}.name", "a call needs a name")
    name = f"{item.namespace}.{item.name}" if item.namespace else item.name
    arguments = encode({"input": item.input or ""}).decode() if kind == "custom_tool_call" else item.arguments
    return tool_call(item.call_id, name, arguments, f"{path}.arguments", budget)


class Asked(NamedTuple):
    """What a body comes to. `messages`: the conversation without the instructions, which hold for one answer only. `offers`: by the names
    that the model knows."""

    request: Request
    messages: list[dict[str, Any]]
    offers: dict[str, Offer]


def ask(call: Create, model: Model, service: Service) -> Asked:
    """Raises Malformed."""
    name = call.model or ""
    for field, remedy in UNSUPPORTED.items():
        if bytes(getattr(call, field)) != b"null":
            raise Malformed(field, f"not supported by mlxd: {remedy}")
    if call.input is None or call.input == []:
        raise Malformed("input", "text or at least one item is required")
    items = [Item(role="user", content=call.input)] if isinstance(call.input, str) else call.input
    budget = Budget()
    messages = transcript(earlier(call.previous_response_id, service), items, name, budget)
    found = {offer.tool["function"]["name"]: offer for offer in offers(call.tools or [], "tools", budget)}
    choice = call.tool_choice
    tools, tool_choice = offered(
        [offer.tool for offer in found.values()],
        choice if isinstance(choice, str) else None,
        choice.name if isinstance(choice, ToolChoice) else None,
        model,
        name,
    )
    wanted = call.text.format if call.text and call.text.format else TextFormat("text")
    request = Request(
        model=model,
        sampling=model.sampling(openai.usual(), temperature=call.temperature, top_p=call.top_p),
        messages=[{"role": "system", "content": call.instructions}, *messages] if call.instructions else messages,
        tools=tools,
        tool_choice=tool_choice,
        format=openai.json_format(wanted.type, wanted.schema, "text.format.schema", budget),
        think=openai.think(call.reasoning.effort if call.reasoning else None, model, "reasoning.effort"),
        max_tokens=whole("max_output_tokens", call.max_output_tokens),
        top_logprobs=call.top_logprobs or 0 if call.top_logprobs is not None or LOGPROBS in (call.include or []) else None,
        truncate=call.truncation == "auto",
    )
    return Asked(request, messages, found)


def earlier(id: str | None, service: Service) -> list[dict[str, Any]]:
    """The conversation that ended with a kept answer. Raises Malformed."""
    if id is None:
        return []
    kept = service.store.get(id)
    if kept is None:
        sentence = f"there is no response with id {id[:80]!r} here (any more)"
        raise Malformed("previous_response_id", sentence, code="previous_response_not_found")
    return conversations.decode(kept.conversation)


# --- what goes out ---------------------------------------------------------------------------------------------------------------


class Events(Sse):
    """An answer as events, or as one response. `output`: the items that are complete; `item`: the one that is not, of which `pieces` are
    here, and the log-probabilities `said` and not yet `unsaid`."""

    def __init__(self, call: Create, asked: Asked, service: Service):
        self.asked = asked
        self.store = service.store if call.store is not False else None
        self.id = new_id("resp")
        self.created_at = int(time.time())
        self.settings = settings(call)
        self.number = 0
        self.output: list[dict[str, Any]] = []
        self.item: dict[str, Any] | None = None
        self.pieces: list[str] = []
        self.said: list[TokenLogprob] = []
        self.unsaid: list[TokenLogprob] = []
        self.call_ids: list[str] = []

    def event(self, kind: str, **members: Any) -> bytes:
        data = {"type": kind, "sequence_number": self.number} | members
        self.number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode(data))

    def of_item(self, kind: str, item: dict[str, Any], **members: Any) -> bytes:
        return self.event(kind, item_id=item["id"], output_index=len(self.output), **members)

    # --- the stream -----------------------------------------------------------------------------------------------------------

    def begin(self, choice: int, prompt_tokens: int, cached_tokens: int) -> bytes:
        if self.number:
            return b""
        response = self.response("in_progress")
        return self.event("response.created", response=response) + self.event("response.in_progress", response=response)

    def token(self, choice: int, token: Token) -> bytes:
        self.unsaid += token.logprobs
        if not token.text:
            return b""
        data = self.turn("reasoning" if token.thinking else "message")
        assert self.item is not None
        self.pieces.append(token.text)
        if token.thinking:
            kind = "response.reasoning_summary_text.delta"
            return data + self.of_item(kind, self.item, summary_index=0, delta=token.text)
        logprobs, self.unsaid = self.unsaid, []
        self.said += logprobs
        more = {"content_index": 0, "delta": token.text, "logprobs": [with_top(one) for one in logprobs]}
        return data + self.of_item("response.output_text.delta", self.item, **more)

    def turn(self, kind: str) -> bytes:
        """To an item of this kind, unless it is open."""
        if self.item is not None and self.item["type"] == kind:
            return b""
        data = self.shut()
        self.pieces, self.said = [], []
        self.item = item = reasoning("") if kind == "reasoning" else message("", [])
        begun = item | {"status": "in_progress"} | ({"content": []} if kind == "message" else {"summary": []})
        data += self.event("response.output_item.added", output_index=len(self.output), item=begun)
        if kind == "message":
            data += self.of_item("response.content_part.added", item, content_index=0, part=item["content"][0])
        return data

    def shut(self) -> bytes:
        """The end of the item that is open."""
        if self.item is None:
            return b""
        id, text = self.item["id"], "".join(self.pieces)
        if self.item["type"] == "reasoning":
            item = reasoning(text, id)
            data = self.of_item("response.reasoning_summary_text.done", item, summary_index=0, text=text)
        else:
            item, self.unsaid = message(text, self.said + self.unsaid, id), []
            part = item["content"][0]
            data = self.of_item("response.output_text.done", item, content_index=0, text=text, logprobs=part["logprobs"])
            data += self.of_item("response.content_part.done", item, content_index=0, part=part)
        self.item = None
        return data + self.complete(item)

    def complete(self, item: dict[str, Any]) -> bytes:
        data = self.event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        return data

    def call(self, choice: int, call: Call) -> bytes:
        data = self.shut()
        item = self.made(call)
        custom = item["type"] == "custom_tool_call"
        field, kind = ("input", "custom_tool_call_input") if custom else ("arguments", "function_call_arguments")
        begun = item | {"status": "in_progress", field: ""}
        data += self.event("response.output_item.added", output_index=len(self.output), item=begun)
        data += self.of_item(f"response.{kind}.delta", item, delta=item[field])
        data += self.of_item(f"response.{kind}.done", item, **{field: item[field]}, **({} if custom else {"name": item["name"]}))
        return data + self.complete(item)

    def end(self, choice: int, answered: Answered) -> bytes:
        data = b"" if answered.text or answered.calls else self.turn("message")
        return data + self.shut()

    def close(self, answers: list[Answered]) -> bytes:
        return self.event("response.completed", response=self.finished(answers[0]))

    def error(self, refused: Refused) -> bytes:
        data = self.begin(0, 0, 0)
        told = {"code": refused.code or "server_error", "message": refused.message}
        return data + self.event("response.failed", response=self.response("failed", error=told))

    # --- the whole ------------------------------------------------------------------------------------------------------------

    def whole(self, answers: list[Answered]) -> bytes:
        (answered,) = answers
        if answered.thinking:
            self.output.append(reasoning(answered.thinking))
        if answered.text or not answered.calls:
            self.output.append(message(answered.text, answered.logprobs))
        self.output += [self.made(call) for call in answered.calls]
        return encode(self.finished(answered))

    def made(self, call: Call) -> dict[str, Any]:
        """A call as its client knows the tool."""
        self.call_ids.append(openai.new_call_id())
        offer = self.asked.offers.get(call.name)
        named: dict[str, Any] = {"call_id": self.call_ids[-1], "name": offer.name if offer else call.name}
        if offer and offer.namespace:
            named["namespace"] = offer.namespace
        if offer and offer.kind == "custom":
            text = free.decode(call.arguments).get("input", "")
            item = {"id": new_id("ctc"), "type": "custom_tool_call", "status": "completed"} | named
            return item | {"input": text if isinstance(text, str) else encode(text).decode()}
        item = {"id": new_id("fc"), "type": "function_call", "status": "completed"} | named
        return item | {"arguments": call.arguments}

    def finished(self, answered: Answered) -> dict[str, Any]:
        """The response at its end, kept for later. A cut by the token limit is `completed`, too: Codex takes `incomplete` for an error."""
        cut = {"reason": "max_output_tokens"} if answered.summary.reason == "length" else None
        response = self.response("completed", usage=usage(answered.summary), incomplete_details=cut)
        if self.store is not None:
            said: dict[str, Any] = {"role": "assistant", "content": answered.text}
            if answered.thinking:
                said["reasoning_content"] = answered.thinking
            if answered.calls:
                pairs = zip(self.call_ids, answered.calls, strict=True)
                said["tool_calls"] = [remembered(id, call) for id, call in pairs]
            self.store.put(self.id, Kept(encode(response), encode([*self.asked.messages, said])))
        return response

    def response(self, status: str, **members: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": "response", "created_at": self.created_at, "status": status, "background": False}
        ends = {"error": None, "incomplete_details": None, "usage": None} | members
        return head | self.settings | {"output": list(self.output)} | ends


def settings(call: Create) -> dict[str, Any]:
    """What a response repeats of its request."""
    reasoning = call.reasoning or Reasoning()
    metadata = call.metadata if bytes(call.metadata).startswith(b"{") else {}
    return {
        "model": call.model or "",
        "instructions": call.instructions,
        "previous_response_id": call.previous_response_id,
        "max_output_tokens": call.max_output_tokens,
        "temperature": 1.0 if call.temperature is None else call.temperature,
        "top_p": 1.0 if call.top_p is None else call.top_p,
        "top_logprobs": call.top_logprobs or 0,
        "tools": call.tools or [],
        "tool_choice": call.tool_choice or "auto",
        "parallel_tool_calls": call.parallel_tool_calls is not False,
        "text": {"format": (call.text and call.text.format) or {"type": "text"}},
        "reasoning": reasoning,
        "truncation": call.truncation or "disabled",
        "store": call.store is not False,
        "metadata": metadata,
    }


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


def reasoning(text: str, id: str | None = None) -> dict[str, Any]:
    summary = [{"type": "summary_text", "text": text}]
    return {"id": id or new_id("rs"), "type": "reasoning", "status": "completed", "summary": summary}


def message(text: str, logprobs: list[TokenLogprob], id: str | None = None) -> dict[str, Any]:
    told = [with_top(one) for one in logprobs]
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": told}]
    return {"id": id or new_id("msg"), "type": "message", "status": "completed", "role": "assistant", "content": content}


def remembered(id: str, call: Call) -> dict[str, Any]:
    """A call as chat templates know it."""
    return {"id": id, "type": "function", "function": {"name": call.name, "arguments": free.decode(call.arguments)}}


def usage(summary: Summary) -> dict[str, Any]:
    prompt, completion = len(summary.prompt_ids), len(summary.emitted)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": summary.cached_tokens},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": summary.thinking_tokens},
        "total_tokens": prompt + completion,
    }


# --- the endpoints ---------------------------------------------------------------------------------------------------------------


async def create(service: Service, exchange: Exchange) -> None:
    call = fields.decode(creates, await exchange.body())
    model = await service.find(call.model or "")
    asked = ask(call, model, service)
    events = Events(call, asked, service)
    try:
        await service.answer(exchange, [asked.request], events, bool(call.stream))
    except Refused as refused:
        if not call.stream or refused.code != "context_length_exceeded":
            raise
        await exchange.stream(
            events.stream_type
        )  # Codex makes its conversation shorter when it reads this in a stream, and only then
        await exchange.write(events.error(refused), last=True)


async def retrieve(service: Service, exchange: Exchange) -> None:
    id = exchange.scope["path_params"]["id"]
    kept = service.store.get(id)
    if kept is None:
        raise unknown(id)
    await exchange.reply(200, kept.answer)


async def delete(service: Service, exchange: Exchange) -> None:
    id = exchange.scope["path_params"]["id"]
    if not service.store.drop(id):
        raise unknown(id)
    await exchange.reply(200, encode({"id": id, "object": "response", "deleted": True}))


def unknown(id: str) -> Refused:
    return Refused(404, f"there is no response with id {id[:80]!r} here (any more)", code="response_not_found")
