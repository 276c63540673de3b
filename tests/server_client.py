"""The server under test: a real `python -m mlxd.server`, with a supervisor that is a thread and engines that are fake processes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
import pytest
from engine_client import EngineProcess
from gate import Gate, Passes

import mlxd
from mlxd import messages
from mlxd.config import Config
from mlxd.messages import EngineDown, EngineUp, Hello, Ready, Release, Want
from mlxd.models import BUILTIN

FAKE = Path(__file__).with_name("fake_engine.py")
#: Waiting deadlines, not expectations: the machine is noisy.
PATIENCE_S = 60.0


def until(what: str, look: Callable[[], Any], history: Callable[[], str] = lambda: "", limit_s: float = PATIENCE_S) -> Any:
    """The first true value of `look`; a failure says what was awaited and what had happened by then."""
    deadline = time.monotonic() + limit_s
    while True:
        if found := look():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit_s} s for {what}\n{history()}")
        time.sleep(0.01)


#: What the built-in model's template makes of a question.
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def said(question: str) -> Any:
    """A chat of one question, as every dialect takes it."""
    return [{"role": "user", "content": question}]


TOOL_TEMPLATE = "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}"
FILLING = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def make_model(
    directory: Path, config: dict[str, Any] | None = None, thinks: bool = False, calls: bool = False, inserts: bool = False
) -> Path:
    """Something that looks like a model of 64 parameters."""
    directory.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(256))
    (directory / "config.json").write_text(json.dumps({"model_type": "fake", "max_position_embeddings": 4096} | (config or {})))
    tags = (("<think>", "</think>") if thinks else ()) + (FILLING if inserts else ())
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": tag} for tag in tags]}))
    if calls:
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TOOL_TEMPLATE}))
    return directory


class Background:
    """A call in a thread and what came of it."""

    def __init__(self, call: Callable[[], Any]):
        self.outcome: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, args=(call,))
        self.thread.start()

    def run(self, call: Callable[[], Any]) -> None:
        try:
            self.outcome = call()
        except BaseException as error:  # handed to whoever asks for the result
            self.error = error

    def result(self) -> Any:
        self.thread.join(90)
        assert not self.thread.is_alive(), "still waiting for an answer"
        if self.error:
            raise self.error
        return self.outcome


class Engine:
    """One fake engine process."""

    released = False
    gate: Gate | None = None

    def __init__(self, number: int, model: str, home: Path):
        self.number = number
        self.model = model
        self.path = home / f"e{number}.sock"
        self.process = self.spawn(home)

    def spawn(self, home: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, FAKE, self.path, self.model], stdin=subprocess.DEVNULL)

    def up(self) -> EngineUp:
        return EngineUp(self.number, self.process.pid, self.model, str(self.gate.path if self.gate else self.path))

    def await_ready(self) -> None:
        until(f"engine {self.number}", lambda: self.path.exists() or self.process.poll() is not None)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.gate:
            self.gate.close()


def directory_of(home: Path, model: str) -> Path:
    return Path(mlxd.__file__).parent / "builtin" if model == BUILTIN else home / "models" / model.removesuffix(":latest")


def whole(directory: Path) -> bool:
    """Whether there is more than `make_model` makes."""
    tokenizer = directory / "tokenizer.json"
    return tokenizer.exists() and "model" in json.loads(tokenizer.read_bytes())


class RealEngine(Engine):
    """`python -m mlxd.engine` on the built-in model, or on one that is more than a fake."""

    def spawn(self, home: Path) -> subprocess.Popen[bytes]:
        self.real = EngineProcess(home / f"e{self.number}")
        self.path = self.real.socket_path
        self.directory = directory_of(home, self.model)
        return self.real.process

    def await_ready(self) -> None:
        with contextlib.suppress(AssertionError, OSError):  # it was killed while it loaded
            self.real.load(self.directory, self.model)

    def kill(self) -> None:
        super().kill()
        self.real.link.close()


class Server:
    """One server process and the supervisor's end of its link."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket):
        self.process = process
        self.link = link
        self.words: list[Any] = []

    def say(self, word: messages.SupervisorWord) -> None:
        with contextlib.suppress(OSError):
            self.link.sendall(messages.line(word))

    def desert(self) -> None:
        """What it sees when its supervisor is gone."""
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)


