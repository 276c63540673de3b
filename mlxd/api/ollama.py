"""The Ollama dialect: /api/*. Requests in, NDJSON out."""

from __future__ import annotations

import re
import secrets
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from mlxd.api import fields, vectors
from mlxd.api.exchange import Exchange
from mlxd.api.fields import NULL, Budget, Fraction, Integer, Malformed, Positive, StopStrings, Temperature, whole
from mlxd.api.service import Service
from mlxd.errors import Refused
from mlxd.journal import Answered, Request, Summary
from mlxd.messages import Call, Embedded, Sampling, Token
from mlxd.models import Model
from mlxd.pool import Engine, keep_alive_s

#: Clients read it as Ollama's: VS Code wants >= 0.6.4, Codex >= 0.13.4, Open WebUI runs int() on each part.
VERSION = "0.14.0"
NDJSON = b"application/x-ndjson"
WHOLE_JSON = b"application/json; charset=utf-8"
#: "For ever", as Ollama writes it.
FOREVER = "2318-01-01T00:00:00Z"

encode = msgspec.json.encode
T = TypeVar("T")

# --- what comes in ---------------------------------------------------------------------------------------------------------------


class Options(Struct):
    """Unknown ones are ignored, as are those that only tune other engines (num_gpu, num_thread, use_mmap, ...)."""

    num_ctx: Integer | None = None
    num_predict: Integer | None = None
    temperature: Temperature | None = None
    top_k: Integer | None = None
    top_p: Fraction | None = None
    min_p: Fraction | None = None
    seed: Integer | None = None
    stop: StopStrings | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


#: What Ollama itself calls the types of its options.
GO_TYPES = {"stop": "[]string", "num_ctx": "int", "num_predict": "int", "top_k": "int", "seed": "int"}
#: Options that this engine does not have, and the values (0 is Ollama's "off") that ask for nothing.
NEUTRAL = {
    "typical_p": (0.0, 1.0),
    "repeat_penalty": (0.0, 1.0),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}


class FunctionCall(Struct):
    name: str
    arguments: msgspec.Raw = NULL


class ToolCall(Struct):
    function: FunctionCall
    id: str | None = None


class Message(Struct):
    role: str
    content: str | None = None
    images: msgspec.Raw = NULL
    thinking: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=1024)] | None = None
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class Common(Struct):
    """What generate and chat share."""

    model: str | None = None
    stream: bool | None = None
    format: msgspec.Raw = NULL
    keep_alive: float | str | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: (Annotated[int, Meta(ge=0, le=20)]) | None = None
    truncate: bool | None = None


class Chat(Common):
    messages: Annotated[list[Message], Meta(max_length=4096)] | None = None
    tools: msgspec.Raw = NULL


class Generate(Common):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: msgspec.Raw = NULL


class Named(Struct):
    model: str | None = None
    name: str | None = None


chats = msgspec.json.Decoder(Chat)
generates = msgspec.json.Decoder(Generate)
nameds = msgspec.json.Decoder(Named)
arguments = msgspec.json.Decoder(dict[str, Any] | None)


def parse(decoder: msgspec.json.Decoder[T], body: bytearray) -> T:
    """Raises Refused with Ollama's own words for an option of the wrong type."""
    try:
        return fields.decode(decoder, body)
    except Malformed as wrong:
        raise said(wrong) from None


def said(wrong: Malformed) -> Refused:
    """The same in Ollama's words, if it is an option that is wrong."""
    section, _, name = wrong.path.partition(".")
    if section != "options" or not name:
        return wrong
    name = re.sub(r"\[.*", "", name)
    if ", got " in wrong.sentence:
        return Refused(400, f'option "{name}" must be of type {GO_TYPES.get(name, "float32")}')
    return Refused(400, f'option "{name}": {wrong.sentence}')


def sampling(options: Options) -> Sampling:
    """Ollama's defaults. Raises Refused."""
    for name, neutral in NEUTRAL.items():
        value = getattr(options, name)
        if value is not None and value not in neutral:
            raise Refused(400, f'option "{name}" is not supported by mlxd; leave it out or set it to {neutral[-1]:g}')
    drawn = integer(options, "seed")
    top_k = integer(options, "top_k")
    return Sampling(
        seed=secrets.randbits(63) if drawn is None or drawn < 0 else drawn,
        temperature=0.8 if options.temperature is None else options.temperature,
        top_k=40 if top_k is None else max(0, top_k),
        top_p=0.9 if options.top_p is None else options.top_p,
        min_p=options.min_p or 0.0,
    )


