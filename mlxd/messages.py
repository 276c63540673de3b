"""The words of mlxd's processes: on the link (supervisor and child) and on an engine's socket (server and engine).

Owns the shapes and how they are framed, nothing else: no sockets, no state. Links carry JSON lines, so that a person can read a
trace; engine sockets carry length-prefixed msgpack, one frame per batch step. No pickle anywhere.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec
from msgspec import Struct

#: Both sides of a link must say the same number; another one is held until `mlxd restart`.
PROTOCOL = 3

# --- what both levels speak about --------------------------------------------------------------------------------------


class Counters(Struct, kw_only=True):
    """What a process did since it started. Only movement matters: the watchers compare two of these."""

    #: Jobs the engine has accepted and not ended / requests the server has in hand.
    running: int = 0
    waiting: int = 0
    #: Of an engine's running jobs: those whose prompt is not done.
    prefilling: int = 0
    #: Monotone progress: prompt tokens prefilled, tokens emitted, requests ended, bytes or tensors loaded, canaries (an idle engine's
    #: one-token jobs of its own, which count nowhere else but in `running`) ended.
    prefilled: int = 0
    emitted: int = 0
    finished: int = 0
    loaded: int = 0
    canaries: int = 0
    #: MLX's own counters, bytes; 0 in processes without MLX.
    active_bytes: int = 0
    peak_bytes: int = 0
    cache_bytes: int = 0
    #: How late the event loop woke for this beat, seconds.
    loop_lag_s: float = 0.0

    @property
    def progress(self) -> tuple[int, ...]:
        """Differs from an earlier one as soon as any work was done."""
        return self.prefilled, self.emitted, self.finished, self.loaded, self.canaries


class Tuning(Struct, frozen=True):
    """What an engine gets less of than is configured, since an earlier one of its model died. None: as configured.

    `cache_share`: of the prefix cache that it would have. `why`: what the earlier one died of, a sentence without its subject.
    """

    prefill_tokens: int | None = None
    max_concurrent: int | None = None
    cache_share: float = 1.0
    why: str = ""


#: What a request is at: before its slot, while its model is loaded, at its prompt, at its answer, after its engine's death, over.
Phase = Literal["queued", "loading", "prefill", "decode", "lost", "ended"]


#: Of one engine, in a word and in its exit record: more than run at once, unless somebody has raised that.
MOST_FLIGHTS = 64
#: What came of a request: answered, its client left, refused (4xx), no room for it now (429, 503), failed (any other error).
Outcome = Literal["done", "left", "refused", "busy", "failed"]


class Flight(Struct, kw_only=True):
    """One request's way through the server, without a word of what it said. `at`: when it came, Unix time, s. `phases`: each with the ms
    since then at which it began. `outcome`: None while it is under way; `status`: of HTTP, 0 until then. `resumes`: on how many further
    engines it went on."""

    id: str
    path: str
    model: str
    at: float
    outcome: Outcome | None
    status: int
    phases: list[tuple[Phase, int]]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    resumes: int


class ExitRecord(Struct, kw_only=True):
    """How a child ended. `signal` and `code`: exactly one is an int. `text` ends with the child's last words. `remedy`: what happened and
    what is done about it, or what a person can do, in words. `flights`: the requests that it had, as far as a server told."""

    ts: str
    child: str
    slot: int
    pid: int
    model: str | None
    cause: str
    signal: int | None
    code: int | None
    up_s: float
    memory_bytes: int
    running: int
    text: str
    stack: str | None = None
    remedy: str = ""
    descriptors: int = 0
    flights: list[Flight] = []


# --- the link: child -> supervisor --------------------------------------------------------------------------------------


class Hello(Struct, tag="hello", tag_field="word"):
    protocol: int
    kind: Literal["server", "engine", "puller"]
    pid: int
    version: str
    nonce: str


class Ready(Struct, tag="ready", tag_field="word"):
    """Of an engine: one token came out of `model`. Of the server: it accepts; `problems` are what a person should know, such as a
    preload that is not there. Of a puller: it is at work on `model`."""

    model: str | None = None
    problems: list[str] = []


class Beat(Struct, tag="beat", tag_field="word"):
    """Once a second; dropped rather than blocking the sender (a socketpair is full after 167 unread beats)."""

    counters: Counters


class Bye(Struct, tag="bye", tag_field="word"):
    """The last word of a child that ends by itself. Causes: "stopped", "refused" (this model can never load: `text` says why,
    in words for the client), "deadline" (the text of one request took too long), "error" (an MLX or Python exception)."""

    cause: str
    text: str = ""


# --- the link: server -> supervisor --------------------------------------------------------------------------------------


class Want(Struct, tag="want", tag_field="word"):
    """An engine for `model` is wanted. `directory`: absolute path of its files. Saying it again changes nothing.

    `needed_bytes`: of memory, by an estimate. `preload`: it belongs to what `mlxd start` waits for. `automatic`: no request asks for it now.
    """

    model: str
    directory: str
    needed_bytes: int = 0
    preload: bool = False
    automatic: bool = False


class Release(Struct, tag="release", tag_field="word"):
    """The engine of `model` is no longer wanted; no job is on it."""

    model: str


class Stalled(Struct, tag="stalled", tag_field="word"):
    """The engine in slot `engine` has work and makes no progress, as the server sees it."""

    engine: int


class Aboard(Struct, tag="aboard", tag_field="word"):
    """The requests that I had on the engine with this pid when I lost it."""

    pid: int
    flights: list[Flight]


# --- the link: pulls ------------------------------------------------------------------------------------------------------


class Fetch(Struct, tag="fetch", tag_field="word"):
    """Server -> supervisor: a client of mine wants the repository `name` of the hub in the cache. Supervisor -> puller: bring it. Said
    again, it is answered with what was said last of it."""

    name: str


class Abandon(Struct, tag="abandon", tag_field="word"):
    """Server -> supervisor: no client of mine wants `name` any more."""

    name: str


class Fetching(Struct, tag="fetching", tag_field="word"):
    """Puller -> supervisor -> servers: how far it is. `digest`: "sha256:" and 64 hex digits of the file that comes, of
    which `completed` of `total` bytes are here; "": `status` says all."""

    name: str
    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0


class Fetched(Struct, tag="fetched", tag_field="word"):
    """Puller -> supervisor -> servers: it has ended. `error`: why it is not here, "" when it is; `status`: of HTTP, that fits."""

    name: str
    error: str = ""
    status: int = 200


# --- the link: supervisor -> server --------------------------------------------------------------------------------------


class EngineUp(Struct, tag="engine_up", tag_field="word"):
    """`socket` accepts jobs for `model`."""

    id: int
    pid: int
    model: str
    socket: str


class EngineDown(Struct, tag="engine_down", tag_field="word"):
    """The engine of `model` is gone (or could not come up) and what happens next.

    `next`: "replaced" (another comes at once), "retried" (after `retry_s`), "refused" (this model cannot be loaded: `cause` is the
    sentence for the client; nothing more happens until it is wanted again), "released" (nobody wanted it any more).
    """

    id: int
    model: str
    cause: str
    next: Literal["replaced", "retried", "refused", "released"]
    retry_s: float = 0.0


class Exited(Struct, tag="exited", tag_field="word"):
    """The newest exit record, for `/health`."""

    record: ExitRecord


class Drain(Struct, tag="drain", tag_field="word"):
    """Stop accepting, end what runs within `limit_s`, then exit."""

    limit_s: float


# --- the link: supervisor -> engine, supervisor -> any child ---------------------------------------------------------------


class Load(Struct, tag="load", tag_field="word"):
    """Sent once to a blank engine. `share_bytes`: what it may take of memory in all."""

    model: str
    directory: str
    share_bytes: int
    tuning: Tuning = Tuning()


class Share(Struct, tag="share", tag_field="word"):
    """What an engine may take of memory from now on: others have come, grown or gone."""

    share_bytes: int


class Stop(Struct, tag="stop", tag_field="word"):
    """End now, within a second: nobody needs you any more."""


class Reopen(Struct, tag="reopen", tag_field="word"):
    """Open your log file anew."""


ChildWord = Hello | Ready | Beat | Bye | Want | Release | Stalled | Aboard | Fetch | Abandon | Fetching | Fetched
SupervisorWord = EngineUp | EngineDown | Exited | Drain | Load | Share | Stop | Reopen | Fetch | Fetching | Fetched

# --- the engine's socket: server -> engine -----------------------------------------------------------------------------------


class Sampling(Struct, kw_only=True, frozen=True):
    """How position i of one request is drawn: u = hash(seed, i), inverse CDF over the filtered distribution.

    `temperature` 0: greedy. `top_k` 0, `top_p` 1, `min_p` 0: filter off. `repeat_penalty` 1 and the other two at 0: off; they look at the
    last `penalty_last_n` tokens (-1: all) of prompt and answer, or of the answer alone (`penalize_prompt` False, OpenAI's meaning).
    `logit_bias`: token id -> what is added to its logit.
    """

    seed: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    penalize_prompt: bool = True
    logit_bias: dict[int, float] = {}


class Format(Struct, kw_only=True, frozen=True):
    """What the text of an answer must be: any JSON object ("json"), what a JSON schema allows ("json_schema", `source` is its JSON text), or
    what a regular expression matches ("regex")."""

    kind: Literal["json", "json_schema", "regex"]
    source: str = ""


class Submit(Struct, tag="submit", kw_only=True):
    """One job. Exactly one of `messages` (rendered through the chat template), `prompt` (text, untouched) and `prompt_ids` is given.

    `emitted` are tokens that an earlier engine already produced: they are prefilled after the prompt and generation goes on at
    position len(emitted). `continued`: see Accepted; it counts with `prompt_ids` only. `max_tokens` counts the emitted ones too; None:
    until the context is full; 0: only tokenise. `think` None: what the template does by itself. `num_ctx` None: the model's own context.

    `tools`: `{"type": "function", "function": {"name", "description"?, "parameters"?, "strict"?}}`, for the template and the parser of calls.
    `tool_choice`: "auto", "required" (at least one call) or the name of the function to call. `suffix`: the text after the answer, for
    models that fill in the middle; with `prompt` only. `context_ids`: tokens before the rendering. `top_logprobs`: how many of the best
    alternatives are told of each token, None: no log-probabilities at all. `request_id`: for the log.
    """

    job: int
    sampling: Sampling
    request_id: str = ""
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str = "auto"
    format: Format | None = None
    think: bool | None = None
    prompt: str | None = None
    suffix: str | None = None
    context_ids: list[int] = []
    prompt_ids: list[int] | None = None
    top_logprobs: int | None = None
    continued: bool = True
    emitted: list[int] = []
    max_tokens: int | None = None
    num_ctx: int | None = None
    stop: list[str] = []
    #: Drop oldest messages that are not system messages until the prompt fits; False: a prompt too long fails.
    truncate: bool = False


class Embed(Struct, tag="embed", kw_only=True):
    """One job: a vector for each text (or list of tokens). Without `truncate` a text that is longer than the context fails the job.
    `num_ctx` None: the model's own context."""

    job: int
    inputs: list[str | list[int]]
    truncate: bool = True
    num_ctx: int | None = None
    request_id: str = ""


class Cancel(Struct, tag="cancel"):
    job: int


ToEngine = Submit | Embed | Cancel

# --- the engine's socket: engine -> server -----------------------------------------------------------------------------------


class Loaded(Struct, tag="loaded", kw_only=True):
    """First frame on every connection: what this engine serves."""

    pid: int
    model: str
    context_length: int


class Accepted(Struct, tag="accepted"):
    """The prompt is tokenised. `cached`: how many of its tokens the prefix cache supplied. `continued`: the answer goes on with the
    prompt's text, so a space it begins with counts; the tokens do not tell."""

    job: int
    prompt_ids: list[int]
    cached: int
    continued: bool = True


class Progress(Struct, tag="progress"):
    """Prompt tokens prefilled so far, of all."""

    job: int
    done: int
    total: int


class Logprob(Struct, array_like=True, frozen=True):
    """`text` of one token, its exact bytes (a part of a character, perhaps), and the natural logarithm of its probability before
    temperature, penalties and filters."""

    text: str
    raw: bytes
    logprob: float


class TokenLogprob(Struct, array_like=True, frozen=True):
    """Of one generated token: itself, and the best there were, in falling order."""

    token: Logprob
    top: list[Logprob]


class Token(Struct, tag="token"):
    """New tokens of a job and the text that has become certain by them (often "": held back for a stop string or an unfinished
    character). The joined text of a job is its answer. `thinking`: the text stands inside the model's thinking tags. `logprobs`: one for
    each of `ids`, if asked for."""

    job: int
    ids: list[int]
    text: str
    thinking: bool = False
    logprobs: list[TokenLogprob] = []


class Call(Struct, tag="call"):
    """The model has called a function. `arguments`: a JSON object as text. Its tokens came in Token events without text."""

    job: int
    name: str
    arguments: str


class Embedded(Struct, tag="embedded"):
    """The end of an Embed job. `vectors`: of each input, little-endian float32, of length 1. `tokens`: of all inputs together."""

    job: int
    vectors: list[bytes]
    tokens: int


class Done(Struct, tag="done", kw_only=True):
    """The job's end. `reason`: "stop" (end token or stop string), "length". Durations in ns, measured in the engine:
    `prompt_ns` from the first prefill step to the first token, `eval_ns` from there to the last."""

    job: int
    reason: Literal["stop", "length"]
    stop_string: str | None = None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_ns: int
    eval_ns: int


class Failed(Struct, tag="failed"):
    """The job cannot be done. `status` is the HTTP status that fits; `message` a sentence for the client, `code` a word for programs."""

    job: int
    status: int
    message: str
    code: str | None = None


class Pulse(Struct, tag="pulse"):
    """The engine's counters, each second, so that `/health` can tell ages."""

    counters: Counters


Event = Accepted | Progress | Token | Call | Done | Embedded | Failed


class Step(Struct, tag="step"):
    """All that one batch step brought to this connection."""

    events: list[Event]


FromEngine = Loaded | Step | Pulse

# --- framing -----------------------------------------------------------------------------------------------------------------

#: A frame is a big-endian length and that many bytes of msgpack. 64 MiB holds a 32 MiB body with room to spare.
LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 64 * 1024 * 1024
#: A line on a link; words are small (an exit record carries 8 KB of text and a stack).
MAX_LINE_BYTES = 256 * 1024

_json = msgspec.json.Encoder()
_msgpack = msgspec.msgpack.Encoder()


def line(word: ChildWord | SupervisorWord) -> bytes:
    """A word for a link, newline included."""
    return _json.encode(word) + b"\n"


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message for an engine's socket, length included. Raises ValueError over MAX_FRAME_BYTES."""
    body = _msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


#: Decoders raise msgspec.ValidationError or msgspec.DecodeError on anything else.
child_words = msgspec.json.Decoder(ChildWord)
supervisor_words = msgspec.json.Decoder(SupervisorWord)
to_engine = msgspec.msgpack.Decoder(ToEngine)
from_engine = msgspec.msgpack.Decoder(FromEngine)
