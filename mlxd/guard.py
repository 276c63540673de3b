"""The guard: which requests may reach a handler at all. Host, Origin, Sec-Fetch-*, Content-Type, sizes, tokens; CORS answers.

Loopback is not a trust boundary: any page in the user's browser can send requests here. So this is judged first, on raw headers and
the raw target, before a byte of the body is read. Pure: no I/O, no clock.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil

from mlxd.errors import Refused
from mlxd.tokens import Access, Tokens

Headers = list[tuple[bytes, bytes]]

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_TARGET_BYTES = 4096
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024
#: Schemes of desktop applications' own pages; extensions only when configured, file:// never (any saved page).
APP_SCHEMES = ("app", "tauri", "vscode-webview", "vscode-file")
#: `*` does not cover Authorization in browsers, so names are listed.
PREFLIGHT_HEADERS = ", ".join(
    ["authorization", "content-type", "accept", "user-agent", "x-requested-with", "openai-beta", "x-api-key"]
    + ["anthropic-version", "anthropic-beta", "anthropic-dangerous-direct-browser-access", "x-priority", "x-request-id"]
    + ["x-stainless-" + name for name in ("arch", "async", "custom-poll-interval", "helper-method", "lang", "os")]
    + ["x-stainless-" + name for name in ("package-version", "poll-helper", "retry-count", "runtime", "runtime-version", "timeout")]
).encode()

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Policy:
    """Who may come. `hosts`: names beside those of this machine. `host_check`: off when mlxd listens on more than loopback, where a token is
    needed, which a page that rebound its name has not. `own_addresses`, `own_names`: of this machine."""

    origins: tuple[str, ...] = ()
    hosts: frozenset[str] = frozenset()
    strict_host: bool = False
    host_check: bool = True
    own_addresses: frozenset[Address] = frozenset()
    own_names: frozenset[str] = frozenset()


def local_policy(origins: Iterable[str], hosts: Iterable[str], strict_host: bool, host_check: bool) -> Policy:
    """The policy on this machine, as it is now."""
    found = [address.address.partition("%")[0] for card in psutil.net_if_addrs().values() for address in card]
    addresses = frozenset(address for text in found if (address := literal(text)) is not None)
    name = socket.gethostname().lower()
    extra = frozenset(host.lower() for host in hosts)
    return Policy(tuple(origins), extra, strict_host, host_check, addresses, frozenset({name, name.partition(".")[0]} - {""}))


def literal(text: str) -> Address | None:
    """An IP address as written; an IPv4-mapped IPv6 address counts as its IPv4. None when it is none ("127.1" is a name)."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def judge(scope: Any, policy: Policy) -> Headers:
    """Headers that every answer to this request carries (CORS). Raises Refused: 400, 403, 413, 414, 415, 431."""
    headers: Headers = scope["headers"]
    named: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in named and name in SINGLE:
            raise Refused(400, f"the {name.decode()} header is there twice")
        named.setdefault(name, value)
    host = check_host(scope, named.get(b"host"), policy)
    cors = check_origin(scope, named, host, policy)
    check_sizes(scope, headers)
    check_body(named)
    return cors


#: Headers that this guard or the framing of HTTP decides on: two of them mean that somebody reads the other one.
SINGLE = (b"host", b"origin", b"content-length", b"transfer-encoding", b"content-type", b"content-encoding", b"sec-fetch-site")