def integer(options: Options, name: str) -> int | None:
    try:
        return whole(f"options.{name}", getattr(options, name))
    except Malformed as wrong:
        raise said(wrong) from None


def think(asked: bool | str | None, model: Model, name: str) -> bool | None:
    """Raises Refused when a model without thinking is asked to think."""
    if asked and not model.thinks:
        raise Refused(400, f'"{name}" does not support thinking')
    return None if asked is None else bool(asked)


def refuse_unsupported(call: Chat | Generate, name: str) -> None:
    """What this version cannot do is refused: leaving it out silently would make the model invent. Raises Refused."""
    if bytes(call.format) not in (b"null", b'""'):
        raise Refused(400, "format: structured output is not supported by this version of mlxd")
    if call.logprobs:
        raise Refused(400, "logprobs: not supported by this version of mlxd")
    messages = call.messages or [] if isinstance(call, Chat) else []
    images = [(f"messages[{index}].images", message.images) for index, message in enumerate(messages)]
    if isinstance(call, Generate):
        images = [("images", call.images)]
    if any(fields.has_items(path, raw) for path, raw in images):
        raise Refused(400, f"{name} does not support images")
    if isinstance(call, Chat) and fields.has_objects("tools", call.tools):
        raise Refused(400, f"{name} does not support tools")
    if isinstance(call, Generate) and call.suffix:
        raise Refused(400, f"{name} does not support insert")


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """As chat templates know them. A tool's result without a name belongs to the last call. Raises Refused."""
    result: list[dict[str, Any]] = []
    called = ""
    budget = Budget()
    for index, message in enumerate(messages):
        role = message.role.lower()
        if role not in ("system", "user", "assistant", "tool"):
            raise Refused(400, f"messages[{index}].role: must be system, user, assistant or tool, not {message.role[:40]!r}")
        item: dict[str, Any] = {"role": role, "content": message.content or ""}
        if message.thinking:
            item["reasoning_content"] = message.thinking
        if message.tool_calls:
            item["tool_calls"] = [
                tool_call(call, f"messages[{index}].tool_calls[{n}]", budget) for n, call in enumerate(message.tool_calls)
            ]
            called = message.tool_calls[-1].function.name
        if role == "tool":
            item["name"] = message.tool_name or message.name or called
            if message.tool_call_id:
                item["tool_call_id"] = message.tool_call_id
        result.append(item)
    return result


def tool_call(call: ToolCall, path: str, budget: Budget) -> dict[str, Any]:
    """Raises Malformed."""
    value = budget.decode(f"{path}.function.arguments", arguments, call.function.arguments) or {}
    item: dict[str, Any] = {"type": "function", "function": {"name": call.function.name, "arguments": value}}
    return item | {"id": call.id} if call.id else item


def request(call: Chat | Generate, model: Model, service: Service) -> Request:
    """The one internal request. Raises Refused."""
    name = call.model or ""
    refuse_unsupported(call, name)
    options = call.options or Options()
    prompt, messages = None, None
    if isinstance(call, Chat):
        messages = conversation(call.messages or [])
    elif call.raw:
        if call.system or call.template or call.context:
            raise Refused(400, "raw mode does not support template, system, or context")
        prompt = call.prompt
    else:
        messages = [{"role": "system", "content": call.system}] if call.system else []
        messages.append({"role": "user", "content": call.prompt})
    most = integer(options, "num_predict")
    window = integer(options, "num_ctx")
    return Request(
        model=model,
        sampling=sampling(options),
        messages=messages,
        prompt=prompt,
        think=think(call.think, model, name),
        max_tokens=most if most is not None and most > 0 else None,
        num_ctx=max(4, window) if window and window > 0 else service.config.models.context_length or None,
        stop=fields.strings(options.stop),
        truncate=isinstance(call, Chat) and call.truncate is not False,
        keep_alive_s=keep_alive_s(call.keep_alive),
    )


# --- what goes out ---------------------------------------------------------------------------------------------------------------


