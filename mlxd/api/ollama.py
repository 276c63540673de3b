"""The Ollama dialect: /api/generate, /api/chat, and what tells of models. Requests in, NDJSON out."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from mlxd.aliases import Parameters
from mlxd.api import fields, vectors
from mlxd.api.exchange import Exchange
from mlxd.api.fields import MOST, NULL, Budget, Fraction, Integer, Malformed, Penalty, Positive, StopStrings, Temperature, whole
from mlxd.api.ollama_models import described, shown, timestamp
from mlxd.api.service import Service
from mlxd.errors import Refused
from mlxd.journal import Answered, Request, Summary
from mlxd.messages import Call, Embedded, Format, Logprob, Sampling, Token, TokenLogprob
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


LastN = Annotated[int, Meta(ge=-1, le=MOST)] | Annotated[float, Meta(ge=-1, le=MOST)]
Top = Annotated[int, Meta(ge=0, le=20)] | Annotated[float, Meta(ge=0, le=20)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class Options(Struct):
    """Unknown ones are ignored, as are those that only tune other engines (num_gpu, num_thread, use_mmap, ...)."""

    num_ctx: Integer | None = None
    num_predict: Integer | None = None
    temperature: Temperature | None = None
    top_k: Integer | None = None
    top_p: Fraction | None = None
    min_p: Fraction | None = None
    typical_p: float | None = None
    seed: Integer | None = None
    repeat_penalty: Temperature | None = None
    repeat_last_n: LastN | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: StopStrings | None = None


#: What Ollama itself calls the types of its options.
GO_TYPES = {"stop": "[]string"} | dict.fromkeys(("num_ctx", "num_predict", "top_k", "seed", "repeat_last_n"), "int")


class FunctionCall(Struct):
    name: str
    arguments: msgspec.Raw = fields.free()


class ToolCall(Struct):
    function: FunctionCall
    id: str | None = None


class Message(Struct):
    role: str
    content: str | None = None
    images: msgspec.Raw = fields.free()
    thinking: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=1024)] | None = None
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class Function(Struct, omit_defaults=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Struct):
    function: Function


class Common(fields.Body):
    """What generate and chat share. The context never slides, whatever `shift`: an answer that reaches its end is cut."""

    model: str | None = None
    stream: bool | None = None
    format: msgspec.Raw = fields.free()
    keep_alive: float | str | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    truncate: bool | None = None
    shift: bool | None = None


class Chat(Common):
    messages: Annotated[list[Message], Meta(max_length=4096)] | None = None
    tools: msgspec.Raw = fields.free()


class Generate(Common):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[TokenId] | None = None
    raw: bool | None = None
    images: msgspec.Raw = fields.free()


class Named(Struct):
    model: str | None = None
    name: str | None = None

    @property
    def called(self) -> str:
        """`name` is the older word, which Continue and LiteLLM still send."""
        return self.model or self.name or ""


class Show(Named):
    verbose: bool | None = None


chats = msgspec.json.Decoder(Chat)
generates = msgspec.json.Decoder(Generate)
nameds = msgspec.json.Decoder(Named)
shows = msgspec.json.Decoder(Show)
tool_lists = msgspec.json.Decoder(list[Tool] | None)
schemas = msgspec.json.Decoder(dict[str, Any])
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
    if section not in ("options", "parameters") or not name:
        return wrong
    name = re.sub(r"\[.*", "", name)
    if ", got " in wrong.sentence:
        return Refused(400, f'option "{name}" must be of type {GO_TYPES.get(name, "float32")}')
    return Refused(400, f'option "{name}": {wrong.sentence}')


def parameters(options: Options) -> Parameters:
    """Raises Refused."""
    if options.typical_p not in (None, 0.0, 1.0):
        raise Refused(400, 'option "typical_p" is not supported by mlxd; leave it out or set it to 1')
    top_k, window = integer(options, "top_k"), integer(options, "num_ctx")
    return Parameters(
        temperature=options.temperature,
        top_k=None if top_k is None else max(0, top_k),
        top_p=options.top_p,
        min_p=options.min_p,
        seed=integer(options, "seed"),
        repeat_penalty=1.0 if options.repeat_penalty == 0 else options.repeat_penalty,
        repeat_last_n=integer(options, "repeat_last_n"),
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        num_ctx=max(4, window) if window and window > 0 else None,
        num_predict=integer(options, "num_predict"),
        stop=fields.strings(options.stop) or None,
    )


def usual() -> Sampling:
    """Ollama's defaults."""
    return Sampling(seed=secrets.randbits(63), temperature=0.8, top_k=40, top_p=0.9)


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


def refuse_images(call: Chat | Generate, name: str) -> None:
    """Leaving them out silently would make the model invent. Raises Refused."""
    images = [(f"messages[{n}].images", message.images) for n, message in enumerate(getattr(call, "messages", None) or [])]
    if any(fields.has_items(path, raw) for path, raw in [*images, ("images", getattr(call, "images", NULL))]):
        raise Refused(400, f"{name} does not support images")


