"""The OpenAI dialect: /v1/models, /v1/chat/completions and /v1/completions. Requests in, server-sent events out."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from itertools import accumulate
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from mlxd.api import fields, vectors
from mlxd.api.exchange import Exchange
from mlxd.api.fields import NULL, Budget, Fraction, Integer, Malformed, Penalty, Positive, StopStrings, whole
from mlxd.api.service import Service
from mlxd.errors import Refused
from mlxd.journal import Answered, Request
from mlxd.messages import Call, Format, Logprob, Sampling, Token, TokenLogprob
from mlxd.models import Model

SSE = b"text/event-stream"
JSON = b"application/json"
ERROR_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 404: "not_found_error"}
#: OpenAI's own, for /v1/completions.
DEFAULT_MAX_TOKENS = 16
#: Prompts of /v1/completions times `n`.
MOST_CHOICES = 128
#: What OpenAI says of a token that cannot come: JSON knows no infinity.
LEAST_LOGPROB = -9999.0

encode = msgspec.json.encode

# --- what comes in ---------------------------------------------------------------------------------------------------------------


class Part(Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Struct):
    name: str
    arguments: str | None = None


class ToolCall(Struct):
    function: FunctionCall
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


class JsonSchema(Struct):
    name: str | None = None
    schema: msgspec.Raw = fields.free()
    strict: bool | None = None


class ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


FunctionName = Annotated[str, Meta(min_length=1, max_length=256)]


class Function(Struct):
    name: FunctionName
    description: str | None = None
    parameters: msgspec.Raw = fields.free()
    strict: bool | None = None


class Tool(Struct):
    function: Function
    type: Literal["function"] = "function"


Tools = Annotated[list[Tool], Meta(max_length=1024)]


class Named(Struct):
    name: str


class ToolChoice(Struct):
    type: Literal["function"]
    function: Named


Choices = Annotated[int, Meta(ge=1, le=8)] | Annotated[float, Meta(ge=1, le=8)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Biases = Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]


class Common(fields.Body):
    """What chat and completions share. What is not here (user, store, metadata, service_tier, ...) is ignored."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    top_k: Integer | None = None
    min_p: Fraction | None = None
    seed: Integer | None = None
    stop: StopStrings | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    n: Choices | None = None


class TemplateSettings(Struct, forbid_unknown_fields=True):
    """What clients of other servers say to templates that think."""

    enable_thinking: bool | None = None


class Chat(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(max_length=4096)] | None = None
    max_completion_tokens: Positive | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    reasoning_effort: str | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateSettings | None = None  # type: ignore[assignment]
    functions: msgspec.Raw = fields.free()
    audio: msgspec.Raw = fields.free()
    web_search_options: msgspec.Raw = fields.free()


class Completion(Common):
    """The body of /v1/completions. The prompt goes to the model as it is, without the chat template: text or tokens, one or many."""

    prompt: Annotated[msgspec.Raw, Meta(extra_json_schema={"type": ["string", "array", "null"]})] = fields.free()
    suffix: str | None = None
    echo: bool | None = None
    best_of: Positive | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


chats = msgspec.json.Decoder(Chat)
completions = msgspec.json.Decoder(Completion)
objects = msgspec.json.Decoder(dict[str, Any])
prompt_texts = msgspec.json.Decoder(str)
prompt_lists = msgspec.json.Decoder(list[str | TokenId | list[TokenId]])

EFFORTS = ("minimal", "low", "medium", "high", "max", "xhigh", "ultra")
#: Known, of no use to anybody if left out silently, and not here.
UNSUPPORTED = {"functions": "use tools", "audio": "this server writes text only", "web_search_options": "there is no web search"}


def think(effort: str | None, model: Model, path: str) -> bool | None:
    """A model without thinking ignores the wish. Raises Malformed on an unknown effort."""
    if effort is None:
        return None
    if effort != "none" and effort not in EFFORTS:
        raise Malformed(path, f"must be none, {', '.join(EFFORTS)}, not {effort[:40]!r}")
    return effort != "none" if model.thinks else None