class Supervised:
    """A server and what its supervisor would do for it: engines come when wanted, go when released, and are replaced when they die.
    Engines are fake but those of whole models. `usual_cause`: of an engine that was not killed, `kill_cause`: of one that was. `next`: what
    comes after a death, `retry_s`: when, as it is told; `pause_s`: when it is "replaced". `passes`: engines stand behind a gate.

    A model whose name holds `refused` cannot be loaded, one with `retried` not before 300 s, one with `held` is wanted in vain until
    `let_up`. `refuses_pulls`: a pull ends at once, since there is no hub; else the test plays the puller.
    """

    def __init__(self, home: Path, config: Config):
        self.home = home
        self.config = config
        self.history: list[str] = []
        self.engines: list[Engine] = []
        self.held: list[str] = []
        self.ending = False
        self.usual_cause = "error"
        self.kill_cause = "killed"
        self.next: Literal["replaced", "retried", "refused"] = "replaced"
        self.retry_s = 0.0
        self.pause_s = 0.0
        self.passes: Passes | None = None
        self.refuses_pulls = True
        self.lock = threading.RLock()
        self.listeners = [listener(socket.AF_INET, 0)]
        self.port = self.listeners[0].getsockname()[1]
        with contextlib.suppress(OSError):  # no IPv6 here
            self.listeners.append(listener(socket.AF_INET6, self.port))
        self.url = f"http://127.0.0.1:{self.port}"
        self.servers: list[Server] = []
        self.start()

    # --- the server -----------------------------------------------------------------------------------------------------------

    def start(self) -> Server:
        """Another server process on the same sockets; the one before is left to itself."""
        link, theirs = socket.socketpair()
        listen = [sock.fileno() for sock in self.listeners]
        settings = {"config": self.config, "link_fd": theirs.fileno(), "slot": 0, "nonce": "n0nce", "listen_fds": listen}
        settings |= {"aliases": str(self.home / "aliases.json"), "token": str(self.home / "token")}
        settings |= {"log": str(self.home / "server.log"), "stack": str(self.home / "server.stack")}
        environment = os.environ | {"MLXD_CHILD": msgspec.json.encode(settings).decode(), "HF_HUB_CACHE": str(self.home / "hub")}
        with open(self.home / "server.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mlxd.server"],
                env=environment,
                pass_fds=[theirs.fileno(), *listen],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        theirs.close()
        server = Server(process, link)
        self.servers.append(server)
        threading.Thread(target=self.read, args=(server,), daemon=True).start()
        self.expect("hello", lambda word: isinstance(word, Hello))
        for engine in self.engines:
            if engine.process.poll() is None and not engine.released:
                self.say(engine.up())
        self.expect("ready", lambda word: isinstance(word, Ready))
        return server

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The newest."""
        return self.servers[-1].process

    @property
    def words(self) -> list[Any]:
        """What the newest has said."""
        return list(self.servers[-1].words)

    def read(self, server: Server) -> None:
        with server.link.makefile("rb") as lines, contextlib.suppress(OSError, ValueError):
            for line in lines:
                word = messages.child_words.decode(line)
                with self.lock:
                    if not isinstance(word, messages.Beat):
                        self.history.append(f"server {server.process.pid}: {word}")
                    server.words.append(word)
                if isinstance(word, Want):
                    threading.Thread(target=self.want, args=(word,), daemon=True).start()
                elif isinstance(word, messages.Fetch) and self.refuses_pulls:
                    self.say(messages.Fetched(word.name, "there is no hub here", 502))
                elif isinstance(word, Release):
                    self.release(word.model)  # before what is said after it

    def say(self, word: messages.SupervisorWord) -> None:
        """To every server."""
        with self.lock:
            self.history.append(f"supervisor: {word}")
            for server in self.servers:
                server.say(word)

    def expect(self, what: str, fits: Callable[[Any], bool]) -> Any:
        """The first word of the server that fits."""
        return until(what, lambda: next((word for word in self.words if fits(word)), None), self.told)

    def let_pass(self, beats: int) -> None:
        """Wait until the server has beaten so often: once a second, and each time it looks at all that is silent."""
        seen = self.count(messages.Beat)
        until("beats", lambda: self.count(messages.Beat) >= seen + beats, self.told)

    def emitted(self) -> int:
        """Tokens, by the newest beat."""
        return next((word.counters.emitted for word in reversed(self.words) if isinstance(word, messages.Beat)), 0)

    def count(self, kind: type) -> int:
        return sum(isinstance(word, kind) for word in self.words)

    def told(self) -> str:
        log = self.home / "server.log"
        return "\n".join([*self.history, log.read_text(errors="replace")[-4000:] if log.exists() else ""])

    # --- the engines ----------------------------------------------------------------------------------------------------------

    def want(self, word: Want) -> None:
        if "refused" in word.model:
            self.say(EngineDown(0, word.model, f"{word.model} is broken: a tensor is missing", "refused"))
        elif "retried" in word.model:
            self.say(EngineDown(0, word.model, "it died 5 times", "retried", 300.0))
        elif "held" in word.model:
            self.held.append(word.model)
        else:
            self.bring_up(word.model)

    def let_up(self) -> None:
        for model in self.held:
            self.bring_up(model)
        self.held = []

    def bring_up(self, model: str) -> None:
        with self.lock:
            if self.ending:
                return
            known = self.engine(model)
            kind = RealEngine if whole(directory_of(self.home, model)) else Engine
            engine = known or kind(len(self.engines) + 1, model, self.home)
            if known is None:
                self.engines.append(engine)
        engine.await_ready()
        if known is None and self.passes is not None:
            engine.gate = Gate(self.home / f"g{engine.number}.sock", engine.path, self.passes)
        self.say(engine.up())
        if known is None:
            threading.Thread(target=self.bury, args=(engine,), daemon=True).start()

    def bury(self, engine: Engine) -> None:
        status = engine.process.wait()
        if self.ending:
            return
        cause = "stopped" if engine.released else self.kill_cause if status == -signal.SIGKILL else self.usual_cause
        self.say(EngineDown(engine.number, engine.model, cause, "released" if engine.released else self.next, self.retry_s))
        if not engine.released and self.next == "replaced":
            time.sleep(self.pause_s)
            self.bring_up(engine.model)

    def release(self, model: str) -> None:
        if engine := self.engine(model):
            engine.released = True
            engine.process.kill()

    def engine(self, model: str) -> Engine | None:
        return next((e for e in self.engines if e.model == model and e.process.poll() is None and not e.released), None)

    # --- the client -----------------------------------------------------------------------------------------------------------

    def client(self, **options: Any) -> httpx.Client:
        """Without TLS, whose certificates take 50 ms to read, a thousand times."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False, verify=False, **options)

    def health(self) -> dict[str, Any]:
        with self.client() as client:
            return client.get("/health").json()  # type: ignore[no-any-return]

    def raw(self, request: bytes, family: int = socket.AF_INET) -> tuple[int, bytes, bytes]:
        """Status, head and body of the answer to these very bytes; status 0 when the connection was closed without one."""
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(("::1" if family == socket.AF_INET6 else "127.0.0.1", self.port))
            with contextlib.suppress(ConnectionError):
                sock.sendall(request)
            data = b""
            with contextlib.suppress(ConnectionError):
                while chunk := sock.recv(65536):
                    data += chunk
                    head, found, body = data.partition(b"\r\n\r\n")
                    length = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), None)
                    if found and length is not None and (len(body) >= length or request.startswith(b"HEAD ")):
                        break
                    if found and b" /ui/feed " in request and b"\n\n" in body:  # it has no end
                        break
        head, _, body = data.partition(b"\r\n\r\n")
        return (int(head.split(b" ")[1]) if head else 0), head, body

    # --- the end --------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self.lock:
            self.ending = True
        for server in self.servers:
            server.desert()
        for server in self.servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.terminate()
                server.process.wait(PATIENCE_S)
            server.process.kill()
            server.process.wait()
            server.link.close()
        for sock in self.listeners:
            sock.close()
        for engine in self.engines:
            engine.kill()
        log = self.home / "server.log"
        assert "Traceback" not in log.read_text(errors="replace"), self.told()


def listener(family: int, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
        sock.listen(512)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def many_files(wanted: int) -> Iterator[None]:
    """So many descriptors for this process meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def supervised(home: Path, names: tuple[str, ...] = ("tiny",), **settings: dict[str, Any]) -> Iterator[Supervised]:
    """A server with models of these names ("think", "call", "fill" in one: it can); `settings`: sections of the configuration."""
    for name in names:
        make_model(home / "models" / name, thinks="think" in name, calls="call" in name, inserts="fill" in name)
    tree = {"models": {"dir": str(home / "models"), "preload": []}}
    for section, keys in settings.items():
        tree[section] = tree.get(section, {}) | keys
    server = Supervised(home, msgspec.convert(tree, Config))
    try:
        yield server
    finally:
        server.close()