def answer_format(raw: msgspec.Raw, budget: Budget) -> Format | None:
    """Raises Malformed."""
    text = bytes(raw)
    if text in (b"null", b'""'):
        return None
    if text == b'"json"':
        return Format(kind="json")
    if not text.startswith(b"{"):
        raise Malformed("format", 'must be "json" or a JSON schema')
    budget.decode("format", schemas, raw)
    return Format(kind="json_schema", source=text.decode())


def functions(raw: msgspec.Raw, budget: Budget) -> list[dict[str, Any]]:
    """The tools, as templates know them. Raises Malformed."""
    found = budget.decode("tools", tool_lists, raw) or []
    tools = [{"type": "function", "function": msgspec.to_builtins(tool.function)} for tool in found]
    fields.shallow("tools", tools)
    return tools


def conversation(messages: list[Message], budget: Budget) -> list[dict[str, Any]]:
    """As chat templates know them. A tool's result without a name belongs to the last call. Raises Refused."""
    result: list[dict[str, Any]] = []
    called = ""
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


def request(call: Chat | Generate, model: Model) -> Request:
    """The one internal request. Raises Refused."""
    name = call.model or ""
    refuse_images(call, name)
    budget = Budget()
    said = parameters(call.options or Options())
    most = said.num_predict
    asked = Request(
        model=model,
        sampling=model.sampling(usual(), **said.sampling()),
        format=answer_format(call.format, budget),
        think=think(call.think, model, name),
        max_tokens=most if most and most > 0 else None,
        num_ctx=said.num_ctx,
        stop=said.stop or [],
        top_logprobs=whole("top_logprobs", call.top_logprobs) or 0 if call.logprobs else None,
        truncate=call.truncate is not False,
        keep_alive_s=keep_alive_s(call.keep_alive),
    )
    if isinstance(call, Generate):
        fill_prompt(asked, call)
        return asked
    asked.messages = conversation(call.messages or [], budget)
    asked.tools = functions(call.tools, budget) or None
    if asked.tools and not model.calls:
        raise Refused(400, f"{name} does not support tools")
    return asked


def fill_prompt(asked: Request, call: Generate) -> None:
    """Raw, between a prompt and a suffix, or one turn of a user. Raises Refused."""
    if call.raw and (call.system or call.template or call.context):
        raise Refused(400, "raw mode does not support template, system, or context")
    if call.suffix and not asked.model.inserts:
        raise Refused(400, f"{call.model} does not support insert")
    if call.suffix and (call.system or call.context):
        raise Refused(400, "suffix: what stands between two texts has neither system nor context")
    if call.raw or call.suffix:
        asked.prompt, asked.suffix, asked.truncate = call.prompt, call.suffix or None, False
        return
    asked.messages = [{"role": "system", "content": call.system}] if call.system else []
    asked.messages.append({"role": "user", "content": call.prompt})
    asked.context_ids = call.context or []


# --- what goes out ---------------------------------------------------------------------------------------------------------------


class Lines:
    """An answer as NDJSON. `piece`: the members that carry text, and `more` beside it, `extra`: those of the last line only."""

    stream_type = NDJSON
    whole_type = WHOLE_JSON

    def __init__(self, name: str):
        self.opening = b'{"model":' + encode(name) + b',"created_at":"'
        self.calls = 0

    def piece(self, text: str, more: bytes) -> bytes:
        raise NotImplementedError

    def extra(self, summary: Summary) -> dict[str, Any]:
        return {}

    def line(self, text: str, more: bytes, rest: bytes) -> bytes:
        return b"".join((self.opening, timestamp().encode(), b'",', self.piece(text, more), rest))

    def begin(self, choice: int, prompt_tokens: int, cached_tokens: int) -> bytes:
        return b""

    def token(self, choice: int, token: Token) -> bytes:
        text, more = ("", thinking(token.text)) if token.thinking else (token.text, b"")
        rest = b',"logprobs":' + encode([judged(one) for one in token.logprobs]) if token.logprobs else b""
        return self.line(text, more, rest + b',"done":false}\n')

    def call(self, choice: int, call: Call) -> bytes:
        self.calls += 1
        return self.line("", tool_calls([call], self.calls - 1), b',"done":false}\n')

    def progress(self, done: int, total: int) -> bytes:
        return b""

    def resumed(self, times: int) -> bytes:
        return b""

    def ping(self) -> bytes:
        """NDJSON has no comments; Ollama's clients add an empty piece to what they have."""
        return self.line("", b"", b',"done":false}\n')

    def end(self, choice: int, answered: Answered) -> bytes:
        return self.line("", b"", self.final(answered.summary)) + b"\n"

    def close(self, answers: list[Answered]) -> bytes:
        return b""

    def whole(self, answers: list[Answered]) -> bytes:
        (answered,) = answers
        more = thinking(answered.thinking) + tool_calls(answered.calls)
        judgements = {"logprobs": [judged(one) for one in answered.logprobs]} if answered.logprobs else {}
        return self.line(answered.text, more, self.final(answered.summary, judgements))

    def final(self, summary: Summary, more: dict[str, Any] | None = None) -> bytes:
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
        return b"," + encode(figures | (more or {}) | self.extra(summary))[1:]

    def bare(self, reason: str, load_ns: int) -> bytes:
        """The answer to a request that only loads or unloads."""
        figures = {"done": True, "done_reason": reason, "total_duration": load_ns, "load_duration": load_ns}
        return self.line("", b"", b"," + encode(figures)[1:])

    def error(self, refused: Refused) -> bytes:
        return error_body(refused) + b"\n"


