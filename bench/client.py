"""The load: N chat streams at once, started together. Reads one JSON line per run on stdin, writes one per run on stdout.

In a process of its own, and lean (no HTTP library, nothing parsed but the first token and the last lines): on a small machine
the client's own work takes speed from the server it measures.

In:  {"port": 8080, "model": "name", "prompts": ["...", ...], "tokens": 256, "constrained": 0}
Out: {"seconds": 1.2, "ttft_s": [...], "stream_s": [...], "tokens": 2048}
TTFT: from before the connection is made to the first content that is not empty; `stream_s`: to the end. `constrained`: so many of the
streams, the first ones, must be JSON of a schema that does not end before the tokens do.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
import time
from typing import Any

CONTENT = re.compile(rb'"content": ?"[^"]')
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
FINISH = re.compile(rb'"finish_reason": ?"(\w+)"')
END = b"data: [DONE]"
#: The last lines, with the usage and the finish reason, lie well within it.
TAIL_BYTES = 4096
ENDLESS = {
    "type": "array",
    "items": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    "minItems": 1000,
}


class Stream(asyncio.Protocol):
    """One request on one connection; `done` gets (TTFT and the whole in seconds, tokens)."""

    def __init__(self, request: bytes, done: asyncio.Future[tuple[float, float, int]], begun: float) -> None:
        self.request = request
        self.done = done
        self.begun = begun
        self.ttft_s = 0.0
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        tail = self.tail + data
        if not self.ttft_s and CONTENT.search(tail):
            self.ttft_s = time.perf_counter() - self.begun
        if END in tail:
            self.finish(tail)
        self.tail = tail[-TAIL_BYTES:]

    def finish(self, tail: bytes) -> None:
        usage, reasons = USAGE.findall(tail), FINISH.findall(tail)
        if not self.done.done():
            if usage and reasons and reasons[-1] == b"length":
                self.done.set_result((self.ttft_s, time.perf_counter() - self.begun, int(usage[-1])))
            else:
                self.done.set_exception(RuntimeError(f"a stream that did not end by length: {tail[-500:]!r}"))
        self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"a stream broke off ({error}): {self.tail[-500:]!r}"))


def request_for(run: dict[str, Any], prompt: str, constrained: bool) -> bytes:
    body: dict[str, Any] = {
        "model": run["model"],
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": run["tokens"],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if constrained:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "endless", "schema": ENDLESS}}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{run['port']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def stream(port: int, request: bytes) -> tuple[float, float, int]:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[float, float, int]] = loop.create_future()
    begun = time.perf_counter()
    await loop.create_connection(lambda: Stream(request, done, begun), "127.0.0.1", port)
    return await done


async def load(run: dict[str, Any]) -> dict[str, Any]:
    requests = [request_for(run, prompt, i < run.get("constrained", 0)) for i, prompt in enumerate(run["prompts"])]
    begun = time.perf_counter()
    streams = await asyncio.wait_for(asyncio.gather(*(stream(run["port"], request) for request in requests)), timeout=600)
    seconds = time.perf_counter() - begun
    ttft_s, stream_s, tokens = zip(*streams, strict=True)
    return {"seconds": seconds, "ttft_s": ttft_s, "stream_s": stream_s, "tokens": sum(tokens)}


def main() -> None:
    gc.disable()
    for line in sys.stdin:
        print(json.dumps(asyncio.run(load(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
