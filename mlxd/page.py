"""The page at /ui: three files, which hold nothing of this machine and so need no token. What they show they ask the server for.

Owns what a browser may do with them: run our script and no other, apply our style, and ask nobody but this server.
"""

from __future__ import annotations

import functools
from pathlib import Path

from mlxd.api.exchange import Exchange
from mlxd.api.service import Service

FILES = Path(__file__).with_name("web")
#: A model's output that got into the page as markup in spite of all care could still run nothing, load nothing and send nothing elsewhere.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


@functools.cache
def files() -> dict[str, bytes]:
    """All of them, read together at first use: those of one version, whatever is installed meanwhile."""
    return {name: (FILES / name).read_bytes() for name in ("index.html", "page.js", "page.css")}


async def send(exchange: Exchange, name: str, content_type: bytes) -> None:
    exchange.headers += HEADERS
    await exchange.reply(200, files()[name], content_type)


# --- the endpoints ---------------------------------------------------------------------------------------------------------------


async def document(service: Service, exchange: Exchange) -> None:
    """The page: how mlxd is, what it does, and a chat."""
    await send(exchange, "index.html", b"text/html; charset=utf-8")


async def script(service: Service, exchange: Exchange) -> None:
    """The page's script."""
    await send(exchange, "page.js", b"text/javascript; charset=utf-8")


async def style(service: Service, exchange: Exchange) -> None:
    """The page's style."""
    await send(exchange, "page.css", b"text/css; charset=utf-8")
