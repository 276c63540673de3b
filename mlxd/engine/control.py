"""The engine's life on its link: hello, load, ready, beats, the last word. The main thread.

Owns the order of things. The model is in `batch.py`, the servers in `service.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

import mlxd
from mlxd import link, messages
from mlxd.engine.batch import Batch, Ended, Opened, Tick
from mlxd.engine.service import Service
from mlxd.link import EX_SOFTWARE, ChildSettings, Link
from mlxd.logs import words_of
from mlxd.messages import Beat, Bye, Counters, Hello, Load, Loaded, Ready, Reopen, Share, Stop, SupervisorWord
from mlxd.policy import PRODUCTIVE_TOKENS

log = logging.getLogger(__name__)

#: The last words to supervisor and servers may take this long to leave.
LAST_WORDS_S = 1.0


class Engine:
    def __init__(self, settings: ChildSettings):
        self.settings = settings
        self.model: str | None = None
        self.service: Service | None = None
        self.proven = False
        self.told = Counters()
        self.done, self.idle_since = 0, 0.0  # jobs and canaries that have ended, and since when nothing has moved that number

    async def run(self) -> None:
        """Never returns."""
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self.broken)
        self.batch = Batch(self.settings.config, self.post)
        self.link: Link = await link.join(self.settings)
        self.link.send(Hello(messages.PROTOCOL, "engine", os.getpid(), mlxd.__version__, self.settings.nonce))
        self.beats = asyncio.create_task(link.beat(self.link, self.counters, self.pulse))
        await link.serve(self.link, self.handle, self.drained)

    async def handle(self, word: SupervisorWord) -> None:
        if isinstance(word, Load) and self.model is None:
            self.model = word.model
            log.info("loading %s from %s", word.model, word.directory)
            self.batch.start(word, Path(self.settings.view))
        elif isinstance(word, Share):
            self.batch.limit(word.share_bytes)
        elif isinstance(word, Stop):
            await self.end("stopped", "", 0)
        elif isinstance(word, Reopen):
            link.reopen_log(self.settings.log)
        else:
            log.warning("not for an engine now: %r", word)

    # --- what the model thread tells ---------------------------------------------------------------------------------

    def post(self, news: Opened | Ended | Tick) -> None:
        """Called in the model thread."""
        self.loop.call_soon_threadsafe(self.heard, news)

    def heard(self, news: Opened | Ended | Tick) -> None:
        if isinstance(news, Tick):
            assert self.service is not None
            self.service.deliver(news)
            self.prove()
        elif isinstance(news, Opened):
            self.task = self.loop.create_task(self.open(news))
        else:
            self.task = self.loop.create_task(self.end(news.cause, news.text, 0 if news.cause == "refused" else EX_SOFTWARE))

    async def open(self, opened: Opened) -> None:
        assert self.model is not None
        loaded = Loaded(pid=os.getpid(), model=self.model, context_length=opened.context_length)
        self.service = Service(self.batch, opened, loaded, self.settings.config.engine.text_s, self.overdue)
        Path(self.settings.socket).unlink(missing_ok=True)
        await self.service.serve(self.settings.socket)
        self.idle_since = self.loop.time()
        self.link.send(Ready(self.model))
        log.info("ready: %s, context %d tokens", self.model, opened.context_length)

    def prove(self) -> None:
        """Tell of the first work at once: an engine that dies before its next beat would seem to have done none, and such deaths cost."""
        counters = self.batch.counters
        if not self.proven and (counters.finished or counters.emitted >= PRODUCTIVE_TOKENS):
            self.proven = True
            self.link.offer(Beat(self.counters()))

    def broken(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception that nothing expects: some job would wait for ever. End, so that another engine takes over."""
        error = context.get("exception")
        text = context["message"] if error is None else words_of(error)
        log.error("%s", text, exc_info=error)
        self.task = loop.create_task(self.end("error", text, EX_SOFTWARE))

    def overdue(self, text: str) -> None:
        """The request has got its answer; the text thread is lost."""
        self.task = self.loop.create_task(self.end("deadline", text, EX_SOFTWARE))

    # --- beats and the end ---------------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        """How far we are. What the model thread has in hand is counted by us: it may hang.

        MLX's memory counters are plain reads of its allocator; no stream is touched."""
        batch, service = self.batch, self.service
        running = batch.held + (service.unadmitted if service else 0)
        self.told = msgspec.structs.replace(
            batch.counters,
            running=running,
            waiting=service.unprepared.qsize() if service else 0,
            prefilling=max(0, running - batch.decoding),
            loaded=batch.counters.loaded + (service.slices if service else 0),
            finished=batch.counters.finished + (service.rowless if service else 0),
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            cache_bytes=batch.prefixes.bytes,
        )
        return self.told

    def pulse(self) -> None:
        """Beside each beat: the same for the servers, and for an engine that idles, from time to time, a canary."""
        if self.service is None:
            return
        self.service.pulse(self.told)
        if not Path(self.settings.socket).exists():  # a cleaner of temporary files was here: no new server could connect
            self.listening = self.loop.create_task(self.listen_again())
        now = self.loop.time()
        done = self.told.finished + self.told.canaries
        if self.told.running or done != self.done:
            self.done, self.idle_since = done, now
        elif self.settings.config.health.canary_s and now - self.idle_since >= self.settings.config.health.canary_s:
            self.batch.probe()

    async def listen_again(self) -> None:
        assert self.service is not None
        with contextlib.suppress(OSError):  # the next beat tries again
            await self.service.listen(self.settings.socket)

    async def drained(self) -> None:
        if self.service:
            await self.service.drained()

    async def end(self, cause: str, text: str, status: int) -> None:
        """The last word, then the end, whatever other threads are at. Never returns."""
        log.info("bye: %s %s", cause, text)
        self.link.send(Bye(cause, text))
        writers = [self.link.writer]
        if self.service:
            self.service.flush()
            writers += [c.writer for c in self.service.connections]
        with contextlib.suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(asyncio.gather(*(written(w) for w in writers), return_exceptions=True), LAST_WORDS_S)
        link.leave(status)


async def written(writer: asyncio.StreamWriter) -> None:
    """Returns when the kernel has all of it."""
    writer.transport.set_write_buffer_limits(0)
    await writer.drain()
