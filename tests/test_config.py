"""The settings: where they come from, and what is said of those that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxd import config
from mlxd.errors import ConfigError

DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"
NONE = Path("/nonexistent")
SERVICE = "[[services]]\nname = 'db'\n"


def test_each_place_overrides_the_one_before(tmp_path: Path) -> None:
    file, env = tmp_path / "config.toml", tmp_path / ".env"
    file.write_text("[server]\nport = 1\nmax_queue = 1\nmax_concurrent = 1\n[health]\nmisses = 1\n")
    env.write_text("MLX_API_PORT=2\nMLXD_SERVER_MAX_QUEUE=2\nMLX_MAX_CONCURRENT=2\n")
    found = config.load(file, [env], {"MLX_API_PORT": "3", "MLXD_SERVER_MAX_QUEUE": "3"}, {"server.port": 4})
    server = found.config.server
    assert (server.port, server.max_queue, server.max_concurrent, found.config.health.misses) == (4, 3, 2, 1)
    assert found.sources["server.port"] == "--port"
    assert found.sources["server.max_queue"] == "MLXD_SERVER_MAX_QUEUE"
    assert found.sources["server.max_concurrent"] == f"MLX_MAX_CONCURRENT in {env}"
    assert "server.drain_s" not in found.sources


def test_the_names_that_users_know_win_over_the_long_ones() -> None:
    assert config.load(NONE, [], {"MLXD_SERVER_PORT": "1", "MLX_API_PORT": "2"}).config.server.port == 2


def test_lists_commands_and_switches_are_read_from_text() -> None:
    environ = {"MLX_PRELOAD_MODELS": "a, b,", "MLXD_ENGINE_COMMAND": "python x.py --y", "MLXD_SECURITY_STRICT_HOST": "yes"}
    environ |= {"MLXD_FALLBACK_MODELS": "a=b:1, c/d = e,"}
    found = config.load(NONE, [], environ).config
    assert found.models.preload == ["a", "b"]
    assert found.engine.command == ["python", "x.py", "--y"]
    assert found.security.strict_host is True
    assert found.fallback.models == {"a": "b:1", "c/d": "e"}
    assert config.load(NONE, [], {"MLX_PRELOAD_MODELS": ""}).config.models.preload == []
    assert config.load(NONE, [], {}).config.models.preload is None


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"MLX_API_PORT": "http"}, "MLX_API_PORT must be a number, not 'http'"),
        ({"MLX_API_PORT": "1.5"}, "MLX_API_PORT"),
        ({"MLX_API_PORT": "65536"}, "MLX_API_PORT"),
        ({"MLX_HEALTH_MAX_TIME": "0"}, "MLX_HEALTH_MAX_TIME"),
        ({"MLX_HEALTH_MAX_TIME": "nan"}, "MLX_HEALTH_MAX_TIME"),
        ({"MLXD_SECURITY_STRICT_HOST": "maybe"}, "MLXD_SECURITY_STRICT_HOST must be true or false"),
        ({"MLX_API_HOST": "999.1.1.1"}, "MLX_API_HOST must be an IP address"),
        ({"OLLAMA_KEEP_ALIVE": "soon"}, "OLLAMA_KEEP_ALIVE"),
        ({"MLXD_LOG_FORMAT": "xml"}, 'MLXD_LOG_FORMAT: invalid enum value \'xml\'; it is "text" or "json"'),
        ({"MLXD_EVENTS_ON_EVENT": "sh -c 'oops"}, "MLXD_EVENTS_ON_EVENT is no command: no closing quotation"),
        (
            {"MLXD_FALLBACK_OLLAMA": "1", "OLLAMA_URL": "localhost:11434"},
            "OLLAMA_URL must be a URL such as http://localhost:11434",
        ),
        ({"MLXD_FALLBACK_OLLAMA": "1", "OLLAMA_URL": "http://localhost:port"}, "OLLAMA_URL must be a URL"),
        ({"MLXD_FALLBACK_MODELS": "a=b,c"}, "MLXD_FALLBACK_MODELS must be pairs such as name=other"),
    ],
)
def test_a_bad_variable_is_named(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        config.load(NONE, [], environ)
    assert caught.value.exit_status == 78


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[server\n", "line 1, column 8"),
        ("[sever]\n", r"unknown section \[sever\]; did you mean server\?"),
        ("[server]\nprot = 1\n", r"unknown setting server.prot; did you mean server.port\?"),
        ("server = 1\n", r"server is a section: write \[server\]"),
        ("[server]\nport = 'x'\n", "server.port"),
        ("[models]\npreload = 'a'\n", "models.preload"),
        ("[models]\nkeep_alive = 'soon'\n", "models.keep_alive"),
        ("[server]\nport = 1\nport = 2\n", "line 3"),
        ("[fallback.models]\nqwen = 3\n", "fallback.models"),
        ("[fallback]\nollama = true\n[ollama]\nurl = 'ftp://x'\n", "ollama.url in .* must be a URL"),
        ("[ollama]\nurl = 'nas'\n", "ollama.url in .* must be a URL such as"),
        ("[services]\nname = 'x'\n", r"services is a list: write \[\[services\]\]"),
        ("[service]\n", "did you mean services"),
        (SERVICE + "ownr = 'x'\n", "service 1: unknown setting ownr; did you mean owner"),
        (SERVICE + "url = 'http://x'\nowner = 'root'\n", "service 1: owner "),
        (SERVICE + "url = 'http://x'\nowner = 'app:X'\ncommand = ['x']\n", "either owner or command"),
        (SERVICE + "url = 'x'\n", "service 1: url must be a URL"),
        (SERVICE + "url = 'http://x'\nmax_actions = -1\n", "service 1: max_actions "),
        (SERVICE + "url = 'http://x'\n" + SERVICE + "url = 'http://x'\n", "service 2: there is a service db already"),
        (SERVICE, "service 1: .*url"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        config.load(file, [], {})


def test_a_pipe_in_a_files_place_is_named_and_holds_nobody_up(tmp_path: Path) -> None:
    for name in ("config.toml", ".env"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ConfigError, match="cannot read .*it is not a regular file"):
            config.load(tmp_path / "config.toml", [tmp_path / ".env"], {})
        (tmp_path / name).unlink()


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(file, [], {})


def test_services_are_read_beside_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(SERVICE + "url = 'http://localhost:1/x?y'\nowner = 'systemd:db.service'\n[server]\nport = 5\n")
    assert config.load(file, [], {}).config.server.port == 5
    (found,) = config.read_services(file)
    assert (found.name, found.url, found.owner) == ("db", "http://localhost:1/x?y", "systemd:db.service")
    assert config.read_services(NONE) == []


def test_an_empty_ollama_url_is_none() -> None:
    assert config.load(NONE, [], {"OLLAMA_URL": " "}).config.ollama.url == "http://localhost:11434"


def test_every_setting_and_every_older_name_is_in_the_documentation() -> None:
    text = DOCS.read_text()
    missing = [
        name
        for name, (s, k) in config.variables().items()
        if f"`{s}.{k}`" not in text or (name in config.NAMES and name not in text)
    ]
    assert not missing