def conversation(messages: list[Message], name: str, budget: Budget) -> list[dict[str, Any]]:
    """As chat templates know them: arguments are objects, a tool's result bears its name. Raises Malformed."""
    result: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        item: dict[str, Any] = {
            "role": {"developer": "system", "function": "tool"}.get(message.role, message.role),
            "content": text_of(message.content, f"messages[{index}].content", name),
        }
        if message.reasoning:
            item["reasoning_content"] = message.reasoning
        if message.tool_calls:
            where = f"messages[{index}].tool_calls"
            item["tool_calls"] = [
                tool_call(call.id, call.function.name, call.function.arguments, f"{where}[{n}].function.arguments", budget)
                for n, call in enumerate(message.tool_calls)
            ]
            names |= {call.id: call.function.name for call in message.tool_calls if call.id}
        if item["role"] == "tool":
            item["name"] = message.name or names.get(message.tool_call_id or "", "")
            if message.tool_call_id:
                item["tool_call_id"] = message.tool_call_id
        result.append(item)
    return result


def text_of(content: str | list[Part] | None, path: str, name: str) -> str:
    """The text of a message. Raises Malformed when there is anything but text in it; no URL is ever fetched."""
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if "image" in part.type:
            raise Malformed(path, f"{name} does not support images")
        if part.type not in ("text", "input_text", "output_text", "refusal"):
            raise Malformed(path, f"{name} reads text only, not {part.type[:40]!r}")
    return "".join(part.text or part.refusal or "" for part in content)


def tool_call(id: str | None, name: str, arguments: str | None, path: str, budget: Budget) -> dict[str, Any]:
    """A call that was made earlier; `path`: of its arguments. Raises Malformed."""
    value = budget.decode(path, objects, (arguments or "{}").encode())
    item: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": value}}
    return item | {"id": id} if id else item


def tool(function: Function, path: str, budget: Budget) -> dict[str, Any]:
    """A function that may be called. Raises Malformed."""
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    if bytes(function.parameters) != b"null":
        told["parameters"] = budget.decode(f"{path}.parameters", objects, function.parameters)
    if function.strict is not None:
        told["strict"] = function.strict
    return {"type": "function", "function": told}


def offered(
    tools: list[dict[str, Any]], choice: str | None, named: str | None, model: Model, name: str
) -> tuple[list[dict[str, Any]] | None, str]:
    """What the model is told of `tools`, and which it is to call: `choice`, or the one `named`. Raises Malformed."""
    if choice == "none":
        return None, "auto"
    if tools and not model.calls:
        raise Malformed("tools", f"{name} does not support tools")
    if not tools and (named or choice == "required"):
        raise Malformed("tool_choice", "there are no tools to call")
    if named is not None and named not in {tool["function"]["name"] for tool in tools}:
        raise Malformed("tool_choice", f"there is no tool called {named[:40]!r}")
    if named in ("auto", "required"):  # the engine's own words for what these mean
        raise Malformed("tool_choice", f"a tool called {named!r} cannot be chosen by its name")
    return tools or None, named or choice or "auto"


def json_format(kind: str, schema: msgspec.Raw, path: str, budget: Budget) -> Format | None:
    """Raises Malformed."""
    if kind == "text":
        return None
    if kind == "json_object":
        return Format(kind="json")
    budget.decode(path, objects, schema)
    return Format(kind="json_schema", source=bytes(schema).decode())


def usual() -> Sampling:
    """OpenAI's defaults; its penalties look at the whole answer and not at the prompt."""
    return Sampling(seed=secrets.randbits(63), temperature=1.0, penalty_last_n=-1, penalize_prompt=False)


def sampling(call: Common, model: Model) -> Sampling:
    """Raises Malformed."""
    drawn, top_k = whole("seed", call.seed), whole("top_k", call.top_k)
    found = model.sampling(
        usual(),
        seed=None if drawn is None else drawn % 2**63,
        temperature=call.temperature,
        top_k=None if top_k is None else max(0, top_k),
        top_p=call.top_p,
        min_p=call.min_p,
        presence_penalty=call.presence_penalty,
        frequency_penalty=call.frequency_penalty,
    )
    return msgspec.structs.replace(found, logit_bias=call.logit_bias or {})


def several(request: Request, count: int) -> list[Request]:
    """The same for each of `count` choices, drawn with the seeds that follow."""
    replace, drawn = msgspec.structs.replace, request.sampling
    return [replace(request, sampling=replace(drawn, seed=(drawn.seed + i) % 2**63)) for i in range(count)]


