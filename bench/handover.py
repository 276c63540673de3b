"""Restarts under load: what do clients notice while `mlxd restart` and `mlxd restart --supervisor` replace everything but the engine?

Clients ask the built-in model, half of them on a fresh connection for each request, half on one that they keep; answers are compared with the
undisturbed ones. Exit status 1 when a request was refused, reset, lost or answered wrongly. A reset is whatever ends a connection before its
answer has begun: a kept connection that is closed without `Connection: close` in the last answer counts, too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections import Counter

from daemon import Daemon, daemon

QUESTIONS = ("What is mlxd?", "What is MLX?", "Why was mlxd made?", "How do I restart mlxd?")
#: Longer than any answer takes; whoever waits so long has lost his.
PATIENCE_S = 120.0


def ask(connection: http.client.HTTPConnection, question: str, stream: bool) -> str:
    """The answer. Raises OSError, http.client.HTTPException, ValueError (no answer, or not all of it)."""
    messages = [{"role": "user", "content": question}]
    body = {"model": "mlxd-tiny", "messages": messages, "options": {"temperature": 0}, "stream": stream}
    connection.request("POST", "/api/chat", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    lines = [json.loads(line) for line in response.read().splitlines()]
    if response.status != 200 or not lines[-1].get("done"):
        raise ValueError(f"status {response.status}: {lines[-1:]}")
    return "".join(line["message"]["content"] for line in lines)


class Client(threading.Thread):
    """Asks until it is told to stop."""

    def __init__(self, number: int, port: int, answers: dict[str, str], stop: threading.Event) -> None:
        super().__init__()
        self.number = number
        self.port = port
        self.answers = answers
        self.stop = stop
        self.keeps = number % 2 == 1
        self.counts: Counter[str] = Counter()
        self.longest_s = 0.0
        self.troubles: list[str] = []

    def run(self) -> None:
        connection = self.connect()
        while not self.stop.is_set():
            question = QUESTIONS[self.counts["requests"] % len(QUESTIONS)]
            self.counts["requests"] += 1
            begun = time.perf_counter()
            try:
                answer = ask(connection, question, stream=self.number % 4 < 2)
                kind = "right" if answer == self.answers[question] else "wrong"
                trouble: object = answer
            except ConnectionRefusedError as error:
                kind, trouble = "refused", error
            except ConnectionError as error:  # RemoteDisconnected is one
                kind, trouble = "reset", error
            except (OSError, http.client.HTTPException, ValueError) as error:
                kind, trouble = "lost", error
            self.counts[kind] += 1
            self.longest_s = max(self.longest_s, time.perf_counter() - begun)
            if kind != "right":
                self.troubles.append(f"{kind}: {type(trouble).__name__} {trouble}")
            if kind != "right" or not self.keeps:
                connection.close()
                connection = self.connect()
        connection.close()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)


def restarts(of_server: int, of_supervisor: int) -> list[tuple[str, ...]]:
    """The commands, those of the supervisor spread among the others."""
    places = {round((n + 0.5) * of_server / max(1, of_supervisor)) for n in range(of_supervisor)}
    words: list[tuple[str, ...]] = []
    for n in range(of_server + 1):
        words += [("restart", "--supervisor")] * (n in places) + [("restart",)] * (n < of_server)
    return words + [("restart", "--supervisor")] * (of_supervisor - len(places))


def measure(one: Daemon, count: int, commands: list[tuple[str, ...]]) -> list[Client]:
    port = one.status()["port"]
    quiet = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    answers = {question: ask(quiet, question, stream=False) for question in QUESTIONS}
    quiet.close()
    stop = threading.Event()
    clients = [Client(number, port, answers, stop) for number in range(count)]
    for client in clients:
        client.start()
    try:
        for words in commands:
            one.command(*words)
            asked = [client.counts["requests"] for client in clients]
            end = time.monotonic() + PATIENCE_S
            while any(c.counts["requests"] == before for c, before in zip(clients, asked, strict=True)) and time.monotonic() < end:
                time.sleep(0.01)  # until each client has gone on
    finally:
        stop.set()
        for client in clients:
            client.join()
    return clients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20, help="how many at once")
    parser.add_argument("--server", type=int, default=20, help="restarts of the server")
    parser.add_argument("--supervisor", type=int, default=5, help="restarts of the supervisor")
    how = parser.parse_args()
    with daemon() as one:
        one.command("start")
        before = one.status()
        begun = time.perf_counter()
        clients = measure(one, how.clients, restarts(how.server, how.supervisor))
        seconds = time.perf_counter() - begun
        after = one.status()
    counts = sum((client.counts for client in clients), Counter())
    print(
        f"{how.clients} clients, {sum(client.keeps for client in clients)} of them on kept connections; "
        f"{how.server} restarts of the server, {how.supervisor} of the supervisor in {seconds:.0f} s"
    )
    words = [f"{kind} {counts[kind]}" for kind in ("requests", "refused", "reset", "lost", "wrong")]
    print("  ".join([*words, f"longest wait {max(client.longest_s for client in clients):.2f} s"]))
    stayed = [before["supervisor"]["pid"], before["engines"][0]["pid"]] == [after["supervisor"]["pid"], after["engines"][0]["pid"]]
    print(f"supervisor and engine {'are the same processes' if stayed else 'are NOT the same processes'} as before")
    for trouble in [trouble for client in clients for trouble in client.troubles][:10]:
        print(trouble, file=sys.stderr)
    return 0 if stayed and counts["requests"] == counts["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
