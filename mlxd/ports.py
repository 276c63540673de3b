"""The public port: holding it on both loopbacks, telling who else does, and leaving it to a server or answering on it ourselves.

The supervisor owns these sockets for its whole life, so that connections wait in the backlog while a server is replaced: 20 clients
saw 0 refusals over a restart, against 1,580 to 1,700 when the child binds for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil

from mlxd.config import Server
from mlxd.errors import ConfigError, MlxdError
from mlxd.standin import StandIn

log = logging.getLogger(__name__)

#: macOS caps it there; asyncio accepts up to this many at a time.
BACKLOG = 128


class PortTaken(MlxdError):
    """Somebody else listens there; the text says who."""

    exit_status = 75


class Port:
    """`problem`: why we do not have it, in words; "" while we do. `standin` answers while no server accepts."""

    def __init__(self, standin: StandIn):
        self.standin = standin
        self.sockets: list[socket.socket] = []
        self.problem = ""
        self.unserved: asyncio.TimerHandle | None = None  # runs since the last server stopped accepting

    def open(self, server: Server) -> None:
        """Take the port, or say in `problem` why not."""
        try:
            self.sockets, self.problem = bind(server), ""
            log.info("listening on %s", self.url(server))
        except (PortTaken, ConfigError) as error:
            if str(error) != self.problem:
                log.warning("%s; mlxd starts by itself when that ends", error)
            self.problem = str(error)

    def move(self, server: Server, host: str) -> None:
        """Take another port instead of this one; the old sockets live on in the old server until it has drained. Raises PortTaken or
        ConfigError, and then nothing has changed. `host`: the one in force."""
        if self.sockets and server.port == self.number(server):
            if server.host == host:  # it was any free one, and now has a name
                return
            raise ConfigError(
                f"mlxd itself holds port {server.port}; another host on it takes effect after `mlxd stop` and `mlxd start`"
            )
        sockets = bind(server)
        self.close()
        self.sockets = sockets
        log.info("listening on %s", self.url(server))

    def leave(self) -> None:
        """A server accepts now, or nobody is to."""
        self.standin.close()
        if self.unserved is not None:
            self.unserved.cancel()
            self.unserved = None

    def miss(self, takeover_s: float) -> None:
        """No server accepts; after `takeover_s` of that we answer for ourselves. Saying it again changes nothing."""
        if self.unserved is None and self.sockets:
            self.answer_from(asyncio.get_running_loop().time() + takeover_s)

    def answer_from(self, when: float) -> None:
        """Answer for ourselves from this moment on, of the loop's clock."""
        self.leave()
        self.unserved = asyncio.get_running_loop().call_at(when, self.standin.open, self.sockets)

    def resume(self) -> None:
        """Go on answering, if we had closed for a while."""
        if self.unserved is not None:
            self.answer_from(self.unserved.when())

    def close(self) -> None:
        self.leave()
        for sock in self.sockets:
            sock.close()
        self.sockets = []

    def number(self, server: Server) -> int:
        return int(self.sockets[0].getsockname()[1]) if self.sockets else server.port

    def address(self, server: Server) -> str:
        """Where we are reached."""
        return reached(self.sockets[0].getsockname()[0] if self.sockets else server.host)

    def url(self, server: Server) -> str:
        return url(self.address(server), self.number(server))


def reached(host: str) -> str:
    """Where a server that listens on `host` is reached: on a wildcard address by the loopback of its family."""
    return {"": "127.0.0.1", "localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bind(server: Server) -> list[socket.socket]:
    """Listening, non-blocking sockets for the configured address: 127.0.0.1 and ::1 by default, port 0 for any free one, the same on both.

    Raises PortTaken when a stranger is there (on ::1 alone, too: clients that resolve localhost to ::1 would talk to it), ConfigError for an
    address that is not ours.
    """
    if server.host not in ("", "localhost"):
        return [listen(family(server.host), server.host, server.port)]
    if server.port:
        return both_loopbacks(server.port)
    for _ in range(20):  # the free port of one family may be taken in the other
        with contextlib.suppress(PortTaken):
            return both_loopbacks(0)
    raise PortTaken("no port is free on both 127.0.0.1 and ::1")


def both_loopbacks(port: int) -> list[socket.socket]:
    first = listen(socket.AF_INET, "127.0.0.1", port)
    try:
        return [first, listen(socket.AF_INET6, "::1", first.getsockname()[1])]
    except ConfigError as error:
        log.warning("no IPv6 on this machine: %s", error)
        return [first]
    except PortTaken:
        first.close()
        raise


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listen(kind: socket.AddressFamily, host: str, port: int) -> socket.socket:
    try:
        sock = socket.socket(kind, socket.SOCK_STREAM)
    except OSError as error:  # the kernel has no such family
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from error
    try:
        # macOS lets a specific address be bound beside a stranger's wildcard: ask by connecting first.
        if port and answers(kind, host, port):
            raise PortTaken(f"port {port} is held by {holder(port)}")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if kind == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except PortTaken:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(f"port {port} is held by {holder(port)}") from error
        hint = "ports below 1024 need root; choose another MLX_API_PORT" if error.errno == errno.EACCES else "check MLX_API_HOST"
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; {hint}") from error
    return sock


def answers(kind: socket.AddressFamily, host: str, port: int) -> bool:
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0


def holder(port: int) -> str:
    """Who listens on `port`: "pid 4711 (nc)", or "a process of another user" where the system does not tell."""
    with contextlib.suppress(psutil.Error):
        if (process := listener(port)) is not None:
            return f"pid {process.pid} ({process.name()})"
    return "a process of another user"


def listener(port: int) -> psutil.Process | None:
    """Who listens on `port` beside ourselves; None when nobody does or the system does not tell."""
    for pid, connection in connections():
        # Our own socket on the other loopback is listening on this number, too.
        if (
            pid
            and pid != os.getpid()
            and connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
        ):
            with contextlib.suppress(psutil.Error):
                return psutil.Process(pid)
    return None


def connections() -> Iterator[tuple[int | None, Any]]:
    """Every TCP socket that we may see, with its process. macOS shows all of them to root only; our own processes can be asked."""
    try:
        for connection in psutil.net_connections("tcp"):
            yield connection.pid, connection
    except psutil.Error:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                for owned in process.net_connections("tcp"):
                    yield process.pid, owned
