"""`mlxd list`, `show`, `ps`, `load`, `unload`, `cp`, `alias` and `rm`: on the disk without a daemon, and through the server of a real one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Daemon, eventually, http
from server_client import make_model
from test_mlxd import real_settings

import mlxd
from mlxd import paths
from mlxd.cli import store
from mlxd.lock import flocked

BUILTIN = Path(mlxd.__file__).parent / "builtin"
INFERENCE, ADMIN = "inference-0123456789", "admin-0123456789abc"


def column(table: str, heading: str) -> list[str]:
    """Of a table for people: what stands below a heading."""
    head, *rows = table.splitlines()
    at = head.index(heading)
    return [row[at:].partition("  ")[0].strip() for row in rows]


def answered(daemon: Daemon, command: list[str], keys: bytes) -> tuple[int, str, str]:
    """Of a command that asks at a terminal: status, stdout, stderr."""
    ours, theirs = pty.openpty()
    os.write(ours, keys)
    words = [sys.executable, "-m", "mlxd", *command]
    ran = subprocess.run(words, env=daemon.environ, stdin=theirs, capture_output=True, text=True, timeout=60, check=False)
    os.close(ours)
    os.close(theirs)
    return ran.returncode, ran.stdout, ran.stderr


# --- without a daemon ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(home: Path) -> Daemon:
    """One that does not run, with the models `real` and `org/other`."""
    d = Daemon(home, **real_settings(home))
    make_model(home / "models" / "real", thinks=True)
    make_model(home / "models" / "org" / "other")
    return d


def test_without_a_daemon_models_are_listed_named_shown_and_deleted_on_the_disk(stopped: Daemon) -> None:
    d, models = stopped, stopped.home / "models"
    listed = d.mlxd("list")
    assert listed.returncode == 0 and not listed.stderr
    assert set(column(listed.stdout, "name")) == {"real:latest", "org/other:latest", "mlxd-tiny:latest"}
    assert set(column(listed.stdout, "alias of")) == {"-"}
    assert set(column(listed.stdout, "parameters")) == {"64", "673K"}

    assert d.mlxd("cp", "real", "copy").stdout == "copy  another name of real\n"
    poet = ["alias", "poet", "org/other", "--system", "You\x1b[2J rhyme.", "--parameter", "temperature", "1.5"]
    made = d.mlxd(*poet, "--parameter", "stop", "###", "--parameter", "stop", "7", "--parameter", "seed", "4")
    assert (made.returncode, made.stdout) == (0, "poet  another name of org/other\n"), made.stderr
    told = json.loads(d.mlxd("show", "poet", "--json").stdout)
    assert told["details"]["parent_model"] == "org/other:latest" and told["system"] == "You\x1b[2J rhyme."
    assert told["parameters"].split() == ["temperature", "1.5", "seed", "4", "stop", '"###"', "stop", '"7"']
    shown = d.mlxd("show", "poet").stdout
    assert "option          temperature 1.5\n" in shown and "context         4096 tokens\n" in shown
    assert "rhyme." in shown and "\x1b" not in shown
    aliases = d.mlxd("alias").stdout
    assert list(zip(column(aliases, "name"), column(aliases, "alias of"), strict=True)) == [
        ("poet:latest", "org/other:latest"),
        ("copy:latest", "real:latest"),
    ]

    assert d.mlxd("alias", "--remove", "Poet").stdout == "removed  Poet\n"
    assert d.mlxd("rm", "--yes", "copy", "org/other").stdout == "deleted  copy\ndeleted  org/other\n"
    assert [path.name for path in models.rglob("config.json")] == ["config.json"] and (models / "real").exists()
    left = d.mlxd("alias")
    assert (left.returncode, left.stdout) == (0, "") and "mlxd alias NAME SOURCE" in left.stderr
    assert json.loads(d.mlxd("alias", "--json").stdout) == {"models": []}


@pytest.mark.parametrize("command", [["ps"], ["load", "real"], ["unload", "real"]])
def test_what_needs_a_daemon_ends_with_3_when_there_is_none(stopped: Daemon, command: list[str]) -> None:
    ran = stopped.mlxd(*command)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr == "Error: mlxd is not running; start it with `mlxd start`\n"


REFUSALS: list[tuple[list[str], str]] = [
    (["show", "nope"], "model 'nope' not found"),
    (["show", "a b"], "'a b' cannot be a model's name"),
    (["load", "../x"], "'../x' cannot be a model's name"),
    (["unload", ""], "'' cannot be a model's name"),
    (["rm", "--yes", "x" * 300], "cannot be a model's name"),
    (["rm", "real", "copy"], "this would delete real (0 MB), copy, and there is nobody to ask: add --yes"),
    (["rm", "--yes", "mlxd-tiny"], "is a part of mlxd and cannot be deleted"),
    (["rm", "--yes", "nope"], "model 'nope' not found"),
    (["cp", "nope", "copy"], "model 'nope' not found"),
    (["cp", "real", "a/../b"], "'a/../b' cannot be a model's name"),
    (["cp", "real", "org/other"], "org/other:latest is the name of a model, not of an alias"),
    (["alias", "poet"], "say of what: `mlxd alias poet SOURCE`"),
    (["alias", "--system", "x"], "say which name, and of what"),
    (["alias", "poet", "--remove", "x"], "--remove goes alone"),
    (["alias", "--remove", "real"], "real is no alias; `mlxd alias` lists those there are, and `mlxd rm` deletes models"),
    (["alias", "poet", "real", "--parameter", "temprature", "1"], "unknown parameter temprature; did you mean temperature?"),
    (["alias", "poet", "real", "--parameter", "temperature", "warm"], "parameter temperature must be a number, not 'warm'"),
    (["alias", "poet", "real", "--parameter", "temperature", "nan"], "parameter temperature must be a number, not 'nan'"),
    (["alias", "poet", "real", "--parameter", "seed", "1.5"], "seed"),
    (["alias", "poet", "real", "--parameter", "top_p", "7"], 'option "top_p": expected number <= 1.0'),
]


def test_what_cannot_be_done_is_one_sentence_and_status_1_and_nothing_has_happened(stopped: Daemon) -> None:
    before = sorted(stopped.home.rglob("*.safetensors"))
    for command, sentence in REFUSALS:
        ran = stopped.mlxd(*command)
        assert (ran.returncode, ran.stdout) == (1, ""), (command, ran)
        assert ran.stderr.startswith("Error: ") and sentence in ran.stderr and ran.stderr.count("\n") == 1, (command, ran.stderr)
    assert sorted(stopped.home.rglob("*.safetensors")) == before
    assert not stopped.paths.aliases.exists()


def test_one_that_cannot_be_deleted_does_not_keep_the_others(stopped: Daemon) -> None:
    ran = stopped.mlxd("rm", "--yes", "nope", "real")
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "deleted  real\n", "Error: model 'nope' not found\n")
    assert not (stopped.home / "models" / "real").exists()


def test_nothing_is_deleted_before_somebody_has_said_yes(stopped: Daemon) -> None:
    status, out, err = answered(stopped, ["rm", "real"], b"n\n")
    assert status == 1 and "Delete real (0 MB)? [y/N]" in out + err
    assert (stopped.home / "models" / "real").exists()
    status, out, err = answered(stopped, ["rm", "real"], b"y\n")
    assert status == 0 and "deleted  real" in out
    assert not (stopped.home / "models" / "real").exists()


def test_a_broken_model_can_be_deleted_and_says_what_is_wrong(stopped: Daemon) -> None:
    (stopped.home / "models" / "real" / "config.json").write_text("{")
    shown = stopped.mlxd("show", "real")
    assert shown.returncode == 1 and "model 'real' cannot be loaded: config.json is not valid JSON" in shown.stderr
    assert stopped.mlxd("rm", "--yes", "real").returncode == 0
    assert not (stopped.home / "models" / "real").exists()


def test_beside_a_daemon_that_does_not_answer_yet_nobody_touches_the_disk(stopped: Daemon) -> None:
    paths.prepare(stopped.paths)
    lock = flocked(stopped.paths.lock, 1.0)
    ran = stopped.mlxd("rm", "--yes", "real")
    os.close(lock)
    assert (ran.returncode, ran.stderr) == (1, "Error: mlxd is just starting or stopping; try again in a moment\n")
    assert (stopped.home / "models" / "real").exists()


# --- with one --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    """One of real parts, with tokens, that keeps one model loaded and is patient with an engine that is paused; and the models a and b."""
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as name:
        home = Path(name)
        patient = {"MLXD_HEALTH_SUSPECT_S": "600", "MLXD_HEALTH_FROZEN_S": "600", "MLXD_HEALTH_INTERVAL_S": "600"}
        d = Daemon(home, MLX_PRELOAD_MODELS="", MLX_MAX_CACHED_MODELS="1", **real_settings(home) | patient)
        for model in ("a", "b"):
            shutil.copytree(BUILTIN, home / "models" / model)
        (home / "token").touch(0o600)
        (home / "token").write_text(f"inference {INFERENCE}\nadmin {ADMIN}\n")
        with d.running():
            yield d


def loaded(daemon: Daemon) -> list[str]:
    return [engine["model"] for engine in daemon.status()["engines"] if engine["model"]]


def test_with_a_daemon_the_same_is_said_as_without(running: Daemon) -> None:
    d = running
    assert d.mlxd("cp", "a", "twin").returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in real_settings(d.home).items():
            patch.setenv(variable, value)
        disk = store.Disk(d.paths)
        there = json.loads(d.mlxd("list", "--json").stdout)["models"]
        assert there == disk.models() and {one["name"] for one in there} == {f"{n}:latest" for n in ("a", "b", "twin", "mlxd-tiny")}
        assert json.loads(d.mlxd("show", "twin", "--json").stdout) == disk.shown("twin")
    assert column(d.mlxd("alias").stdout, "name") == ["twin:latest"]
    assert d.mlxd("alias", "--remove", "twin").returncode == 0
    assert not column(d.mlxd("list").stdout, "name").count("twin:latest")
    assert "is the name of a model" in d.mlxd("alias", "b", "a", "--system", "x").stderr
    assert "model 'nope' not found" in d.mlxd("load", "nope").stderr


def test_a_model_is_loaded_shown_and_unloaded(running: Daemon) -> None:
    d = running
    none = d.mlxd("ps")
    assert (none.returncode, none.stdout, none.stderr) == (0, "", "no model is loaded\n")
    assert json.loads(d.mlxd("ps", "--json").stdout) == {"models": []}
    assert d.mlxd("alias", "short", "a").returncode == 0
    ran = d.mlxd("load", "short", "--keep-alive", "2h")
    assert ran.returncode == 0 and ran.stdout.startswith("loaded  short:latest  in "), ran.stderr
    assert ran.stderr.startswith("loading a:latest, 3 MB\n")
    assert loaded(d) == ["a:latest"]
    shown = d.mlxd("ps").stdout
    assert set(column(shown, "name")) == {"a:latest", "short:latest"} and set(column(shown, "context")) == {"4096"}
    assert all(left.startswith("1h5") for left in column(shown, "leaves in"))
    assert d.mlxd("load", "a", "--keep-alive", "-1").returncode == 0
    assert set(column(d.mlxd("ps").stdout, "leaves in")) == {"never"}
    refused = d.mlxd("load", "a", "--keep-alive", "soon")
    assert refused.returncode == 1 and 'keep_alive: "soon" is not a duration' in refused.stderr
    assert d.mlxd("unload", "short").stdout == "unloaded  short:latest\n"
    assert d.mlxd("unload", "a").stdout == "a is not loaded\n"
    d.until("no engine", lambda s: not [e for e in s["engines"] if e["model"]])
    assert d.mlxd("rm", "--yes", "short").stdout == "deleted  short\n"


@contextlib.contextmanager
def kept_busy(daemon: Daemon, model: str) -> Iterator[None]:
    """With a request in hand that its engine, paused, does not answer before the end of this."""
    assert daemon.mlxd("load", model).returncode == 0
    (engine,) = [engine for engine in daemon.status()["engines"] if engine["model"]]
    port, head = daemon.status()["port"], f"HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {INFERENCE}\r\n"
    body = json.dumps({"model": model, "prompt": "Hello", "stream": False}).encode()
    asked = f"POST /api/generate {head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    os.kill(engine["pid"], signal.SIGSTOP)
    asking = threading.Thread(target=http, args=(port, asked))
    try:
        asking.start()
        health = f"GET /health {head}\r\n".encode()
        eventually(lambda: json.loads(http(port, health)[2])["queue"]["running"] == 1, "the request to run", daemon.history)
        yield
    finally:
        os.kill(engine["pid"], signal.SIGCONT)
        asking.join()


def test_a_model_in_use_goes_when_its_requests_have_ended_and_waiting_for_it_ends_with_ctrl_c(running: Daemon) -> None:
    d = running
    with kept_busy(d, "a"):
        unloading = d.mlxd("unload", "a")
        assert unloading.stdout == "a:latest is in use; it is unloaded when its requests have ended\n", unloading
        command = [sys.executable, "-u", "-m", "mlxd", "load", "b"]
        with subprocess.Popen(command, env=d.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None and waiting.stdout is not None
            assert [waiting.stderr.readline() for _ in range(2)] == ["loading b:latest, 3 MB\n", "it waits for room\n"]
            waiting.send_signal(signal.SIGINT)
            rest = waiting.stderr.read()
            assert rest.startswith("Error: not waited for; mlxd may go on loading b:latest") and rest.count("\n") == 1, rest
            assert waiting.wait(60) == 1 and not waiting.stdout.read()
    d.until("no engine", lambda s: not [e for e in s["engines"] if e["model"]])


def test_a_model_in_use_is_deleted_when_its_requests_have_ended(running: Daemon) -> None:
    d = running
    shutil.copytree(BUILTIN, d.home / "models" / "doomed")
    with kept_busy(d, "doomed"):
        command = [sys.executable, "-m", "mlxd", "rm", "--yes", "doomed"]
        deleting = subprocess.Popen(command, env=d.environ, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            deleting.wait(1)
        assert (d.home / "models" / "doomed").exists()
    assert deleting.communicate(timeout=60)[0] == "deleted  doomed\n"
    assert not (d.home / "models" / "doomed").exists() and "doomed:latest" not in loaded(d)


def test_whoever_else_listens_on_its_port_sees_no_token(home: Path, daemon: Callable[..., Daemon]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        d = daemon(MLX_API_PORT=str(stranger.getsockname()[1]), **real_settings(home))
        (home / "token").touch(0o600)
        (home / "token").write_text(f"admin {ADMIN}\n")
        d.start()
        d.until("held", lambda s: s["state"] == "held")
        ran = d.mlxd("list")
        assert ran.returncode == 1 and ran.stderr.startswith("Error: mlxd is held: "), ran
        stranger.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                assert ADMIN.encode() not in heard(stranger.accept()[0])  # the supervisor itself looks who is there


def heard(sock: socket.socket) -> bytes:
    with sock:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return sock.recv(65536)
    return b""
