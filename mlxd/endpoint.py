"""Where a program finds its server: MLX_API_URL and OLLAMA_URL, from the environment or a `.env` file, and the first of both that is well.

    from mlxd import endpoint
    endpoint.resolve().url                       # "http://localhost:11434" unless MLX_API_URL says otherwise
    endpoint.Client().call("/api/chat", {...})   # MLX if it is well, else Ollama

For any program: imports neither mlx nor any package, asks nobody before it is used, starts nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlxd import paths, probe
from mlxd.errors import ConfigError, MlxdError, NotRunning

#: Ollama's own default.
OLLAMA = "http://localhost:11434"
#: What a `.env` of the working directory, which may have come with somebody's repository, has no say in.
NOT_FROM_HERE = re.compile(r"MLXD_HOME|MLX_API_HOST|MLXD_SERVER_HOST|MLXD_SECURITY_.*")
#: What no URL holds: blanks, control characters, and what a shell or HTML would make something of.
NOT_IN_URL = re.compile(r"[\x00-\x20\x7f\"<>\\^`{|}]")
#: Of a URL, in any text: a name and a password, whatever is in them.
WHO = re.compile(r"(?<=://)[^\s\"<>]*@")


@dataclass(frozen=True)
class Endpoint:
    """Base URLs without a final slash. `mlx`: None unless MLX_API_URL selects it."""

    mlx: str | None
    ollama: str

    @property
    def url(self) -> str:
        """The one to use."""
        return self.mlx or self.ollama

    @property
    def urls(self) -> list[str]:
        """The one to use first, then the other."""
        return [self.mlx, self.ollama] if self.mlx else [self.ollama]


def resolve(environ: Mapping[str, str] = os.environ) -> Endpoint:
    """What the environment and the `.env` files say. Raises ConfigError, which names the variable, for what is no URL."""
    found = environment(environ)
    return Endpoint(mlx_of(found), ollama_of(found))


def mlx_of(found: Mapping[str, str]) -> str | None:
    """MLX_API_URL, None where it is not set or turned off. Raises ConfigError."""
    return None if is_off(found) or "MLX_API_URL" not in found else base_url(found["MLX_API_URL"], "MLX_API_URL")


def ollama_of(found: Mapping[str, str]) -> str:
    """OLLAMA_URL; an empty one is none. Raises ConfigError."""
    return base_url(found.get("OLLAMA_URL", "").strip() or OLLAMA, "OLLAMA_URL")


def is_off(found: Mapping[str, str]) -> bool:
    """Whether MLX_API_URL turns MLX off: empty, or `disabled`."""
    return found.get("MLX_API_URL", "on").strip().lower() in ("", "disabled")


def checked_url(text: str, place: str) -> str:
    """`text`, if it is a URL that can be asked. Raises ConfigError, which names `place`."""
    try:
        parts = urlsplit(text)
        well = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not NOT_IN_URL.search(text)
    except ValueError:  # a port that is no number, a bracket left open
        well = False
    if not well:
        raise ConfigError(f"{place} must be a URL such as http://localhost:11434, not {anonymous(text)!r}")
    return text


def base_url(text: str, place: str) -> str:
    """`text` as the part of a URL before `/api`. Raises ConfigError, which names `place`."""
    url = checked_url(text.strip().rstrip("/"), place)
    if "?" in url or "#" in url:
        raise ConfigError(f"{place} must be a URL without ? and #, not {anonymous(text)!r}")
    return url


def anonymous(url: str) -> str:
    """Without a name and a password, which are nobody's business that it is shown to."""
    return WHO.sub("", url)


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables as a command or a program sees them: the configuration directory's `.env` < the working directory's < `environ`."""
    from_here = {name: value for name, value in read_env(Path(".env")).items() if not NOT_FROM_HERE.fullmatch(name)}
    return {**read_env(paths.locate(environ).env_file), **from_here, **environ}


def read_env(file: Path) -> Mapping[str, str]:
    if not file.is_file():
        return {}
    from mlxd import config  # 40 ms, and most have no such file

    return config.read_env(file)


class Client:
    """Asks the first of MLX and Ollama that is well, anew for each call: a server that ends is left, and one that comes back is found."""

    def __init__(self, endpoint: Endpoint | None = None, timeout_s: float = 600.0, look_s: float = 2.0):
        """`endpoint`: None for `resolve()`. `timeout_s`: of an answer. `look_s`: a server that has not said by then that it is well is not."""
        self.endpoint = endpoint or resolve()
        self.timeout_s = timeout_s
        self.look_s = look_s

    def url(self) -> str:
        """The base URL to use now. Raises NotRunning."""
        for url in self.endpoint.urls:
            if self.is_well(url):
                return url
        raise NotRunning(f"no server answers at {' or '.join(self.endpoint.urls)}; start mlxd with `mlxd start`, or Ollama")

    def is_well(self, url: str) -> bool:
        """MLX: a request sent now would be served. Ollama tells no more than that it is there."""
        try:
            path = "/health" if url == self.endpoint.mlx else "/api/version"
            return probe.fetch(url + path, self.look_s).status == 200
        except probe.NoReply:
            return False

    def call(self, path: str, body: Any = None) -> Any:
        """GET, or POST of `body` as JSON; the answer, from JSON. Raises NotRunning, or MlxdError with the server's own words."""
        from http.client import HTTPException
        from urllib import error, request  # 40 ms

        opener = request.build_opener(request.ProxyHandler({}))  # a proxy for the world does not know our localhost
        asked = request.Request(self.url() + path, headers={"Content-Type": "application/json"})
        try:
            with opener.open(asked, None if body is None else json.dumps(body).encode(), self.timeout_s) as answer:
                return json.load(answer)
        except error.HTTPError as refused:
            raise MlxdError(
                f"{asked.full_url} answers {refused.code}: {refused.read().decode(errors='replace').strip()}"
            ) from refused
        except (OSError, HTTPException) as failed:
            raise MlxdError(f"{asked.full_url} did not answer: {getattr(failed, 'reason', failed)}") from failed
        except ValueError as failed:
            raise MlxdError(f'{asked.full_url} answers with what is not one JSON value; ask with "stream": false') from failed
