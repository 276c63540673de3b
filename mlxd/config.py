"""The settings: a frozen Config and where each value came from. The only defaults, and the only reader of the environment.

defaults < config.toml < .env < environment < flags. A value that cannot be used is a ConfigError that names it.
"""

from __future__ import annotations

import difflib
import functools
import ipaddress
import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from mlxd import blas, paths
from mlxd.endpoint import OLLAMA, base_url, checked_url
from mlxd.errors import ConfigError

Seconds = Annotated[float, Meta(ge=0, le=1e9)]
#: Of something that happens at each request.
Deadline = Annotated[float, Meta(gt=0, le=1e9)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Port = Annotated[int, Meta(ge=0, le=65535)]
#: Go's notation, as Ollama's keep_alive has it ("5m", "1h30m"), or a number of seconds; negative: for ever.
Duration = Annotated[str, Meta(pattern=r"^[-+]?(\d+(\.\d+)?|(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+)$")]

HostName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]+$")]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Server(Section, frozen=True):
    """The HTTP side. `command`: None for mlxd's own server; tests put a misbehaving one there."""

    port: Port = 11435
    host: str = ""  # "" is 127.0.0.1 and ::1
    command: list[str] | None = None
    max_concurrent: Annotated[int, Meta(ge=1, le=1024)] = 32
    max_queue: Count = 512
    queue_wait_s: Seconds = 120.0
    request_s: Seconds = 3600.0
    head_s: Deadline = 5.0
    body_s: Deadline = 30.0
    write_stall_s: Deadline = 30.0
    max_idle: Count = 256
    upload_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024
    drain_s: Seconds = 30.0
    poison_s: Seconds = 600.0
    ping_s: Seconds = 15.0  # proxies give up on a stream that is silent for 60 s
    origins: list[str] = []

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("", "localhost") or ipaddress.ip_address(self.host).is_loopback


class Models(Section, frozen=True):
    dir: str = "~/mlx-models"
    #: None: mlxd-tiny while no other model exists.
    preload: list[str] | None = None
    pin: list[str] = []
    max_cached: Count = 0  # 0: by memory
    keep_alive: Duration = "5m"
    context_length: Count = 0  # 0: the model's own


class Engine(Section, frozen=True):
    """`command`: None for mlxd's own engine. `blas`: stock, auto or a library's path. `prefill_tokens`: prompt tokens per step over all
    rows together (8 rows x 512, mlx-lm's way, stall every stream for 2-7 s). `text_s`: template and tokenising of one request."""

    command: list[str] | None = None
    blas: str = blas.STOCK
    prefill_tokens: Annotated[int, Meta(ge=16, le=65536)] = 512
    text_s: Seconds = 2.0
    cache_bytes: Annotated[int, Meta(ge=0)] = 0  # 0: half of the weights, or one whole context
    memory_limit: Annotated[int, Meta(ge=0)] = 0  # bytes for all engines; 0: 75 % of RAM


class Supervisor(Section, frozen=True):
    """Deadlines of children. Every number is a default that a test may shorten; none is a clock that a test patches."""

    hello_s: Seconds = 20.0
    load_stall_s: Seconds = 300.0
    term_s: Seconds = 10.0
    kill_s: Seconds = 10.0
    takeover_s: Seconds = 2.0
    backoff_first_s: Seconds = 0.5
    backoff_most_s: Seconds = 60.0
    healthy_s: Seconds = 600.0
    deaths: Annotated[int, Meta(ge=1, le=1000)] = 5
    window_s: Seconds = 900.0
    cooldown_s: Seconds = 300.0
    hold_s: Seconds = 5.0  # how often the cause of a HELD is looked at again
    replace_drain_s: Seconds = 600.0
    #: A spare engine (79 MB, its imports done) is kept while this much memory is available.
    spare_bytes: Annotated[int, Meta(ge=0)] = 1024 * 1024 * 1024
    log_bytes: Annotated[int, Meta(ge=64 * 1024)] = 50 * 1024 * 1024
    log_keep_bytes: Annotated[int, Meta(ge=0)] = 1024 * 1024
    keep_awake: bool = False