def chat_request(call: Chat, model: Model) -> Request:
    """The one internal request. Raises Malformed."""
    name = call.model or ""
    for field, remedy in UNSUPPORTED.items():
        if bytes(getattr(call, field)) not in (b"null", b"[]"):
            raise Malformed(field, f"not supported by mlxd: {remedy}")
    if call.top_logprobs and not call.logprobs:
        raise Malformed("top_logprobs", "logprobs must be true, too")
    most = whole("max_tokens", call.max_tokens)
    most = most if call.max_completion_tokens is None else whole("max_completion_tokens", call.max_completion_tokens)
    budget = Budget()
    choice = call.tool_choice
    tools, tool_choice = offered(
        [tool(one.function, f"tools[{n}].function", budget) for n, one in enumerate(call.tools or [])],
        choice if isinstance(choice, str) else None,
        choice.function.name if isinstance(choice, ToolChoice) else None,
        model,
        name,
    )
    wanted = call.response_format or ResponseFormat("text")
    schema = wanted.json_schema.schema if wanted.json_schema else NULL
    effort = call.reasoning_effort or (call.reasoning.effort if call.reasoning else None)
    if effort is None and call.chat_template_kwargs and call.chat_template_kwargs.enable_thinking is not None:
        effort = "medium" if call.chat_template_kwargs.enable_thinking else "none"
    return Request(
        model=model,
        sampling=sampling(call, model),
        messages=conversation(call.messages or [], name, budget),
        tools=tools,
        tool_choice=tool_choice,
        format=json_format(wanted.type, schema, "response_format.json_schema.schema", budget),
        think=think(effort, model, "reasoning_effort"),
        max_tokens=most,
        stop=fields.strings(call.stop),
        top_logprobs=(call.top_logprobs or 0) if call.logprobs else None,
    )


def completion_requests(call: Completion, model: Model) -> list[Request]:
    """A request for each choice: `n` of the first prompt, then `n` of the next. Raises Malformed."""
    name = call.model or ""
    count = whole("n", call.n) or 1
    if call.echo:
        raise Malformed("echo", "not supported by mlxd; put the prompt before the text yourself")
    if (whole("best_of", call.best_of) or 1) > count:
        raise Malformed("best_of", "not supported by mlxd beyond n")
    asked = prompts(call.prompt)
    if len(asked) * count > MOST_CHOICES:
        raise Malformed("prompt", f"more than {MOST_CHOICES} choices in one request")
    if call.suffix and not model.inserts:
        raise Malformed("suffix", f"{name} does not support insert")
    if call.suffix and not all(isinstance(prompt, str) for prompt in asked):
        raise Malformed("suffix", "needs a prompt that is text")
    most = whole("max_tokens", call.max_tokens)
    drawn = sampling(call, model)
    requests: list[Request] = []
    for prompt in asked:
        request = Request(
            model=model,
            sampling=drawn,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=None if isinstance(prompt, str) else prompt,
            suffix=call.suffix or None,
            max_tokens=DEFAULT_MAX_TOKENS if most is None else most,
            stop=fields.strings(call.stop),
            top_logprobs=call.logprobs,
        )
        requests += several(request, count)
    return requests


def prompts(raw: msgspec.Raw) -> list[str | list[int]]:
    """One or many. Raises Malformed."""
    if bytes(raw).startswith(b'"'):
        return [fields.decode(prompt_texts, bytes(raw))]
    asked = Budget().decode("prompt", prompt_lists, raw)
    texts = [one for one in asked if isinstance(one, str)]
    tokens = [one for one in asked if isinstance(one, int)]
    lists = [one for one in asked if isinstance(one, list)]
    if not asked or not all(lists):
        raise Malformed("prompt", "an empty list is no prompt")
    if bool(texts) + bool(tokens) + bool(lists) > 1:
        raise Malformed("prompt", "must be text, a list of texts, a list of tokens or a list of such lists, and no mixture")
    return [tokens] if tokens else [*texts, *lists]


# --- what goes out ---------------------------------------------------------------------------------------------------------------


