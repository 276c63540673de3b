"""A server that plays Ollama, and misbehaves on request: `python fake_neighbour.py serve`, on the port of OLLAMA_HOST.

    fake_neighbour.py serve --port 18434 --as hung --pid-file FILE

`--as`: ollama; hung (accepts, never replies); wedged (all is well but generate never replies), stuck (nor does /api/ps); stopping (a model
has been about to be unloaded for ten minutes, and generate never replies); stranger (another program's page); redirect; drip (a byte a
second); failing (500). With `--as-file` the word is read from a file at each request. What was asked is a line of `--requests FILE`.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

FOR_EVER = threading.Event()


class Handler(BaseHTTPRequestHandler):
    args: argparse.Namespace

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        args = self.args
        if args.requests:
            with open(args.requests, "a") as file:
                file.write(f"{self.command} {self.path} {body.decode()}\n")
        mode = Path(args.as_file).read_text().strip() if args.as_file else args.mode
        if (
            mode == "hung"
            or (mode in ("wedged", "stopping") and self.path == "/api/generate")
            or (mode == "stuck" and "ps" in self.path)
        ):
            FOR_EVER.wait()
        if mode == "drip":
            for _ in range(1000):
                self.wfile.write(b"H")
                time.sleep(0.05)
        if mode == "redirect":
            self.send_response(302)
            self.send_header("Location", "/login")
            self.end_headers()
            return None
        if mode in ("stranger", "failing"):
            return self.say(200 if mode == "stranger" else 500, b"<html>It works!</html>")
        when = time.time() + (-600 if mode == "stopping" else 300)
        expires = time.strftime("%Y-%m-%dT%H:%M:%S.123456789+00:00", time.gmtime(when))
        model = {
            "name": "llama3:8b",
            "model": "llama3:8b",
            "size": 5_000_000_000,
            "size_vram": 4_000_000_000,
            "expires_at": expires,
        }
        known = {
            "/": "Ollama is running",
            "/api/version": {"version": "0.12.0"},
            "/api/ps": {"models": [model]},
            "/api/tags": {"models": [model]},
            "/api/generate": {"model": "llama3:8b", "response": "!", "done": True},
            "/api/chat": {"model": "llama3:8b", "message": {"role": "assistant", "content": "I am Ollama."}, "done": True},
        }
        if self.path not in known:
            return self.say(404, b'{"error": "not found"}')
        return self.say(200, json.dumps(known[self.path]).encode())

    def say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", nargs="?")
    parser.add_argument("--port", type=int, default=urlsplit("//" + os.environ.get("OLLAMA_HOST", "")).port)
    parser.add_argument("--as", dest="mode", default="ollama")
    parser.add_argument("--as-file")
    parser.add_argument("--pid-file")
    parser.add_argument("--requests")
    Handler.args = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", Handler.args.port), Handler)
    server.daemon_threads = True
    if Handler.args.pid_file:
        Path(Handler.args.pid_file).write_text(str(os.getpid()))
    server.serve_forever()


if __name__ == "__main__":
    main()