def timestamp(seconds: float | None = None) -> str:
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Lines:
    """An answer as NDJSON. `piece`: the members that carry text and thinking, `extra`: those of the last line only."""

    stream_type = NDJSON
    whole_type = WHOLE_JSON

    def __init__(self, name: str):
        self.opening = b'{"model":' + encode(name) + b',"created_at":"'

    def piece(self, text: str, thinking: str) -> bytes:
        raise NotImplementedError

    def extra(self, summary: Summary) -> dict[str, Any]:
        return {}

    def line(self, text: str, thinking: str, rest: bytes) -> bytes:
        return b"".join((self.opening, timestamp().encode(), b'",', self.piece(text, thinking), rest))

    def begin(self, choice: int, prompt_tokens: int, cached_tokens: int) -> bytes:
        return b""

    def token(self, choice: int, token: Token) -> bytes:
        return self.more("" if token.thinking else token.text, token.text if token.thinking else "")

    def more(self, text: str, thinking: str = "") -> bytes:
        return self.line(text, thinking, b',"done":false}\n')

    def call(self, choice: int, call: Call) -> bytes:
        return b""

    def progress(self, done: int, total: int) -> bytes:
        return b""

    def resumed(self, times: int) -> bytes:
        return b""

    def ping(self) -> bytes:
        """NDJSON has no comments; Ollama's clients add an empty piece to what they have."""
        return self.more("")

    def end(self, choice: int, answered: Answered) -> bytes:
        return self.final("", "", answered.summary) + b"\n"

    def close(self, answers: list[Answered]) -> bytes:
        return b""

    def whole(self, answers: list[Answered]) -> bytes:
        (answered,) = answers
        return self.final(answered.text, answered.thinking, answered.summary)

    def final(self, text: str, thinking: str, summary: Summary) -> bytes:
        figures = {
            "done": True,
            "done_reason": summary.reason,
            "total_duration": summary.total_ns,
            "load_duration": summary.load_ns,
            "prompt_eval_count": len(summary.prompt_ids),
            "prompt_eval_duration": summary.prompt_ns,
            "eval_count": len(summary.emitted),
            "eval_duration": summary.eval_ns,
        }
        return self.line(text, thinking, b"," + encode(figures | self.extra(summary))[1:])

    def bare(self, reason: str, load_ns: int) -> bytes:
        """The answer to a request that only loads or unloads."""
        figures = {"done": True, "done_reason": reason, "total_duration": load_ns, "load_duration": load_ns}
        return self.line("", "", b"," + encode(figures)[1:])

    def error(self, refused: Refused) -> bytes:
        return error_body(refused) + b"\n"


class ChatLines(Lines):
    def piece(self, text: str, thinking: str) -> bytes:
        more = b',"thinking":' + encode(thinking) if thinking else b""
        return b'"message":{"role":"assistant","content":' + encode(text) + more + b"}"


class GenerateLines(Lines):
    def __init__(self, name: str, raw: bool):
        super().__init__(name)
        self.raw = raw

    def piece(self, text: str, thinking: str) -> bytes:
        more = b',"thinking":' + encode(thinking) if thinking else b""
        return b'"response":' + encode(text) + more

    def extra(self, summary: Summary) -> dict[str, Any]:
        return {} if self.raw else {"context": summary.prompt_ids + summary.emitted}


def error_body(refused: Refused) -> bytes:
    return encode({"error": refused.message})


# --- the endpoints ---------------------------------------------------------------------------------------------------------------


async def root(service: Service, exchange: Exchange) -> None:
    await exchange.reply(200, b"Ollama is running", b"text/plain; charset=utf-8")


async def version(service: Service, exchange: Exchange) -> None:
    await exchange.reply(200, encode({"version": VERSION}))


async def chat(service: Service, exchange: Exchange) -> None:
    call = parse(chats, await exchange.body())
    model = await service.find(call.model or "")
    lines = ChatLines(call.model or "")
    if not call.messages:
        await load(service, exchange, call, model, lines)
    else:
        await service.answer(exchange, [request(call, model, service)], lines, call.stream is not False)


async def generate(service: Service, exchange: Exchange) -> None:
    call = parse(generates, await exchange.body())
    model = await service.find(call.model or "")
    lines = GenerateLines(call.model or "", bool(call.raw))
    if not call.prompt:
        await load(service, exchange, call, model, lines)
    else:
        await service.answer(exchange, [request(call, model, service)], lines, call.stream is not False)


async def load(service: Service, exchange: Exchange, call: Common, model: Model, lines: Lines) -> None:
    """Nothing to say: load the model, or unload it with keep_alive 0. One JSON object even when streaming."""
    for name in ("tools", "images"):
        fields.has_items(name, getattr(call, name, NULL))
    seconds = keep_alive_s(call.keep_alive)
    load_ns = await service.load(exchange, model, seconds)
    if not exchange.left:
        await exchange.reply(200, lines.bare("unload" if seconds == 0 else "load", load_ns), WHOLE_JSON)


async def tags(service: Service, exchange: Exchange) -> None:
    await exchange.reply(200, encode({"models": [described(model) for model in await service.models()]}))


async def ps(service: Service, exchange: Exchange) -> None:
    """What is loaded, the longest-lived first."""
    engines = sorted(service.pool.loaded(), key=lambda engine: -engine.expires_at)
    await exchange.reply(200, encode({"models": [described(engine.model) | lifetime(service, engine) for engine in engines]}))


