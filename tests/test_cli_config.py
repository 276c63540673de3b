"""`mlxd config`: every setting, where it comes from, and nothing that is secret."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from conftest import Daemon

from mlxd.config import Config

HOOK, KEY, TOKEN, PASSWORD = "hook0123456789", "key0123456789", "token0123456789ab", "pass0123456789"
FILE = f"""
[server]
max_queue = 7
origins = ["https://a.example"]
[log]
format = "json"
[events]
on_event = "curl https://hooks.example/{HOOK}"
[[services]]
name = "backend"
url = "http://localhost:8000/health?key={KEY}"
command = ["/usr/bin/restart", "{KEY}"]
"""


@pytest.fixture
def stopped(home: Path) -> Daemon:
    """One that does not run, with settings in each place."""
    d = Daemon(home, MLX_API_PORT="11999", MLXD_LOG_FORMAT="text", OLLAMA_URL=f"http://me:{PASSWORD}@localhost:1/x")
    for name in ("MLXD_SERVER_DRAIN_S", "MLXD_SUPERVISOR_TERM_S"):
        del d.environ[name]
    d.paths.config.write_text(FILE)
    d.paths.env_file.write_text("MLXD_SERVER_DRAIN_S=3\nMLX_API_PORT=12000\n")
    d.paths.token.touch(0o600)
    d.paths.token.write_text(f"{TOKEN}\n")
    return d


def test_every_setting_is_there_with_where_it_comes_from(stopped: Daemon) -> None:
    d = stopped
    before = sorted(d.home.iterdir())
    told = json.loads(d.mlxd("config", "--json").stdout)
    sections = msgspec.to_builtins(Config())
    assert list(told["settings"]) == [f"{section}.{key}" for section in sections for key in sections[section]]
    expected = {
        "server.port": (11999, "MLX_API_PORT in the environment"),
        "server.max_queue": (7, str(d.paths.config)),
        "server.origins": (["https://a.example"], str(d.paths.config)),
        "server.drain_s": (3, f"MLXD_SERVER_DRAIN_S in {d.paths.env_file}"),
        "log.format": ("text", "MLXD_LOG_FORMAT in the environment"),
        "models.preload": (None, "default"),
        "supervisor.term_s": (10.0, "default"),
    }
    assert {name: (told["settings"][name]["value"], told["settings"][name]["from"]) for name in expected} == expected
    assert told["files"] == {str(file): True for file in (d.paths.config, d.paths.env_file, d.paths.token)}

    shown = d.mlxd("config")
    rows = {line.split()[0]: line.split(None, 1)[1] for line in shown.stdout.splitlines()}
    assert list(rows) == ["setting", *told["settings"], "services.backend"]
    assert rows["server.max_queue"].split() == ["7", str(d.paths.config)] and rows["models.preload"].split() == ["-", "default"]
    assert shown.stderr == f"read: {d.paths.config}, {d.paths.env_file} and the environment\n"
    assert sorted(d.home.iterdir()) == before


def test_no_secret_is_shown(stopped: Daemon) -> None:
    for arguments in ([], ["--json"]):
        ran = stopped.mlxd("config", *arguments)
        said = ran.stdout + ran.stderr
        assert ran.returncode == 0 and not [secret for secret in (HOOK, KEY, TOKEN, PASSWORD) if secret in said]
        assert "http://...@localhost:1/x" in said and "http://localhost:8000/health?..." in said and "curl ..." in said


def test_what_mlxd_would_refuse_to_start_with_is_78_and_named(stopped: Daemon) -> None:
    d = stopped
    d.environ["MLX_API_PORT"] = "many"
    ran = d.mlxd("config")
    assert (ran.returncode, ran.stdout, ran.stderr) == (78, "", "Error: MLX_API_PORT must be a number, not 'many'\n")
    d.environ |= {"MLX_API_PORT": "0", "MLX_API_HOST": "192.0.2.1"}
    d.paths.token.unlink()
    ran = d.mlxd("config", "--json")
    assert (ran.returncode, ran.stdout) == (78, "") and "listening on 192.0.2.1 lets other machines in" in ran.stderr