class Health(Section, frozen=True):
    interval_s: Annotated[float, Meta(gt=0, le=3600)] = 5.0
    max_time_s: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    misses: Annotated[int, Meta(ge=1, le=5)] = 3
    suspect_s: Seconds = 5.0
    frozen_s: Seconds = 15.0
    frozen_loading_s: Seconds = 60.0
    stalled_s: Seconds = 60.0  # beats go on, work is in hand, and no counter moves
    stalled_prefill_s: Seconds = 120.0
    canary_s: Seconds = 300.0  # an engine that has ended nothing for so long gives a token of its own; 0: never
    silent_s: Seconds = 300.0
    lag_s: Seconds = 1.0  # a server whose loop lags less than this and that beats is saturated, not dead


class RateLimit(Section, frozen=True):
    """Requests a client may make in a window; 0: off."""

    max: Count = 0
    window_s: Seconds = 60.0


class Security(Section, frozen=True):
    """`hosts`: names beside those of this machine by which it may be called. `allow_remote`: without it, and a token, mlxd listens on
    loopback alone."""

    strict_host: bool = False
    hosts: list[HostName] = []
    allow_remote: bool = False


class Log(Section, frozen=True):
    format: Literal["text", "json"] = "text"


class Events(Section, frozen=True):
    """`on_event`: a command in a shell's words, without a shell; "": none. `limit_s`: how long it may take."""

    on_event: str = ""
    limit_s: Seconds = 10.0


class Fallback(Section, frozen=True):
    """Ollama answers for models that it has and mlxd has not. `models`: a model of mlxd's -> the one of Ollama's that answers in its place
    while it cannot be loaded."""

    ollama: bool = False
    models: dict[str, str] = {}


class Ollama(Section, frozen=True):
    """The neighbour. `wanted`: `mlxd check` minds whether it is up; so it does with `recover`, by which `mlxd recover` may repair it.
    `probe`: a token of a model that it has loaded is asked for, too. `make_room`: it is asked to unload its models where one of mlxd's would
    not fit beside them."""

    url: str = OLLAMA
    recover: bool = False
    wanted: bool = False
    probe: bool = False
    make_room: bool = False


class Recovery(Section, frozen=True):
    """`silent_s`: a supervisor that answers nobody for so long is ended. `settle_s`: what was restarted answers by then. The counts: of one
    service within an hour, by `mlxd recover` and by `mlxd monitor`."""

    silent_s: Seconds = 30.0
    settle_s: Seconds = 30.0
    max_actions: Count = 3
    max_restarts: Count = 5


class Config(Section, frozen=True):
    server: Server = Server()
    models: Models = Models()
    engine: Engine = Engine()
    supervisor: Supervisor = Supervisor()
    health: Health = Health()
    rate_limit: RateLimit = RateLimit()
    security: Security = Security()
    log: Log = Log()
    events: Events = Events()
    ollama: Ollama = Ollama()
    fallback: Fallback = Fallback()
    recovery: Recovery = Recovery()


class Service(Section, frozen=True):
    """One of `[[services]]`: something else that is to be up. `url` answers with a status below 300 when it is. `owner`: who restarts it
    ("systemd:NAME", "launchd:LABEL", "brew:NAME", "app:NAME"), or `command` does; neither: it is only looked at."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    url: str
    owner: Annotated[str, Meta(pattern=r"^(systemd|launchd|brew|app):[A-Za-z0-9@][A-Za-z0-9@:._ -]*$")] | None = None
    command: Annotated[list[str], Meta(min_length=1)] | None = None
    max_actions: Count | None = None  # in an hour; None: as of the others


def of_server(config: Config) -> object:
    """What a server reads of it: equal for two configurations between which it need not be replaced."""
    at_requests = config.server, config.models, config.rate_limit, config.security, config.log, config.fallback
    return *at_requests, config.ollama.url, config.ollama.make_room, config.health.silent_s, config.engine.memory_limit


def of_engine(config: Config) -> object:
    """What an engine reads of it."""
    return config.engine, config.log, config.server.max_concurrent, config.health.canary_s


def for_engine(config: Config) -> Config:
    """Without what may hold a secret and is no engine's business: a webhook's command, a neighbour's URL."""
    return msgspec.structs.replace(config, events=Events(), ollama=Ollama())