async def show(service: Service, exchange: Exchange) -> None:
    call = parse(nameds, await exchange.body())
    model = await service.find(call.model or call.name or "")
    entry = described(model)
    note = "# The built-in model of mlxd, for self-test and demo.\n" if model.builtin else ""
    body = {
        "modelfile": f"{note}FROM {model.name}\n",
        "parameters": "",
        "template": await service.template(model),
        "details": entry["details"],
        "model_info": {
            "general.architecture": model.family,
            "general.basename": model.name.removesuffix(":latest"),
            "general.parameter_count": model.parameters,
            f"{model.family}.context_length": model.context_length,
            f"{model.family}.embedding_length": model.embedding_length,
        },
        "capabilities": entry["capabilities"],
        "modified_at": entry["modified_at"],
    }
    await exchange.reply(200, encode(body))


def lifetime(service: Service, engine: Engine) -> dict[str, Any]:
    left = engine.expires_at - service.pool.clock()
    return {
        "expires_at": FOREVER if left > 1e9 else timestamp(time.time() + max(0.0, left)),
        "size_vram": engine.model.size_bytes,
        "context_length": engine.context_length,
    }


def described(model: Model) -> dict[str, Any]:
    """An entry of the lists. Every string in `details` is needed: one null hides all models from Zed."""
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": timestamp(model.modified_at),
        "size": model.size_bytes,
        "digest": model.digest,
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": model.family,
            "families": [model.family],
            "parameter_size": model.parameter_size,
            "quantization_level": model.quantization,
        }
        | ({"description": "built-in model of mlxd, for self-test and demo"} if model.builtin else {}),
        "capabilities": capabilities(model),
    }


def capabilities(model: Model) -> list[str]:
    if model.embeds:
        return ["embedding"]
    return ["completion", "thinking"] if model.thinks else ["completion"]


# --- embeddings ------------------------------------------------------------------------------------------------------------------


class Embed(Struct):
    model: str | None = None
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: Positive | None = None
    keep_alive: float | str | None = None
    options: Options | None = None


class EmbedPrompt(Struct):
    """The older call. Its answer is one vector."""

    model: str | None = None
    prompt: str | None = None
    keep_alive: float | str | None = None
    options: Options | None = None


embeds = msgspec.json.Decoder(Embed)
embed_prompts = msgspec.json.Decoder(EmbedPrompt)


async def embed(service: Service, exchange: Exchange) -> None:
    try:
        call = parse(embeds, await exchange.body())
    except Malformed as wrong:
        if wrong.path.partition("[")[0] == "input":
            raise Malformed("input", "invalid input type, it must be a string or a list of strings") from None
        raise
    dimensions = whole("dimensions", call.dimensions)
    found, load_ns = await embedded(service, exchange, call, [call.input] if isinstance(call.input, str) else call.input or [])
    figures = {"total_duration": max(exchange.age_ns(), load_ns), "load_duration": load_ns, "prompt_eval_count": found.tokens}
    head = b'{"model":' + encode(call.model) + b',"embeddings":['
    lists = (vectors.as_list(vectors.numbers(vector, dimensions)) for vector in found.vectors)
    await vectors.reply(exchange, head, lists, b"]," + encode(figures)[1:], WHOLE_JSON)


async def embeddings(service: Service, exchange: Exchange) -> None:
    call = parse(embed_prompts, await exchange.body())
    found, _ = await embedded(service, exchange, call, [call.prompt or ""])
    vector = vectors.as_list(vectors.numbers(found.vectors[0])) if found.vectors else b"[]"
    await exchange.reply(200, b'{"embedding":' + vector + b"}", WHOLE_JSON)


async def embedded(service: Service, exchange: Exchange, call: Embed | EmbedPrompt, texts: list[str]) -> tuple[Embedded, int]:
    """The vectors, and how long the model took to be ready, in ns. Nothing to embed only loads the model, or unloads it with keep_alive 0.
    Raises Refused."""
    window = integer(call.options or Options(), "num_ctx")
    model = await service.find(call.model or "")
    seconds = keep_alive_s(call.keep_alive)
    if texts in ([], [""]):
        return Embedded(0, [], 0), await service.load(exchange, model, seconds)
    request = Request(
        model=model,
        inputs=vectors.bounded(texts),
        truncate=isinstance(call, EmbedPrompt) or call.truncate is not False,
        num_ctx=max(4, window) if window and window > 0 else service.config.models.context_length or None,
        keep_alive_s=seconds,
    )
    return await service.embed(exchange, request)