class Sse:
    """What every stream of server-sent events says beside its events: comments, which clients drop, and which keep them from giving up
    during a long prefill."""

    stream_type = SSE
    whole_type = JSON

    def progress(self, done: int, total: int) -> bytes:
        return b": prefill %d of %d\n\n" % (done, total)

    def resumed(self, times: int) -> bytes:
        return b": x-mlxd-resumed: %d\n\n" % times

    def ping(self) -> bytes:
        return b": ping\n\n"


class Chunks(Sse):
    """An answer as chunks, or as one object. `choices`: how many each prompt has."""

    whole_kind = stream_kind = ""
    prefix = ""

    def __init__(self, call: Common):
        self.name = call.model or ""
        self.include_usage = bool(call.stream_options and call.stream_options.include_usage)
        self.choices = whole("n", call.n) or 1
        self.id = self.prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.opening = b"data: " + encode(self.head(self.stream_kind))[:-1]

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name, "system_fingerprint": "mlxd"}

    def chunk(self, choice: int, members: bytes, reason: str | None = None) -> bytes:
        parts = (self.opening, b',"choices":[{"index":%d,' % choice, members, b',"finish_reason":', encode(reason), b"}]}\n\n")
        return b"".join(parts)

    def begin(self, choice: int, prompt_tokens: int, cached_tokens: int) -> bytes:
        return b""

    def close(self, answers: list[Answered]) -> bytes:
        figures = b""
        if self.include_usage:
            figures = self.opening + b',"choices":[],"usage":' + encode(self.usage(answers)) + b"}\n\n"
        return figures + b"data: [DONE]\n\n"

    def error(self, refused: Refused) -> bytes:
        return b"data: " + error_body(refused) + b"\n\n"

    def whole(self, answers: list[Answered]) -> bytes:
        choices = [{"index": index} | self.choice(answered) for index, answered in enumerate(answers)]
        return encode(self.head(self.whole_kind) | {"choices": choices, "usage": self.usage(answers)})

    def choice(self, answered: Answered) -> dict[str, Any]:
        raise NotImplementedError

    def usage(self, answers: list[Answered]) -> dict[str, Any]:
        """Of all choices together. A prompt counts once, however many choices it has."""
        summaries = [answered.summary for answered in answers]
        prompt = sum(len(summary.prompt_ids) for summary in summaries[:: self.choices])
        cached = sum(summary.cached_tokens for summary in summaries[:: self.choices])
        completion = sum(len(summary.emitted) for summary in summaries)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(summary.thinking_tokens for summary in summaries)},
        }


class ChatChunks(Chunks):
    """chat.completion. Log-probabilities are of every token that was generated, thinking and calls included."""

    whole_kind, stream_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, call: Chat):
        super().__init__(call)
        self.called: dict[int, int] = {}

    def delta(self, choice: int, members: bytes, logprobs: bytes = b"", reason: str | None = None) -> bytes:
        """The role stands in the first delta of a choice and in no other."""
        if choice not in self.called:
            self.called[choice] = 0
            members = b'"role":"assistant"' + (b"," + members if members else b"")
        return self.chunk(choice, b'"delta":{' + members + b"}" + logprobs, reason)

    def token(self, choice: int, token: Token) -> bytes:
        logprobs = b',"logprobs":' + encode(chat_logprobs(token.logprobs)) if token.logprobs else b""
        return self.delta(choice, (b'"reasoning":' if token.thinking else b'"content":') + encode(token.text), logprobs)

    def call(self, choice: int, call: Call) -> bytes:
        index = self.called.get(choice, 0)
        data = self.delta(choice, b'"tool_calls":' + encode([made(call, index)]))
        self.called[choice] = index + 1
        return data

    def end(self, choice: int, answered: Answered) -> bytes:
        return self.delta(choice, b"", reason=reason(answered))

    def choice(self, answered: Answered) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answered.text or (None if answered.calls else "")}
        if answered.thinking:
            message["reasoning"] = answered.thinking
        if answered.calls:
            message["tool_calls"] = [made(call, index) for index, call in enumerate(answered.calls)]
        choice = {"message": message, "finish_reason": reason(answered)}
        return choice | ({"logprobs": chat_logprobs(answered.logprobs)} if answered.logprobs else {})


