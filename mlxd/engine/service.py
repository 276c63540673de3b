"""The engine's socket: servers connect, submit jobs and get one frame per batch step.

Owns connections and jobs, and turns tokens into events. Runs in the main thread; templates and tokenising go to the text thread.
Knows nothing of MLX.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, takewhile
from typing import Literal, TypeVar

import msgspec

from mlxd import messages
from mlxd.engine.answer import Answer, Called, Piece
from mlxd.engine.batch import Batch, Opened, Row, Tick
from mlxd.engine.embedding import Texts
from mlxd.engine.grammar import Constraint, is_constrained
from mlxd.engine.logprobs import Odds, spelled
from mlxd.engine.sampling import Draw
from mlxd.engine.text import BYTES_PER_TOKEN, Prompt, Prompter
from mlxd.errors import Refused
from mlxd.estimate import gigabytes
from mlxd.messages import (
    Accepted,
    Call,
    Cancel,
    Done,
    Embed,
    Embedded,
    Event,
    Failed,
    Loaded,
    Progress,
    Step,
    Submit,
    Token,
    TokenLogprob,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

#: A connection whose reader is this far behind is dropped: it would take the memory that the model needs.
MAX_UNREAD_BYTES = 64 * 1024 * 1024
#: 1 MB takes a second to tokenise, and truncation may do it four times; what is too long to be tokenised is only rendered.
TEXT_S_PER_BYTE = 4e-6
RENDER_S_PER_BYTE = 2e-7
#: Texts to be embedded are tokenised so many bytes at a time: prompts that come meanwhile do not wait for all of them.
SLICE_BYTES = 64 * 1024
#: What vectors leave of a frame for the rest of it.
FRAME_MARGIN_BYTES = 1024 * 1024
#: No single text may take longer: an engine that has work and shows nothing for 120 s is taken for stalled.
MOST_TEXT_S = 100.0
#: Of a deadline for work in a thread: a time in which the whole process stood still, as a laptop does that is closed, counts as one step.
STEP_S = 0.1


class Connection:
    """One server. `jobs` by the server's own numbers; `events` is what the present step has brought it; `read_bytes`: the size of the
    last message."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader = reader
        self.writer = writer
        self.jobs: dict[int, Job | EmbedJob] = {}
        self.events: list[Event] = []
        self.read_bytes = 0

    async def read(self) -> messages.ToEngine | None:
        """The next message; None at the end. Raises ValueError on a frame that is none."""
        try:
            (length,) = messages.LENGTH.unpack(await self.reader.readexactly(messages.LENGTH.size))
            if length > messages.MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            self.read_bytes = length
            message: messages.ToEngine = messages.to_engine.decode(await self.reader.readexactly(length))
            return message
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"not a message: {error}") from error

    def send(self, message: messages.FromEngine) -> None:
        """Never blocks; a reader that lets MAX_UNREAD_BYTES pile up loses its connection."""
        transport = self.writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            log.warning("dropped a connection that left %d MiB unread", MAX_UNREAD_BYTES // 2**20)
            transport.abort()
            return
        self.writer.write(messages.frame(message))


class Job:
    """One request, from its Submit to its last event. `prompt` to `row` are set once the prompt is tokenised and its grammar, if it is
    `constrained`, compiled."""

    prompt: Prompt
    answer: Answer
    constrained = False
    constraint: Constraint | None = None
    row: Row | None = None
    compiling: asyncio.Task[None] | None = None

    def __init__(self, connection: Connection, submit: Submit):
        self.connection = connection
        self.submit = submit
        self.size_bytes = connection.read_bytes
        self.ended = False
        self.cached = 0
        self.tokens = len(submit.emitted)
        self.began_ns = self.first_ns = self.last_ns = 0

    def tell(self, event: Event) -> None:
        self.connection.events.append(event)

    def tell_pieces(self, ids: list[int], pieces: list[Piece | Called], logprobs: list[TokenLogprob]) -> None:
        """One Token, or as many as there are changes between thinking and answer; the first has the ids, and comes before any call."""
        if ids and not (pieces and isinstance(pieces[0], Piece)):
            self.tell(Token(self.submit.job, ids, "", self.answer.part == "reasoning", logprobs))
            ids, logprobs = [], []
        for piece in pieces:
            if isinstance(piece, Called):
                self.tell(Call(self.submit.job, piece.name, piece.arguments))
            else:
                self.tell(Token(self.submit.job, ids, piece.text, piece.thinking, logprobs))
                ids, logprobs = [], []


class EmbedJob:
    """Texts to be embedded, from their Embed to their last event. `ids`: of those that are tokenised; `row` is set once all of them are."""

    row: Texts | None = None

    def __init__(self, connection: Connection, submit: Embed):
        self.connection = connection
        self.submit = submit
        self.ended = False
        self.ids: list[list[int]] = []

    def tell(self, event: Event) -> None:
        self.connection.events.append(event)

    @property
    def next_texts(self) -> range:
        """Which ones are tokenised next, one at least."""
        start, inputs = len(self.ids), self.submit.inputs
        sizes = accumulate(4 * len(inputs[index]) for index in range(start, len(inputs)))
        return range(start, min(len(inputs), start + 1 + sum(1 for _ in takewhile(SLICE_BYTES.__gt__, sizes))))

    @property
    def size_bytes(self) -> int:
        """Of those, at most."""
        return sum(4 * len(self.submit.inputs[index]) for index in self.next_texts)


class Service:
    """`overdue` is called once, when the text of one request took longer than `text_s` and what its size allows: the text thread cannot
    be had back."""

    def __init__(self, batch: Batch, opened: Opened, loaded: Loaded, text_s: float, overdue: Callable[[str], None]):
        self.batch = batch
        self.opened = opened
        self.tokenizer = opened.tokenizer
        self.prompter = Prompter(opened.tokenizer, opened.context_length, opened.vocabulary_size)
        self.vocabulary_size = opened.vocabulary_size
        self.grammars = opened.grammars
        self.loaded = loaded
        self.text_s = text_s
        self.overdue = overdue
        self.listener: asyncio.Server | None = None
        self.connections: set[Connection] = set()
        self.unprepared: asyncio.Queue[Job | EmbedJob] = asyncio.Queue()
        self.text_thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self.grammar_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self.compiling = asyncio.Lock()
        self.overlong: asyncio.Future[Constraint] | None = None  # a compilation whose request has got its answer, left to end
        self.job_ended = asyncio.Event()
        self.rowless = 0  # jobs that ended without a row in the batch
        self.slices = 0  # of texts to be embedded, tokenised

    # --- connections -------------------------------------------------------------------------------------------------

    async def serve(self, path: str) -> None:
        """Listen, and work on what comes; returns when servers may connect."""
        await self.listen(path)
        self.preparing = asyncio.create_task(self.prepare_jobs())

    async def listen(self, path: str) -> None:
        """Where nothing is now. Connections that are open stay. Raises OSError."""
        former, self.listener = self.listener, await asyncio.start_unix_server(self.accept, path)
        if former is not None:
            former.close()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        self.connections.add(connection)
        try:
            connection.send(self.loaded)
            while (message := await connection.read()) is not None:
                self.handle(connection, message)
        except ValueError as error:
            log.warning("closed a connection: %s", error)
        finally:
            self.connections.discard(connection)
            for job in connection.jobs.values():
                self.end(job)
            connection.jobs.clear()
            writer.close()

    def handle(self, connection: Connection, message: messages.ToEngine) -> None:
        """Raises ValueError when two jobs of a connection would have the same number."""
        if isinstance(message, Cancel):
            if job := connection.jobs.pop(message.job, None):
                self.end(job)
        elif message.job in connection.jobs:
            raise ValueError(f"job {message.job} was submitted twice")
        elif why := self.inability(message):
            connection.send(Step([Failed(message.job, 400, why)]))
        else:
            job = EmbedJob(connection, message) if isinstance(message, Embed) else Job(connection, message)
            connection.jobs[message.job] = job
            self.unprepared.put_nowait(job)

    def inability(self, message: Submit | Embed) -> str:
        """Why this model cannot do that, whatever the text; "" when it can."""
        opened, name = self.opened, self.loaded.model
        if isinstance(message, Submit):
            return "" if opened.generates else f"{name} does not support generate"
        if opened.no_vectors:
            return f"{name} does not support embeddings: {opened.no_vectors}"
        most = (messages.MAX_FRAME_BYTES - FRAME_MARGIN_BYTES) // (4 * opened.vector_length)
        if len(message.inputs) > most:
            return f"input: at most {most} vectors of {opened.vector_length} numbers in one request"
        return ""

    @property
    def unadmitted(self) -> int:
        """Jobs without a row: what their prompts are waits for, or is in, the text thread."""
        return sum(job.row is None for connection in self.connections for job in connection.jobs.values())

    def pulse(self, counters: messages.Counters) -> None:
        for connection in self.connections:
            connection.send(messages.Pulse(counters))

    async def drained(self) -> None:
        """Returns when no job is left."""
        while any(connection.jobs for connection in self.connections):
            self.job_ended.clear()
            await self.job_ended.wait()

    # --- a job's way ---------------------------------------------------------------------------------------------------

    async def prepare_jobs(self) -> None:
        """One after the other: template and tokens in the text thread, then off to the batch."""
        loop = asyncio.get_running_loop()
        while True:
            job = await self.unprepared.get()
            if job.ended:
                continue
            try:
                work = loop.run_in_executor(self.text_thread, self.prepare, job)
                await within(self.limit_s(job), work)
            except TimeoutError:
                message = f"the chat template and tokeniser took over {self.limit_s(job):.1f} s for this request"
                self.fail(job, 400, message)
                self.overdue(message)
                return
            except Refused as refused:
                self.fail(job, refused.status, refused.message, refused.code)
            except Exception as error:  # a tokenizer's own: it concerns this request alone
                log.exception("a request has no prompt", extra={"request_id": job.submit.request_id})
                self.fail(job, 500, f"the prompt cannot be made: {type(error).__name__}: {error}")
            else:
                if isinstance(job, Job) and job.constrained:
                    job.compiling = asyncio.create_task(self.constrain(job))
                else:
                    self.admit(job)
            self.flush()

    async def constrain(self, job: Job) -> None:
        """Compile the job's grammar, one after the other, and admit it. Jobs without a grammar do not wait for this."""
        async with self.compiling:
            if job.ended:
                return
            assert self.grammars is not None
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self.grammar_thread, self.grammars.compile, job.submit, job.prompt)
            try:
                job.constraint = await within(self.text_s, work)
            except TimeoutError:
                message = f"the JSON schema or regular expression is too complex: compiling it took over {self.text_s:.1f} s"
                self.fail(job, 400, message)
                if self.overlong is not None and not self.overlong.done():
                    self.overdue(message)
                    return
                work.add_done_callback(asyncio.Future.exception)  # or it would be an exception that nothing expects
                self.overlong = work
                self.grammar_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            except Refused as refused:
                self.fail(job, refused.status, refused.message)
            except Exception as error:  # of a shape that nobody thought of: it concerns this request alone
                log.exception("a request has no grammar", extra={"request_id": job.submit.request_id})
                self.fail(job, 500, f"the grammar of this request cannot be made: {type(error).__name__}: {error}")
            else:
                self.admit(job)
            self.flush()

    def limit_s(self, job: Job | EmbedJob) -> float:
        """How long the text of a job may take: no more of it is tokenised than could fit the context."""
        tokenised = min(job.size_bytes, BYTES_PER_TOKEN * self.loaded.context_length)
        return min(self.text_s + TEXT_S_PER_BYTE * tokenised + RENDER_S_PER_BYTE * job.size_bytes, max(self.text_s, MOST_TEXT_S))

    def prepare(self, job: Job | EmbedJob) -> None:
        """In the text thread. Raises Refused."""
        if isinstance(job, EmbedJob):
            job.ids += [self.prompter.text(job.submit, index) for index in job.next_texts]
            return
        for token in job.submit.sampling.logit_bias:
            if not 0 <= token < self.vocabulary_size:  # MLX would write beyond the logits
                raise Refused(400, f"logit_bias names token {token}, and this model's are 0 to {self.vocabulary_size - 1}")
        job.constrained = is_constrained(job.submit)
        job.prompt = self.prompter.prepare(job.submit)
        submit, prompt = job.submit, job.prompt
        job.answer = Answer(
            self.tokenizer,
            submit.stop,
            thinking=prompt.thinking,
            continued=prompt.continued,
            tools=submit.tools,
            request_id=submit.request_id,
        )
        for token in submit.emitted:  # what an earlier engine said; its text is with the client
            job.answer.feed(token)

    def admit(self, job: Job | EmbedJob) -> None:
        if job.ended:
            return
        if isinstance(job, EmbedJob):
            self.slices += 1
            if len(job.ids) < len(job.submit.inputs):
                self.unprepared.put_nowait(job)
            else:
                job.row = Texts(job, job.ids)
                self.batch.embed(job.row)
            return
        submit, prompt = job.submit, job.prompt
        left = prompt.max_tokens - len(submit.emitted)
        if job.answer.stop_string is not None or left <= 0:
            job.tell(Accepted(submit.job, prompt.ids, 0, prompt.continued))
            job.tell_pieces([], job.answer.finish(cut=True), [])
            self.finish(job, "length")
            return
        ids = prompt.ids + submit.emitted
        if not submit.emitted:  # what has begun goes on, alone if need be
            if len(ids) >= (most := self.batch.room.most_tokens):
                self.fail(job, 507, self.lack(len(ids), most), "insufficient_memory")
                return
            left = min(left, most - len(ids))
        draw = Draw(submit.sampling, len(prompt.ids), job.constraint, submit.top_logprobs)
        job.row = Row(job, ids, draw, left)
        self.batch.admit(job.row)

    def lack(self, tokens: int, most: int) -> str:
        """Why so many tokens cannot be served, when memory has room for `most` of one request."""
        room = self.batch.room
        need, have = gigabytes(room.row(tokens + 1)), gigabytes(room.bytes)
        return (
            f"{self.loaded.model} needs {need} for the {tokens} tokens of this request and has {have}: at most {most} tokens "
            "fit; shorten it, unload other models, or raise engine.memory_limit"
        )

    def deliver(self, tick: Tick) -> None:
        """What a step brought, to those who asked: one frame each."""
        for row, cached in tick.accepted:
            job: Job = row.owner
            job.cached = cached
            if not job.ended:
                job.tell(Accepted(job.submit.job, job.prompt.ids, cached, job.prompt.continued))
        for row, done, total in tick.progress:
            job = row.owner
            job.began_ns = job.began_ns or tick.began_ns
            if not job.ended:
                job.tell(Progress(job.submit.job, done, total))
        for row, token, reason, odds in tick.tokens:
            job = row.owner
            if not job.ended:
                self.advance(job, token, reason, odds, tick)
        for row, message in tick.failed:
            self.fail(row.owner, 400, message)
        for texts, read in tick.read:
            embedding: EmbedJob = texts.owner
            if not embedding.ended:
                embedding.tell(Progress(embedding.submit.job, read, texts.tokens))
        for texts in tick.embedded:
            embedding = texts.owner
            if not embedding.ended:
                embedding.tell(Embedded(embedding.submit.job, texts.vectors, texts.tokens))
                del embedding.connection.jobs[embedding.submit.job]
                self.end(embedding)
        self.flush()

    def advance(self, job: Job, token: int, reason: str | None, odds: Odds | None, tick: Tick) -> None:
        job.tokens += 1
        job.last_ns = tick.ended_ns
        job.first_ns = job.first_ns or tick.ended_ns
        job.began_ns = job.began_ns or tick.began_ns
        ids = [] if reason == "stop" else [token]  # an end token is no part of the answer
        try:
            pieces = job.answer.feed(token) if ids else []
            ended = reason is not None or job.answer.stop_string is not None
            if ended:
                pieces += job.answer.finish(cut=reason == "length")
        except Exception as error:  # a vocabulary with gaps has ids that stand for no text
            self.fail(job, 500, f"token {token} cannot be decoded: {type(error).__name__}: {error}")
            return
        told = [spelled(token, odds, self.grammars.raw)] if ids and odds and self.grammars else []
        job.tell_pieces(ids, pieces, told)
        if ended:
            self.finish(job, "stop" if reason == "stop" else "length")

    def finish(self, job: Job, reason: Literal["stop", "length"]) -> None:
        """The job is done; a stop string outranks `reason`."""
        stop_string = job.answer.stop_string
        job.tell(
            Done(
                job=job.submit.job,
                reason="stop" if stop_string is not None else reason,
                stop_string=stop_string,
                prompt_tokens=len(job.prompt.ids),
                cached_tokens=job.cached,
                completion_tokens=job.tokens,
                prompt_ns=job.first_ns - job.began_ns,
                eval_ns=job.last_ns - job.first_ns,
            )
        )
        del job.connection.jobs[job.submit.job]
        self.end(job)

    def fail(self, job: Job | EmbedJob, status: int, message: str, code: str | None = None) -> None:
        if job.ended:
            return
        job.tell(Failed(job.submit.job, status, message, code))
        del job.connection.jobs[job.submit.job]
        self.end(job)

    def end(self, job: Job | EmbedJob) -> None:
        """No more events of this job; its place in the batch, if it has one, is free."""
        job.ended = True
        if job.row is None:
            self.rowless += 1
        else:
            self.batch.drop(job.row)
        self.job_ended.set()

    def flush(self) -> None:
        for connection in self.connections:
            if connection.events:
                connection.send(Step(connection.events))
                connection.events = []


async def within(limit_s: float, work: asyncio.Future[T]) -> T:
    """The result of `work`, which is left alone when it is not there after `limit_s` of running time: TimeoutError."""
    for _ in range(math.ceil(limit_s / STEP_S)):
        done, _ = await asyncio.wait([work], timeout=STEP_S)
        if done:
            return work.result()
    raise TimeoutError
