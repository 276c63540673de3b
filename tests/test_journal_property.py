"""Whatever happens to engines and clients, every request ends in exactly one way, and no token comes twice or not at all.

The real application, service, journal and pool, on one loop with engines that serve real sockets and step when told. The supervisor is
a few lines, so that hypothesis decides what it says and when.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from server_client import make_model

from mlxd import messages
from mlxd.api.service import Service
from mlxd.config import Config
from mlxd.messages import (
    Accepted,
    Cancel,
    Done,
    EngineDown,
    EngineUp,
    Event,
    Loaded,
    Progress,
    Release,
    Stalled,
    Step,
    Submit,
    Token,
    Want,
)
from mlxd.server import App

MODELS = ("a:latest", "b:latest")
#: Long beside an example: patience ends only where two models wait for each other, one for slots and one for room. What is to be
#: retried later than that is refused.
PATIENCE_S = 10.0
SLOTS, SEATS = 2, 4


class Work:
    """One job: prompt in two chunks, then its tokens. "poison=2" takes the engine with it instead of giving token 2."""

    def __init__(self, submit: Submit):
        text = submit.messages[-1]["content"] if submit.messages else bytes(submit.prompt_ids or []).decode()
        words = dict(word.partition("=")[::2] for word in text.split())
        job, prompt = submit.job, list(text.encode())
        assert submit.prompt_ids in (None, prompt)
        n, self.wall = int(words["n"]), int(words.get("poison", -1))
        self.position = len(submit.emitted)
        assert submit.emitted == list(range(self.position))
        tokens: list[Event] = [Token(job, [i], f"w{i} ") for i in range(self.position, n)]
        end = Done(job=job, reason="stop", prompt_tokens=len(prompt), cached_tokens=0, completion_tokens=n, prompt_ns=1, eval_ns=1)
        self.events = [Accepted(job, prompt, 0), Progress(job, 1, 2), Progress(job, 2, 2), *tokens, end]

    def deadly(self) -> bool:
        return isinstance(self.events[0], Token) and self.events[0].ids == [self.wall]

    def step(self) -> Event:
        return self.events.pop(0)


class Engine:
    """A fake engine in this process, behind a real socket."""

    def __init__(self, slot: int, model: str, path: Path):
        self.slot = slot
        self.model = model
        self.path = path
        self.jobs: dict[asyncio.StreamWriter, dict[int, Work]] = {}

    async def listen(self) -> None:
        self.listener = await asyncio.start_unix_server(self.serve, self.path)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        jobs = self.jobs[writer] = {}
        writer.write(messages.frame(Loaded(pid=os.getpid(), model=self.model, context_length=4096)))
        try:
            while True:
                (length,) = messages.LENGTH.unpack(await reader.readexactly(4))
                match messages.to_engine.decode(await reader.readexactly(length)):
                    case Submit() as submit:
                        jobs[submit.job] = Work(submit)
                    case Cancel(job=job):
                        jobs.pop(job, None)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.jobs.pop(writer, None)
            writer.close()

    def step(self) -> bool:
        """One batch step, a frame for each connection. False: one of the jobs has ended the process."""
        works = [work for jobs in self.jobs.values() for work in jobs.values()]
        if any(work.deadly() for work in works):
            return False
        for writer, jobs in self.jobs.items():
            events = [work.step() for work in jobs.values()]
            for event in events:
                if isinstance(event, Done):
                    del jobs[event.job]
            if events:
                writer.write(messages.frame(Step(events)))
        return True

    def cut(self) -> None:
        for writer in list(self.jobs):
            writer.transport.abort()
        self.jobs.clear()

    def end(self) -> None:
        self.listener.close()
        self.path.unlink()
        self.cut()


class Client:
    """One request as the application sees it, and what came back."""

    def __init__(self, app: App, path: str, model: str, n: int, stream: bool, poison: int | None):
        self.openai = path.startswith("/v1")
        self.n = n
        self.stream = stream
        text = f"n={n}" + ("" if poison is None else f" poison={poison}")
        call = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}
        self.body = msgspec.json.encode(call)
        self.status = 0
        self.received = b""
        self.complete = False
        self.left = False
        self.over = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": [(b"host", b"localhost")], "http_version": "1.1"}
        self.task = asyncio.get_running_loop().create_task(app(scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        if self.body:
            body, self.body = self.body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self.over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        if self.left:
            return
        assert not self.complete, message
        if message["type"] == "http.response.start":
            assert not self.status
            self.status = message["status"]
            return
        assert self.status
        self.received += message["body"]
        if not message["more_body"]:
            self.complete = True
            self.over.set()

    def leave(self) -> None:
        self.left = True
        self.reads.set()
        self.over.set()

    def told(self) -> list[dict[str, Any]]:
        """The objects of the answer so far."""
        lines = [line.removeprefix(b"data: ") for line in self.received.split(b"\n") if line and not line.startswith(b": ")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]

    def text(self) -> str:
        found = ""
        for told in self.told():
            if "error" not in told:
                piece = (
                    (told["choices"][0].get("delta") or told["choices"][0].get("message") or {}) if self.openai else told["message"]
                )
                found += piece.get("content", "")
        return found

    def error(self) -> str:
        """The sentence, if it ended with one."""
        last = self.told()[-1].get("error", "")
        return last if isinstance(last, str) else last["message"]

    def outcome(self) -> str:
        """Exactly one of the four; AssertionError on anything else."""
        assert self.task.done() and self.task.exception() is None
        if self.left:
            return "cancelled"
        assert self.complete and self.received
        whole = "".join(f"w{i} " for i in range(self.n))
        if self.error():
            assert self.error() != "internal error"
            assert whole.startswith(self.text())
            return "failed" if self.status == 200 else "refused"
        assert self.status == 200
        assert self.text() == whole
        end = self.told()[-1]
        if not self.openai:
            assert (end["done"], end["eval_count"]) == (True, self.n)
            parts = end["load_duration"] + end["prompt_eval_duration"] + end["eval_duration"]
            assert end["total_duration"] >= parts
        return "answered"


class World(RuleBasedStateMachine):
    clients = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="mlxd-t-"))
        for model in MODELS:
            make_model(self.home / "models" / model.removesuffix(":latest"))
        self.loop = asyncio.new_event_loop()
        self.wanted: dict[str, None] = {}
        self.engines: dict[str, Engine] = {}
        self.said: list[messages.ChildWord] = []
        self.all: list[Client] = []
        self.slots = 0
        self.touched = 0
        self.gentle = True  # nothing has happened yet that a request need not survive
        self.loop.run_until_complete(self.begin())

    async def begin(self) -> None:
        tree = {
            "models": {"dir": str(self.home / "models"), "preload": [], "max_cached": 1},
            "server": {"max_concurrent": SLOTS, "max_queue": SEATS, "queue_wait_s": PATIENCE_S, "ping_s": 0},
        }
        self.service = Service(msgspec.convert(tree, Config), self.said.append, "nonce")
        self.service.catalogue.scan()
        self.app = App(self.service)

    # --- the supervisor ------------------------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Until everybody waits: for the clock, for an engine's step or for a word of ours."""
        for _ in range(40):
            while self.said:
                await self.hear(self.said.pop(0))
            await asyncio.sleep(0)

    async def hear(self, word: messages.ChildWord) -> None:
        pool = self.service.pool
        match word:
            case Want(model=model):
                self.wanted[model] = None
                if engine := self.engines.get(model):
                    await pool.engine_up(self.up(engine))
            case Release(model=model):
                self.wanted.pop(model, None)
                slot = 0
                if engine := self.engines.pop(model, None):
                    slot = engine.slot
                    engine.end()
                pool.engine_down(EngineDown(slot, model, "stopped", "released"))
            case Stalled():
                raise AssertionError("every engine moves when it is told to")

    def up(self, engine: Engine) -> EngineUp:
        return EngineUp(engine.slot, os.getpid(), engine.model, str(engine.path))

    async def bring_up(self) -> None:
        """Every engine that is wanted and is not there."""
        for model in self.wanted:
            if model not in self.engines:
                self.slots += 1
                engine = self.engines[model] = Engine(self.slots, model, self.home / f"{self.slots}.sock")
                await engine.listen()
                await self.service.pool.engine_up(self.up(engine))

    async def bury(self, engine: Engine, cause: str, retry_s: float | None) -> None:
        """`retry_s`: None when another one is to come at once."""
        del self.engines[engine.model]
        engine.end()
        await asyncio.sleep(0)  # its sockets are closed before anybody can say so
        down = EngineDown(engine.slot, engine.model, cause, "replaced" if retry_s is None else "retried", retry_s or 0.0)
        self.service.pool.engine_down(down)

    def do(self, work: Any) -> Any:
        async def whole() -> Any:
            result = await work
            await self.settle()
            return result

        return self.loop.run_until_complete(whole())

    # --- what may happen -------------------------------------------------------------------------------------------------------------

    @rule(
        target=clients,
        path=st.sampled_from(["/api/chat", "/v1/chat/completions"]),
        model=st.sampled_from(MODELS),
        n=st.integers(1, 6),
        stream=st.booleans(),
        poison=st.sampled_from([None, None, None, 0, 2]),
    )
    def ask(self, path: str, model: str, n: int, stream: bool, poison: int | None) -> Client:
        async def begin() -> Client:
            client = Client(self.app, path, model, n, stream, poison)
            self.all.append(client)
            return client

        self.gentle &= poison is None and len(self.service.journal.entries) < SLOTS + SEATS
        return self.do(begin())  # type: ignore[no-any-return]

    @rule(client=clients)
    def leave(self, client: Client) -> None:
        async def work() -> None:
            if not client.complete:
                client.leave()

        self.do(work())

    @rule(client=clients, reads=st.booleans())
    def read_or_not(self, client: Client, reads: bool) -> None:
        async def work() -> None:
            (client.reads.set if reads or client.left else client.reads.clear)()

        self.do(work())

    @rule()
    def come_up(self) -> None:
        self.do(self.bring_up())

    @rule(steps=st.integers(1, 5), up=st.booleans())
    def step(self, steps: int, up: bool) -> None:
        async def work() -> None:
            if up:
                await self.bring_up()
                await self.settle()
            for _ in range(steps):
                for engine in list(self.engines.values()):
                    if not engine.step():
                        await self.bury(engine, "segfault", None)
                await self.settle()

        self.do(work())

    @rule(cause=st.sampled_from(["killed", "terminated", "deadline"]), up=st.booleans())
    def die_of_nobodys_fault(self, cause: str, up: bool) -> None:
        async def work() -> None:
            for engine in list(self.engines.values()):
                await self.bury(engine, cause, None)
            if up:
                await self.bring_up()

        self.do(work())

    @rule(cause=st.sampled_from(["segfault", "out of memory"]), retry_s=st.sampled_from([None, 1.0, 2 * PATIENCE_S]))
    def die(self, cause: str, retry_s: float | None) -> None:
        async def work() -> None:
            for engine in list(self.engines.values()):
                self.gentle = False
                await self.bury(engine, cause, retry_s)

        self.do(work())

    @rule()
    def lose_connections(self) -> None:
        async def work() -> None:
            for engine in self.engines.values():
                engine.cut()

        self.do(work())

    @rule(model=st.sampled_from(MODELS))
    def refuse_to_load(self, model: str) -> None:
        async def work() -> None:
            if model in self.wanted and model not in self.engines:
                self.gentle = False
                del self.wanted[model]
                self.service.pool.engine_down(EngineDown(0, model, "a tensor is missing", "refused"))

        self.do(work())

    @rule(model=st.sampled_from(MODELS))
    def replace_files(self, model: str) -> None:
        async def work() -> None:
            self.gentle = False
            self.touched += 1
            (self.home / "models" / model.removesuffix(":latest") / "notes.txt").write_text("x" * self.touched)
            self.service.catalogue.scan()

        self.do(work())

    @rule()
    def tick(self) -> None:
        async def work() -> None:
            self.service.sweep()

        self.do(work())

    # --- what must hold --------------------------------------------------------------------------------------------------------------

    @invariant()
    def nobody_is_told_what_was_not_said_and_nothing_grows(self) -> None:
        for client in self.all:
            if client.stream:
                assert "".join(f"w{i} " for i in range(client.n)).startswith(client.text())
        admission = self.service.admission
        assert admission.running <= SLOTS
        assert len(self.service.journal.entries) <= SLOTS + SEATS

    def teardown(self) -> None:
        try:
            self.loop.run_until_complete(self.end())
        finally:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.home, ignore_errors=True)

    async def end(self) -> None:
        """Let everything take its course; then nothing may be left."""
        for client in self.all:
            client.reads.set()
        async with asyncio.timeout(60):
            while not all(client.task.done() for client in self.all):
                await self.bring_up()
                for engine in list(self.engines.values()):
                    if not engine.step():
                        await self.bury(engine, "segfault", None)
                await self.settle()
        outcomes = {client.outcome() for client in self.all}
        if self.gentle:
            assert outcomes <= {"answered", "cancelled"}
        service = self.service
        assert (service.journal.entries, service.journal.held_bytes, service.exchanges) == (set(), 0, set())
        assert (service.admission.running, service.admission.waiting) == (0, 0)
        assert not any(service.admission.queues.values())
        for engine in service.pool.engines.values():
            assert (engine.users, engine.suspects) == (0, [])
            assert engine.connection is None or not engine.connection.jobs
            service.pool.disconnect(engine)
        for fake in self.engines.values():
            assert not any(fake.jobs.values())
            fake.end()
        await self.settle()


COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def test_every_request_ends_in_exactly_one_way_whatever_happens() -> None:
    run_state_machine_as_test(World, settings=settings(max_examples=100, stateful_step_count=30, derandomize=True, **COMMON))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_request_ends_in_exactly_one_way_whatever_happens_for_longer() -> None:
    run_state_machine_as_test(World, settings=settings(max_examples=2000, stateful_step_count=60, **COMMON))