def reason(answered: Answered) -> str:
    return "tool_calls" if answered.calls and answered.summary.reason == "stop" else answered.summary.reason


def made(call: Call, index: int) -> dict[str, Any]:
    """A call as clients see it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": index, "id": new_call_id(), "type": "function", "function": function}


def new_call_id() -> str:
    return "call_" + secrets.token_hex(12)


def chat_logprobs(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    return {"content": [with_top(one) for one in logprobs], "refusal": None}


def with_top(one: TokenLogprob) -> dict[str, Any]:
    return alone(one.token) | {"top_logprobs": [alone(best) for best in one.top]}


def alone(one: Logprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": finite(one), "bytes": list(one.raw)}


def finite(one: Logprob) -> float:
    return max(one.logprob, LEAST_LOGPROB)


class TextChunks(Chunks):
    """text_completion."""

    whole_kind = stream_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, call: Completion):
        super().__init__(call)
        self.offsets: dict[int, int] = {}

    def token(self, choice: int, token: Token) -> bytes:
        members = (b'"text":"","reasoning":' if token.thinking else b'"text":') + encode(token.text)
        if token.logprobs:
            told = text_logprobs(token.logprobs, self.offsets.get(choice, 0))
            self.offsets[choice] = told["text_offset"][-1] + len(told["tokens"][-1])
            members += b',"logprobs":' + encode(told)
        return self.chunk(choice, members)

    def call(self, choice: int, call: Call) -> bytes:
        return b""

    def end(self, choice: int, answered: Answered) -> bytes:
        return self.chunk(choice, b'"text":""', answered.summary.reason)

    def choice(self, answered: Answered) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": answered.text, "finish_reason": answered.summary.reason}
        choice["logprobs"] = text_logprobs(answered.logprobs, 0) if answered.logprobs else None
        return choice | ({"reasoning": answered.thinking} if answered.thinking else {})


def text_logprobs(logprobs: list[TokenLogprob], offset: int) -> dict[str, Any]:
    """The shape from before chat; `offset`: where the first token stands in the answer, in characters."""
    tokens = [one.token.text for one in logprobs]
    best = [{one.text: finite(one) for one in (*told.top, told.token)} for told in logprobs if told.top]
    return {
        "tokens": tokens,
        "token_logprobs": [finite(one.token) for one in logprobs],
        "top_logprobs": best or None,
        "text_offset": list(accumulate((len(token) for token in tokens[:-1]), initial=offset)),
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
    chunks = ChatChunks(call)
    requests = several(chat_request(call, model), chunks.choices)
    await service.answer(exchange, requests, chunks, bool(call.stream))


async def complete(service: Service, exchange: Exchange) -> None:
    call = fields.decode(completions, await exchange.body())
    model = await service.find(call.model or "")
    requests = completion_requests(call, model)
    await service.answer(exchange, requests, TextChunks(call), bool(call.stream))


async def models(service: Service, exchange: Exchange) -> None:
    """The list is Anthropic's, too."""
    models = await service.models()
    found = [described(model) for model in models] + [foreign(entry) for entry in await service.neighbours(exchange, models)]
    ends = {"has_more": False, "first_id": found[0]["id"] if found else None, "last_id": found[-1]["id"] if found else None}
    await exchange.reply(200, encode({"object": "list", "data": found} | ends))


async def model(service: Service, exchange: Exchange) -> None:
    name = exchange.scope["path_params"]["id"]
    await exchange.reply(200, encode(described(await service.find(name))))


def described(model: Model) -> dict[str, Any]:
    return listed(model.name, int(model.modified_at), "mlxd (built-in, for self-test and demo)" if model.builtin else "mlxd")


def listed(name: str, created: int, owner: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": owner,
        "type": "model",
        "display_name": name.removesuffix(":latest"),
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def foreign(entry: dict[str, Any]) -> dict[str, Any]:
    """A model of Ollama's, of which its /api/tags says this."""
    try:
        return listed(entry["name"], int(datetime.fromisoformat(entry["modified_at"]).timestamp()), "ollama")
    except (KeyError, TypeError, ValueError, OverflowError, OSError):  # whatever it says is a model of its
        return listed(entry["name"], 0, "ollama")


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
