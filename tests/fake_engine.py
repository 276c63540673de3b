"""A fake engine: a real process that speaks an engine's protocol and misbehaves on request.

`python fake_engine.py SOCKET MODEL` serves jobs on a unix socket, nothing else. Spawned with MLXD_CHILD it is a child of a supervisor
as well: hello, beats, load, ready. What it does stands in the text of the last message (or the prompt), as words:

    n=5         tokens in all                     die=3      the process exits before that token, unless it is the attempt's first
    delay=0.05  seconds between two tokens        poison     exits whenever it gets this request
    first=1     seconds before the first one      fail=400   Failed with this status
    size=100    bytes of text per token           hang       accepts and says nothing more
    think=2     that many tokens of thinking      echo       the answer is the Submit it got, as JSON
    length      ends with reason "length"         burst      all tokens in one frame
    wall=3      exits whenever it is to give that token
    call=f      calls the function f({"city": "Paris"}) at the end; call=f,g calls two

A job to be embedded gets one vector for each text, (length of the text, 1, 0, 0) made one long; its words are those of the first text.

and, for how it loads, in the name of the model: `refused`, `dies-loading` (until its directory holds a file `healed`), `slow-loading`
(2 s), `never-ready`, `ignores-term`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import signal
import struct
import sys
from pathlib import Path

import msgspec

from mlxd import messages
from mlxd.messages import (
    Accepted,
    Beat,
    Bye,
    Call,
    Cancel,
    Counters,
    Done,
    Drain,
    Embed,
    Embedded,
    Failed,
    Hello,
    Load,
    Loaded,
    Logprob,
    Progress,
    Pulse,
    Ready,
    Step,
    Stop,
    Submit,
    Token,
    TokenLogprob,
)

CONTEXT = 4096


class FakeEngine:
    """Jobs over a unix socket."""

    def __init__(self, model: str):
        self.model = model
        self.counters = Counters()

    async def listen(self, path: str) -> asyncio.Server:
        return await asyncio.start_unix_server(self.connected, path, limit=1024 * 1024)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        jobs: dict[int, asyncio.Task[None]] = {}
        writer.write(messages.frame(Loaded(pid=os.getpid(), model=self.model, context_length=CONTEXT)))
        pulse = asyncio.create_task(self.pulse(writer))
        try:
            while True:
                (length,) = messages.LENGTH.unpack(await reader.readexactly(4))
                match messages.to_engine.decode(await reader.readexactly(length)):
                    case Submit() as submit:
                        jobs[submit.job] = asyncio.create_task(self.work(submit, writer))
                    case Embed() as embed:
                        jobs[embed.job] = asyncio.create_task(self.embed(embed, writer))
                    case Cancel(job=job):
                        if task := jobs.pop(job, None):
                            task.cancel()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            pulse.cancel()
            for task in jobs.values():
                task.cancel()
            writer.close()

    async def pulse(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(1.0)
            writer.write(messages.frame(Pulse(self.counters)))

    async def work(self, submit: Submit, writer: asyncio.StreamWriter) -> None:
        self.counters.running += 1
        try:
            await Script(submit, writer, self.counters).play()
        finally:
            self.counters.running -= 1
            self.counters.finished += 1

    async def embed(self, embed: Embed, writer: asyncio.StreamWriter) -> None:
        words = dict(word.partition("=")[::2] for word in str(embed.inputs[0]).split())
        if "poison" in words:
            os._exit(3)
        if "fail" in words:
            writer.write(messages.frame(Step([Failed(embed.job, int(words["fail"] or 400), "scripted failure")])))
            return
        await asyncio.sleep(float(words.get("first") or 0))
        sizes = [len(text) for text in embed.inputs]
        vectors = [struct.pack("<4f", n / math.hypot(n, 1), 1 / math.hypot(n, 1), 0, 0) for n in sizes]
        self.counters.finished += 1
        writer.write(messages.frame(Step([Embedded(embed.job, vectors, sum(sizes))])))


class Script:
    """What happens to one job. The text of token i is the same in every attempt: that is what a resume relies on."""

    def __init__(self, submit: Submit, writer: asyncio.StreamWriter, counters: Counters):
        self.submit = submit
        self.writer = writer
        self.counters = counters
        # Ids stand for themselves, one per byte, so that a resumed job finds its words again.
        text = bytes(submit.prompt_ids).decode() if submit.prompt_ids is not None else said(submit)
        self.prompt_ids = list(text.encode())
        self.words = dict(word.partition("=")[::2] for word in text.split())

    def number(self, name: str, default: float) -> float:
        return float(self.words.get(name) or default)

    def send(self, *events: messages.Event) -> None:
        self.writer.write(messages.frame(Step(list(events))))

    async def play(self) -> None:
        submit, job = self.submit, self.submit.job
        if "poison" in self.words:
            os._exit(3)
        if "fail" in self.words:
            self.send(Failed(job, int(self.number("fail", 400)), "scripted failure"))
            return
        self.send(Accepted(job, self.prompt_ids, 0))
        if "hang" in self.words:
            await asyncio.Event().wait()
        await asyncio.sleep(self.number("first", 0))
        if "prefill" in self.words:
            self.send(Progress(job, 512, 1024))
        pieces = self.pieces()
        most = len(pieces) if submit.max_tokens is None else min(len(pieces), submit.max_tokens)
        tokens = [
            Token(job, [i], pieces[i], i < self.number("think", 0), self.logprobs(pieces, i))
            for i in range(len(submit.emitted), most)
        ]
        for token in tokens:
            if "die" in self.words and token.ids[0] == self.number("die", 0) > len(submit.emitted):
                await self.writer.drain()
                os._exit(3)
            if "wall" in self.words and token.ids[0] == self.number("wall", 0):
                await self.writer.drain()
                os._exit(3)
            self.counters.emitted += 1
            if "burst" not in self.words:
                self.send(token)
                await self.writer.drain()
                await asyncio.sleep(self.number("delay", 0))
        if "burst" in self.words:
            self.send(*tokens)
        for name in filter(None, self.words.get("call", "").split(",")):
            self.send(Call(job, name, '{"city": "Paris"}'))
        reason = "length" if "length" in self.words or most < len(pieces) else "stop"
        figures = {"prompt_tokens": len(self.prompt_ids), "completion_tokens": most, "cached_tokens": 0}
        self.send(Done(job=job, reason=reason, prompt_ns=1_000_000, eval_ns=2_000_000, **figures))

    def logprobs(self, pieces: list[str], i: int) -> list[TokenLogprob]:
        """The token itself is the best, and every next one half as likely."""
        if self.submit.top_logprobs is None:
            return []
        top = [Logprob(f"{pieces[i]}{n or ''}", pieces[i].encode(), -0.5 - n) for n in range(self.submit.top_logprobs)]
        return [TokenLogprob(Logprob(pieces[i], pieces[i].encode(), -0.5), top)]

    def pieces(self) -> list[str]:
        if "echo" in self.words:
            return [msgspec.json.encode(self.submit).decode()]
        size = int(self.number("size", 0))
        return [f"w{i} ".ljust(size, ".") for i in range(int(self.number("n", 5)))]


def said(submit: Submit) -> str:
    return submit.prompt if submit.prompt is not None else str((submit.messages or [{}])[-1].get("content", ""))


async def serve(path: str, model: str) -> None:
    await FakeEngine(model).listen(path)
    await asyncio.Event().wait()


async def be_child() -> None:
    """The engine's life on its link, as the real one lives it."""
    from mlxd import __version__, link

    settings = link.child_settings()
    link.become_child(settings)
    mine = await link.join(settings)
    mine.send(Hello(messages.PROTOCOL, "engine", os.getpid(), __version__, settings.nonce))
    engine = FakeEngine("")
    beats = itertools.count()

    async def beat() -> None:
        while True:
            await asyncio.sleep(1.0)
            engine.counters.loaded = next(beats)
            mine.offer(Beat(engine.counters))

    async def handle(word: messages.SupervisorWord) -> None:
        match word:
            case Load(model=model, directory=directory):
                await load(model, Path(directory))
            case Drain() | Stop():
                await end()

    async def load(model: str, directory: Path) -> None:
        engine.model = model
        if "refused" in model:
            mine.send(Bye("refused", f"{model} is broken: model.safetensors is missing"))
            await mine.writer.drain()
            os._exit(0)
        if "dies-loading" in model and not (directory / "healed").exists():
            os._exit(1)
        if "slow-loading" in model:
            await asyncio.sleep(2.0)
        if "ignores-term" in model:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        await engine.listen(settings.socket)
        if "never-ready" not in model:
            mine.send(Ready(model))

    async def end() -> None:
        mine.send(Bye("stopped"))
        await mine.writer.drain()
        os._exit(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(beat())
        group.create_task(link.serve(mine, handle, end))


if __name__ == "__main__":
    asyncio.run(be_child() if "MLXD_CHILD" in os.environ else serve(sys.argv[1], sys.argv[2]))