class ChatLines(Lines):
    def piece(self, text: str, more: bytes) -> bytes:
        return b'"message":{"role":"assistant","content":' + encode(text) + more + b"}"


class GenerateLines(Lines):
    def __init__(self, name: str, raw: bool):
        super().__init__(name)
        self.raw = raw

    def piece(self, text: str, more: bytes) -> bytes:
        return b'"response":' + encode(text) + more

    def extra(self, summary: Summary) -> dict[str, Any]:
        return {} if self.raw else {"context": summary.prompt_ids + summary.emitted}


def thinking(text: str) -> bytes:
    return b',"thinking":' + encode(text) if text else b""


def tool_calls(calls: list[Call], first: int = 0) -> bytes:
    """Arguments go out as the object they are, on one line as NDJSON wants it."""
    if not calls:
        return b""
    items = []
    for index, call in enumerate(calls, first):
        arguments = msgspec.Raw(msgspec.json.format(call.arguments.encode(), indent=-1))
        function = {"index": index, "name": call.name, "arguments": arguments}
        items.append({"id": f"call_{secrets.token_hex(4)}", "function": function})
    return b',"tool_calls":' + encode(items)


def judged(one: TokenLogprob) -> dict[str, Any]:
    return judgement(one.token) | ({"top_logprobs": [judgement(other) for other in one.top]} if one.top else {})


def judgement(one: Logprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.raw)}


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
        await service.answer(exchange, [request(call, model)], lines, call.stream is not False)


async def generate(service: Service, exchange: Exchange) -> None:
    call = parse(generates, await exchange.body())
    model = await service.find(call.model or "")
    lines = GenerateLines(call.model or "", bool(call.raw))
    if not call.prompt:
        await load(service, exchange, call, model, lines)
    else:
        await service.answer(exchange, [request(call, model)], lines, call.stream is not False)


async def load(service: Service, exchange: Exchange, call: Common, model: Model, lines: Lines) -> None:
    """Nothing to say: load the model, or unload it with keep_alive 0. One JSON object even when streaming."""
    for name in ("tools", "images"):
        fields.has_items(name, getattr(call, name, NULL))
    seconds = keep_alive_s(call.keep_alive)
    load_ns = await service.load(exchange, model, seconds)
    if not exchange.left:
        await exchange.reply(200, lines.bare("unload" if seconds == 0 else "load", load_ns), WHOLE_JSON)


async def tags(service: Service, exchange: Exchange) -> None:
    models = await service.models()
    await exchange.reply(
        200, encode({"models": [described(model) for model in models] + await service.neighbours(exchange, models)})
    )


async def ps(service: Service, exchange: Exchange) -> None:
    """What is loaded, the longest-lived first; under every name that it answers to."""
    named = [model for model in await service.models() if model.alias]
    entries = []
    for engine in sorted(service.pool.loaded(), key=lambda engine: -engine.expires_at):
        until = lifetime(service, engine)
        names = [engine.model, *(model for model in named if model.weights.name == engine.model.name)]
        entries += [described(model) | until for model in names]
    await exchange.reply(200, encode({"models": entries}))


async def show(service: Service, exchange: Exchange) -> None:
    call = parse(shows, await exchange.body())
    model = await service.find(call.called)
    # Copilot shows the basename as the model's name.
    copilot = exchange.header(b"user-agent").startswith(b"GitHubCopilotChat/")
    basename = call.called if copilot else model.name.removesuffix(":latest")
    await exchange.reply(200, encode(await asyncio.to_thread(shown, model, basename, bool(call.verbose))))


def lifetime(service: Service, engine: Engine) -> dict[str, Any]:
    left = engine.expires_at - service.pool.clock()
    return {
        "expires_at": FOREVER if left > 1e9 else timestamp(time.time() + max(0.0, left)),
        "size_vram": engine.model.size_bytes,
        "context_length": engine.context_length,
    }


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