#: The names that users already have in their environment. Any other setting is MLXD_ + section + _ + key.
NAMES = {
    "MLX_API_PORT": ("server", "port"),
    "MLX_API_HOST": ("server", "host"),
    "MLX_MODELS_DIR": ("models", "dir"),
    "MLX_PRELOAD_MODELS": ("models", "preload"),
    "MLX_MAX_CONCURRENT": ("server", "max_concurrent"),
    "MLX_MAX_CACHED_MODELS": ("models", "max_cached"),
    "MLX_QUEUE_WAIT_TIMEOUT": ("server", "queue_wait_s"),
    "MLX_HEALTH_MAX_TIME": ("health", "max_time_s"),
    "MLX_RATE_LIMIT_MAX": ("rate_limit", "max"),
    "MLX_RATE_LIMIT_WINDOW": ("rate_limit", "window_s"),
    "OLLAMA_URL": ("ollama", "url"),
    "OLLAMA_ORIGINS": ("server", "origins"),
    "OLLAMA_KEEP_ALIVE": ("models", "keep_alive"),
    "OLLAMA_CONTEXT_LENGTH": ("models", "context_length"),
}

LISTS = {("models", "preload"), ("models", "pin"), ("server", "origins"), ("security", "hosts")}
PAIRS = {("fallback", "models")}
COMMANDS = {("server", "command"), ("engine", "command")}


@functools.cache  # 3 ms, which a storm of SIGHUP would cost the supervisor each time
def variables() -> dict[str, tuple[str, str]]:
    """Every environment variable that is a setting -> its section and key."""
    found = {
        f"MLXD_{section.name}_{key.name}".upper(): (section.name, key.name)
        for section in msgspec.structs.fields(Config)
        for key in msgspec.structs.fields(section.type)
    }
    return found | NAMES


class Loaded(Struct, frozen=True):
    """A Config and, per dotted name that is not a default, the place it came from."""

    config: Config
    sources: dict[str, str]