def check_sizes(scope: Any, headers: Headers) -> None:
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET_BYTES:
        raise Refused(414, f"the request target is longer than {MAX_TARGET_BYTES} bytes")
    if len(headers) > MAX_HEADERS:
        raise Refused(431, f"more than {MAX_HEADERS} headers")
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise Refused(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes")


def check_host(scope: Any, raw: bytes | None, policy: Policy) -> str:
    """The Host header, lower-case. Raises Refused."""
    if not scope["raw_path"].startswith(b"/") and scope["raw_path"] != b"*":
        raise Refused(400, "the request target must be a path")
    if raw is None or not raw.strip():
        if scope["http_version"] == "1.0":
            return ""
        raise Refused(400, "the Host header is missing")
    split = split_host(raw)
    if split is None:
        raise Refused(400, "the Host header is malformed")
    name, _ = split
    if policy.host_check and not host_allowed(name, policy):
        raise Refused(
            403,
            f"Host {name[:80]!r} is not allowed, since mlxd answers to names of this machine only (DNS rebinding); "
            "if it is one, add it to [security] hosts in config.toml",
        )
    return raw.decode("ascii").lower()


def split_host(raw: bytes) -> tuple[str, int | None] | None:
    """Name (lower-case, without brackets) and port of a Host header; None when it is malformed."""
    text = raw.decode("latin-1").lower()
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", text)
    if match is None:
        return None
    name, port = match.group(1), match.group(2)
    if port is not None and int(port) > 65535:
        return None
    if name.startswith("["):
        name = name[1:-1]
        if literal(name) is None:
            return None
    return name, None if port is None else int(port)


def host_allowed(name: str, policy: Policy) -> bool:
    """A literal IP address cannot be rebound; a name can, unless nobody outside decides where it points."""
    if name in policy.hosts:
        return True
    address = literal(name)
    if address is not None:
        if address.is_unspecified:
            return False
        return address.is_loopback or address.is_private or address.is_link_local or address in policy.own_addresses
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return not policy.strict_host and (name.endswith((".internal", ".local")) or name in policy.own_names)


def check_origin(scope: Any, named: dict[bytes, bytes], host: str, policy: Policy) -> Headers:
    """CORS headers for a page that may read the answer. Raises Refused for any other page, on any method: a foreign page can send a
    POST without a preflight, and CORS alone would only keep it from reading what it has started."""
    origin = named.get(b"origin")
    if origin is not None:
        # It comes back in a header: no control character may.
        if not re.fullmatch(rb"[!-~]+", origin) or not origin_allowed(origin.decode("latin-1"), host, policy):
            raise Refused(403, "this Origin is not allowed; add it to OLLAMA_ORIGINS or to [server] origins in config.toml")
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
    site = named.get(b"sec-fetch-site", b"none").strip().lower()
    if site in (b"cross-site", b"same-site") and not harmless_visit(scope, named):
        raise Refused(403, "requests of other sites' pages are not allowed")
    return []


def harmless_visit(scope: Any, named: dict[bytes, bytes]) -> bool:
    """Following a link to our pages."""
    return scope["method"] in ("GET", "HEAD") and named.get(b"sec-fetch-mode") == b"navigate" and scope["path"] in ("/", "/ui")


def origin_allowed(origin: str, host: str, policy: Policy) -> bool:
    if any(matches(origin, pattern) for pattern in policy.origins):
        return True
    match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/?#@\s]*)", origin.lower())
    if match is None:  # "null" among others
        return False
    scheme, place = match.groups()
    if scheme in APP_SCHEMES:
        return True
    if scheme not in ("http", "https"):
        return False
    if scheme == "http" and place == host:
        return True
    split = split_host(place.encode("latin-1", "replace"))
    if split is None:
        return False
    return split[0] in ("localhost", "127.0.0.1", "::1")


def matches(origin: str, pattern: str) -> bool:
    """`*` stands for anything but a slash, as in OLLAMA_ORIGINS: "chrome-extension://*", "https://*.example.org", "*"."""
    if pattern == "*":
        return True
    words = [re.escape(word) for word in pattern.lower().rstrip("/").split("*")]
    return re.fullmatch("[^/]*".join(words), origin.lower()) is not None


def check_body(named: dict[bytes, bytes]) -> None:
    encoding = named.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b""):
        raise Refused(415, f"Content-Encoding {encoding.decode('latin-1')[:40]!r} is not supported: send the body as it is")
    length = named.get(b"content-length")
    if length is None and b"transfer-encoding" not in named:
        return
    if length is not None and b"transfer-encoding" in named:  # somebody before us may have believed the other one
        raise Refused(400, "Content-Length and Transfer-Encoding exclude each other")
    if length is not None and length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    from_page = b"origin" in named or b"sec-fetch-site" in named
    kind = named.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if from_page and length != b"0" and kind != b"application/json":
        raise Refused(415, "a page must send its body as application/json")


#: Whoever asks learns that mlxd is there and well. The page's files hold no more, and a browser opens them without a token.
OPEN = frozenset({"/health", "/health/live", "/health/ready", "/ui", "/ui/page.js", "/ui/page.css"})
#: What an inference token is good for, besides all of /v1/. A path that is not named needs an admin's, so that a new one is not open.
INFERENCE = frozenset(
    {"/", "/openapi.json", "/metrics"}
    | {f"/api/{name}" for name in ("version", "tags", "ps", "show", "generate", "chat", "embed", "embeddings")}
)


def needed(path: str) -> Access:
    """`path`: as the router takes it. What is rebuilt from Host is no base for this: Starlette's `request.url` let requests past vLLM's
    keys (CVE-2026-48746)."""
    if path in OPEN:
        return Access.NONE
    return Access.INFERENCE if path in INFERENCE or path.startswith("/v1/") else Access.ADMIN


def admit(scope: Any, tokens: Tokens | None) -> Access:
    """What the sender may do; without tokens everything. Raises Refused: 401 without a valid token, 403 if it is good for less than this."""
    if tokens is None:
        return Access.ADMIN
    access = tokens.access(scope["headers"])
    if access >= needed(scope["path"]):
        return access
    if access is Access.NONE:
        raise Refused(401, "a token is needed: `Authorization: Bearer TOKEN` or `x-api-key: TOKEN`", code="invalid_api_key")
    raise Refused(403, "this token is for inference; an admin's is needed here", code="insufficient_permissions")


def is_preflight(scope: Any) -> bool:
    return bool(scope["method"] == "OPTIONS") and any(name == b"access-control-request-method" for name, _ in scope["headers"])


#: What an allowed page may do. Access to private networks is never granted.
PREFLIGHT: Headers = [
    (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS"),
    (b"access-control-allow-headers", PREFLIGHT_HEADERS),
    (b"access-control-max-age", b"600"),
]