def load(
    config_file: Path,
    env_files: list[Path],
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> Loaded:
    """The effective configuration.

    `env_files`: later ones win; missing files are fine, in either place. `flags`: dotted name -> value.
    Raises ConfigError, exit status 78: a syntax error names line and column, an unknown key its dotted name and the nearest
    known one, a bad value the variable or the dotted name.
    """
    tree: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}

    def put(section: str, key: str, value: Any, source: str) -> None:
        tree.setdefault(section, {})[key] = value
        sources[f"{section}.{key}"] = source

    for section, keys in read_toml(config_file).items():
        for key, value in keys.items():
            put(section, key, value, f"{section}.{key} in {config_file}")
    known = variables()
    for source, values in [*((str(f), read_env(f)) for f in env_files), ("environment", environ)]:
        # The names that users know are read last: MLX_API_PORT wins over MLXD_SERVER_PORT of the same place.
        for name in sorted(known.keys() & values.keys(), key=lambda n: n in NAMES):
            place = name if source == "environment" else f"{name} in {source}"
            section, key = known[name]
            if name == "OLLAMA_URL" and not values[name].strip():
                continue
            put(section, key, from_text(section, key, values[name], place), place)
    for dotted, value in (flags or {}).items():
        section, key = dotted.split(".")
        put(section, key, value, f"--{key.replace('_', '-')}")
    settings = build(tree, sources)
    check_host(settings.server.host, sources.get("server.host", ""))
    check_command(settings.events.on_event, sources.get("events.on_event", ""))
    blas.check(settings.engine.blas, sources.get("engine.blas", ""))
    base_url(settings.ollama.url, sources.get("ollama.url", ""))
    return Loaded(settings, sources)


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of config.toml, checked for unknown names; {} without a file."""
    tables = parse_toml(path)
    to_services(path, tables.pop("services", []))
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    for section, keys in tables.items():
        if section not in sections:
            raise ConfigError(f"{path}: unknown section [{section}]{nearest(section, [*sections, 'services'])}")
        if not isinstance(keys, dict):
            raise ConfigError(f"{path}: {section} is a section: write [{section}] and its settings below it")
        known = [field.name for field in msgspec.structs.fields(sections[section])]
        for key in keys:
            if key not in known:
                raise ConfigError(f"{path}: unknown setting {section}.{key}{nearest(key, known, section + '.')}")
    return tables


def parse_toml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # its text ends with "(at line 3, column 7)"
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def read_text(path: Path) -> str:
    """Of a regular file, whosever it is, a link to one included. Raises OSError, UnicodeDecodeError."""
    with os.fdopen(paths.open_regular(path, os.O_RDONLY), encoding="utf-8") as file:
        return file.read()


def read_services(path: Path) -> list[Service]:
    """The `[[services]]` of config.toml. Raises ConfigError. The daemon has no use for them."""
    return to_services(path, parse_toml(path).get("services", []))


def to_services(path: Path, tables: Any) -> list[Service]:
    if not isinstance(tables, list):
        raise ConfigError(f"{path}: services is a list: write [[services]] above each")
    known = [field.name for field in msgspec.structs.fields(Service)]
    services: list[Service] = []
    for number, table in enumerate(tables, 1):
        for key in table if isinstance(table, dict) else ():
            if key not in known:
                raise ConfigError(f"{path}: service {number}: unknown setting {key}{nearest(key, known)}")
        try:
            one = msgspec.convert(table, Service)
        except msgspec.ValidationError as error:
            sentence, _, where = str(error).partition(" - at `$.")
            raise ConfigError(f"{path}: service {number}: {where.rstrip('`')} {sentence[0].lower()}{sentence[1:]}") from error
        checked_url(one.url, f"{path}: service {number}: url")
        if one.name in ("mlx", "ollama", *(other.name for other in services)):
            raise ConfigError(f"{path}: service {number}: there is a service {one.name} already; choose another name")
        if one.owner and one.command:
            raise ConfigError(f"{path}: service {number}: either owner or command restarts it, not both")
        services.append(one)
    return services


def nearest(name: str, known: Any, prefix: str = "") -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{match[0]}?" if match else f"; known are {', '.join(sorted(known))}"


def read_env(path: Path) -> Mapping[str, str]:
    """The variables of a .env file; {} without one."""
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    import dotenv  # 12 ms, and most have no such file

    return {k: v for k, v in dotenv.dotenv_values(stream=StringIO(text), interpolate=False).items() if v is not None}


def from_text(section: str, key: str, text: str, place: str) -> Any:
    """An environment variable's text as the value its setting has."""
    if (section, key) in LISTS:
        return [part.strip() for part in text.split(",") if part.strip()]
    if (section, key) in PAIRS:
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if not all(name.strip() and value.strip() for name, _, value in pairs):
            raise ConfigError(f"{place} must be pairs such as name=other,name2=other2, not {text!r}")
        return {name.strip(): value.strip() for name, _, value in pairs}
    if (section, key) in COMMANDS:
        return text.split()
    text = text.strip()
    kind = type(getattr(getattr(Config(), section), key))
    if kind is bool:
        if text.lower() not in ("1", "0", "true", "false", "yes", "no"):
            raise ConfigError(f"{place} must be true or false, not {text!r}")
        return text.lower() in ("1", "true", "yes")
    if kind is str:
        return text
    if not re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", text):
        raise ConfigError(f"{place} must be a number, not {text!r}")
    number = float(text)
    return int(number) if kind is int and number.is_integer() else number


def check_host(host: str, place: str) -> None:
    """Raises ConfigError unless `host` is an address, or "" or localhost for both loopbacks."""
    if host in ("", "localhost"):
        return
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"{place} must be an IP address such as 127.0.0.1, not {host!r}") from None


def check_command(command: str, place: str) -> None:
    """Raises ConfigError unless a shell could tell its words apart."""
    try:
        shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{place} is no command: {str(error).lower()}") from None


def build(tree: dict[str, dict[str, Any]], sources: dict[str, str]) -> Config:
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        sentence, _, where = str(error).partition(" - at `$.")
        dotted = re.match(r"[a-z_]+\.[a-z_]+", where)
        place = sources.get(dotted.group(), dotted.group()) if dotted else where.rstrip("`")
        if "matching regex" in sentence:
            host = where.startswith("security.hosts")
            sentence = "expected a name without a port" if host else 'expected a duration such as "5m", "1h30m" or "-1"'
        if "enum value" in sentence:
            sentence = f'{sentence}; it is "text" or "json"'
        raise ConfigError(f"{place}: {sentence[0].lower()}{sentence[1:]}") from error
