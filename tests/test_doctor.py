"""`mlxd doctor`: what it finds, what it says to do, and what is in no bundle."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Daemon, eventually
from known_answers import LONG
from prometheus_client.parser import text_string_to_metric_families as families
from test_mlxd import LONGEST, real_settings

from mlxd import bundle, control, doctor, masks, paths
from mlxd.config import Config, Engine, Server
from mlxd.doctor import CHECKS, Doctor
from mlxd.endpoint import checked_url
from mlxd.errors import ConfigError
from mlxd.logs import timestamp
from mlxd.probe import Reply

TOKEN = "t0ken-of-the-admin-0123456789"
SECRET = "my-cat-is-called-Mzhnhkbr"
HUB, PASSWORD, HOOK = "hf_aBcDeFgHiJkLmNoPq", "s3cr3t-passw0rd", 'curl -H "X-Key: k3y-of-the-hook" http://127.0.0.1:9/'


def found(
    where: paths.Paths, check: str, settings: Config | None = None, told: dict[str, Any] | None = None
) -> list[tuple[str, str]]:
    """What one check finds."""
    doctor = Doctor(where)
    doctor.settings, doctor.told = settings, told
    return list(CHECKS[check](doctor))


def problem(found: list[tuple[str, str]]) -> str:
    """The one there is."""
    (text,) = [text for level, text in found if level == "problem"]
    return text


@contextlib.contextmanager
def locked(where: paths.Paths) -> Iterator[None]:
    """Somebody runs meanwhile."""
    with open(where.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def where(home: Path) -> paths.Paths:
    where = paths.locate({"MLXD_HOME": str(home)})
    paths.prepare(where)
    return where


# --- a daemon that has served secrets ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as place:
        home = Path(place)
        (home / "token").write_text(f"admin {TOKEN}\n")
        (home / "token").chmod(0o600)
        (home / "config.toml").write_text(f"[events]\non_event = {json.dumps(HOOK)}\n")
        (home / "chat_history").write_text(f"{SECRET}\n")
        more = {"HF_TOKEN": HUB, "OLLAMA_URL": f"http://me:{PASSWORD}@127.0.0.1:9", "MLXD_SUPERVISOR_SPARE_BYTES": "0"}
        with Daemon(home, **real_settings(home) | more).running() as d:
            serve_secrets(d)
            yield d


def client(d: Daemon) -> httpx.Client:
    head = {"Authorization": f"Bearer {TOKEN}"}
    return httpx.Client(base_url=d.status()["url"], headers=head, timeout=60, trust_env=False)


def serve_secrets(d: Daemon) -> None:
    """In every way a prompt comes in, through a death of the engine, and with every kind of refusal."""
    asked = [{"role": "system", "content": SECRET}, {"role": "user", "content": f"{SECRET}: what is mlxd?"}]
    with client(d) as c:
        chat = {"model": "mlxd-tiny", "messages": asked, "stream": False, "max_tokens": 5, "options": {"num_predict": 5}}
        for path in ("/api/chat", "/v1/chat/completions"):
            c.post(path, json=chat).raise_for_status()
        c.post("/v1/messages", json=chat | {"messages": asked[1:], "system": SECRET}).raise_for_status()
        c.post("/v1/responses", json={"model": "mlxd-tiny", "input": SECRET, "max_output_tokens": 16}).raise_for_status()
        c.post("/api/generate", json={"model": "mlxd-tiny", "prompt": SECRET, "options": {"num_predict": 5}}).raise_for_status()
        c.post("/api/create", json={"model": "mine", "from": "mlxd-tiny", "system": SECRET, "stream": False}).raise_for_status()
        for broken in (
            chat | {"temperature": SECRET},
            chat | {"model": SECRET},
            chat | {"tools": SECRET},
            chat | {"messages": SECRET},
        ):
            assert c.post("/v1/chat/completions", json=broken).status_code >= 400
        assert c.post(f"/api/chat?{SECRET}", content=SECRET).status_code == 400
        deep = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": SECRET}}}
        assert c.post("/v1/chat/completions", json=chat | {"response_format": deep}).status_code >= 400
        story = {"model": "mlxd-tiny", "messages": [{"role": "user", "content": LONGEST}], "options": {"temperature": 0}}
        with c.stream("POST", "/api/chat", json=story, headers={"X-Request-Id": "the-lost-one"}) as answer:
            pieces = []
            for line in answer.iter_lines():
                pieces.append(json.loads(line)["message"]["content"])
                if len(pieces) == 20:
                    os.kill(d.status()["engines"][0]["pid"], signal.SIGKILL)
        assert "".join(pieces) == LONG[LONGEST]


def test_the_bundle_has_neither_a_prompt_nor_a_token(served: Daemon) -> None:
    file = served.home / "bundle.zip"
    ran = served.mlxd("doctor", "--bundle", str(file))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == f"bundle   {file}" and "\x1b" not in ran.stdout
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with zipfile.ZipFile(file) as archive:
        texts = {name.removeprefix("mlxd/"): archive.read(name).decode() for name in archive.namelist()}
    hidden = (SECRET, TOKEN, HUB, PASSWORD, "k3y-of-the-hook")
    assert [(name, secret) for name, text in texts.items() for secret in hidden if secret in text or secret in name] == []
    assert LONG[LONGEST][:30] not in "".join(texts.values())
    named = {
        "doctor.json",
        "versions.txt",
        "settings.json",
        "exits.json",
        "status.json",
        "health.json",
        "flights.json",
        "metrics.txt",
    }
    assert named | {"logs/events.jsonl", "logs/server.log", "logs/supervisor.log", "logs/engine-1.log"} <= set(texts)
    assert json.loads(texts["settings.json"])["settings"]["ollama.url"]["value"] == "http://...@127.0.0.1:9"
    assert json.loads(texts["flights.json"])["flights"] and "mlxd 0" in texts["versions.txt"]
    again = served.mlxd("doctor", "--json", "--bundle", str(file))
    assert (again.returncode, again.stderr) == (1, f"Error: {file} is there already: name another file, or remove it\n")


def test_an_exit_record_has_the_requests_that_its_engine_had(served: Daemon) -> None:
    record = eventually(lambda: next((one for one in served.exits() if one["flights"]), None), "the flights", served.history)
    (flight,) = record["flights"]
    assert (record["cause"], flight["id"], flight["outcome"], flight["phases"][-1][0]) == ("killed", "the-lost-one", None, "lost")
    told = control.ask(served.paths.control, "exits")["exits"]
    assert [one["flights"][0]["id"] for one in told if one["flights"]] == ["the-lost-one"]
    assert all(one["stack"] is None for one in told)
    with client(served) as c:
        flights = c.get("/ui/flights").json()["flights"]
    assert next(one for one in flights if one["id"] == "the-lost-one")["resumes"] == 1


def test_nobody_is_shown_the_password_in_a_url(served: Daemon) -> None:
    with client(served) as c, c.stream("GET", "/ui/feed") as feed:
        told = next(line for line in feed.iter_lines() if '"status"' in line)
    assert "127.0.0.1:9" in told and PASSWORD not in told
    status = served.mlxd("status", "--json").stdout
    assert "127.0.0.1:9" in status and PASSWORD not in status
    with pytest.raises(ConfigError, match=r"not 'ftp://host'$"):
        checked_url(f"ftp://me:{PASSWORD}@host", "OLLAMA_URL")


def test_metrics_tell_of_the_processes_and_why_they_ended(served: Daemon) -> None:
    with client(served) as c:
        text = c.get("/metrics").text
    samples = {(s.name, *sorted(s.labels.values())): s.value for family in families(text) for s in family.samples}
    assert samples["mlxd_supervisor_up",] == 1
    assert samples["mlxd_exits_total", "engine", "killed"] == 1
    assert samples["mlxd_engines", "ready"] == 1
    assert samples["mlxd_process_memory_bytes", "supervisor"] > 10e6
    assert samples["mlxd_pause_seconds_count",] == 1


def test_while_it_serves_nothing_is_a_problem(served: Daemon) -> None:
    d, pid = served, served.status()["supervisor"]["pid"]
    mended = d.paths.config.read_text()
    broken = d.environ | {"MLX_MAX_CONCURRENT": "abc", "MLX_API_PORT": str(d.status()["port"])}
    d.paths.config.write_text(mended + "[server]\nprot = 1\n")
    try:
        found = findings(d, broken)
        assert [one for one in found if one["level"] == "problem"] == []
        assert "unknown setting server.prot" in next(one["text"] for one in found if one["check"] == "settings")
        d.paths.config.write_text(mended)
        os.kill(pid, signal.SIGSTOP)  # the server goes on without it
        found = findings(d, d.environ | {"MLX_API_PORT": broken["MLX_API_PORT"]})
        assert [one for one in found if one["level"] == "problem"] == []
        assert "does not answer: `mlxd recover`" in next(one["text"] for one in found if one["check"] == "daemon")
    finally:
        os.kill(pid, signal.SIGCONT)
        d.paths.config.write_text(mended)


def findings(d: Daemon, environ: dict[str, str]) -> list[dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, "-m", "mlxd", "doctor", "--json"], env=environ, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return list(json.loads(ran.stdout)["findings"])


# --- a healthy machine ------------------------------------------------------------------------------------------------------------------


def test_a_stopped_mlxd_is_no_problem_and_nothing_is_left_of_the_engine_that_tried(home: Path) -> None:
    d = Daemon(home)
    ran = d.mlxd("doctor", "--json")
    told = json.loads(ran.stdout)
    assert (ran.returncode, told["problems"], told["bundle"]) == (0, 0, None), ran.stdout
    assert list(dict.fromkeys(one["check"] for one in told["findings"])) == [name for name in CHECKS if name != "health"]
    generation = next(one for one in told["findings"] if one["check"] == "generation")
    assert generation["level"] == "ok" and "gave a token of the built-in model" in generation["text"]
    assert d.ours() == [] and list(home.iterdir()) == []


# --- what keeps it from serving ---------------------------------------------------------------------------------------------------------


def test_refused_settings_are_told_in_their_own_words(where: paths.Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    where.config.write_text("[server]\nprot = 1\n")
    assert "unknown setting server.prot; did you mean server.port?" in problem(found(where, "settings"))
    where.config.unlink()
    where.token.write_text("short\n")
    where.token.chmod(0o600)
    assert str(where.token) in problem(found(where, "settings"))
    where.token.unlink()
    monkeypatch.setenv("MLXD_SERVER_PROT", "1")
    assert ("advice", "MLXD_SERVER_PROT in the environment is no setting: did you mean MLXD_SERVER_PORT?") in found(
        where, "settings"
    )


def test_a_stranger_on_the_port_is_named(where: paths.Paths) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        taken = Config(server=Server(port=port))
        assert problem(found(where, "port", taken)).endswith("end that, or choose another port with MLX_API_PORT")
        assert found(where, "port", taken, {"state": "held", "port": port}) == []  # it says so itself
        with locked(where):
            assert found(where, "port", taken) == []
    assert found(where, "port", taken) == [("ok", f"{port} is free")]


def test_who_holds_the_lock_and_does_not_answer_is_a_problem(where: paths.Paths) -> None:
    where.pid_file.write_text("4711\n")
    with locked(where):
        assert problem(found(where, "daemon")).startswith(f"pid 4711 holds {where.lock} and does not answer: `mlxd recover`")
    assert found(where, "daemon") == [
        ("advice", "mlxd does not run, and left its PID file when it died: `mlxd start` starts it and clears up")
    ]


@pytest.mark.parametrize("in_the_way", ["file", "link"])
def test_what_lies_in_the_place_of_a_directory_is_told(home: Path, in_the_way: str) -> None:
    where = paths.locate({"MLXD_HOME": str(home)})
    if in_the_way == "file":
        where.logs.write_text("")
    else:
        where.logs.symlink_to(home)
    assert problem(found(where, "directories")) == f"{where.logs} is not a directory: move it away, mlxd makes its own"


def test_a_directory_that_is_open_to_others_is_advice(where: paths.Paths) -> None:
    where.logs.chmod(0o755)
    assert found(where, "directories") == [("advice", f"{where.logs} is open to others: `chmod 700 {where.logs}`")]


def test_a_server_that_does_not_answer_is_a_problem_and_a_stranger_in_its_place_is(where: paths.Paths) -> None:
    doctor = Doctor(where)
    doctor.url = "http://127.0.0.1:9"
    assert "look at `mlxd logs --server`" in problem(list(CHECKS["health"](doctor)))
    doctor.reply = Reply(200, {}, b"{}", 0.1)
    assert "is answered by something that is not mlxd (status 200)" in problem(list(CHECKS["health"](doctor)))
    doctor.reply = Reply(503, {}, b'{"nonce": "x", "status": "loading", "reason": "the server is starting"}', 0.1)
    assert problem(list(CHECKS["health"](doctor))).endswith("says loading: the server is starting")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ([sys.executable, "-c", "print('no such accelerator'); raise SystemExit(3)"], "it ended: no such accelerator"),
        (["/nowhere/engine"], "it cannot be started: No such file or directory"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "it did not get ready in time"),
    ],
)
def test_an_engine_that_gives_no_token_is_a_problem(
    where: paths.Paths, command: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "60" in command[-1]:
        monkeypatch.setattr(doctor, "HELLO_S", 0.5)
    told = problem(found(where, "generation", Config(engine=Engine(command=command))))
    assert told == f"an engine of its own gives no token of the built-in model: {why}"


def record(ts: str) -> dict[str, Any]:
    """Of an engine that somebody killed."""
    lived = {"child": "engine", "slot": 1, "pid": 1, "model": "m:latest", "up_s": 1.0, "memory_bytes": 1, "running": 1, "text": ""}
    return lived | {"ts": ts, "cause": "killed", "signal": 9, "code": None, "remedy": "was killed from outside"}


def test_deaths_of_the_last_day_are_told_with_what_was_done(where: paths.Paths) -> None:
    now = timestamp()
    where.exits.write_text("".join(json.dumps(record(ts)) + "\n" for ts in ("2020-01-01T00:00:00.000000Z", now)))
    assert found(where, "exits") == [("advice", f"{now[:19]}Z the engine of m:latest died (killed): it was killed from outside")]


def test_a_check_that_fails_does_not_end_the_others(where: paths.Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    where.exits.write_text(json.dumps(record("yesterday")) + "\n")
    monkeypatch.setattr(doctor, "CHECKS", {name: CHECKS[name] for name in ("exits", "port", "disk")})
    findings = list(Doctor(where).findings())
    assert [finding.check for finding in findings] == ["exits", "port", "disk"]
    assert findings[0].text == "could not be looked at: Invalid isoformat string: 'yesterday'"


# --- secrets ----------------------------------------------------------------------------------------------------------------------------


def test_what_looks_like_a_secret_is_taken_out_wherever_it_stands() -> None:
    text = 'GET https://me:pw@host/x?api_key=123 Authorization: Bearer abcdef "hf_0123456789abc" sk-ant-0123456789 my-own'
    purged = masks.purged(text, ["my-own"])
    assert purged == 'GET https://...@host/x?... Authorization: Bearer [secret] "[secret]" [secret] [secret]'


def test_what_is_known_to_be_secret_goes_wherever_it_stands(where: paths.Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    where.env_file.write_text("HF_TOKEN=api_org_fromafile\n")
    where.token.write_text('admin aaaaaaaaaaaaaaaa\nadmin aaaaaaaaaaaaaaaaTAIL\nadmin quo"te\\0123456789\n')
    where.token.chmod(0o600)
    where.config.write_text('[events]\non_event = "python notify.py s3cr3t-w0rd"\n')
    known = masks.known(where)
    told = ["api_org_fromafile", "aaaaaaaaaaaaaaaaTAIL", "s3cr3t-w0rd", json.dumps({"log": 'quo"te\\0123456789'}), "python"]
    assert masks.purged({"all": told}, known) == {"all": ["[secret]"] * 3 + ['{"log": "[secret]"}', "python"]}


@pytest.mark.parametrize("url", ["http://me:pa'ss@h:1/x", "http://me:pa/ss@h:1/x", "http://m@e:pass@h:1/x"])
def test_no_character_of_a_password_gets_through(url: str) -> None:
    assert masks.purged(f"see {url} there", []) == "see http://...@h:1/x there"


def test_arguments_of_commands_and_what_cannot_be_parsed_are_not_shown(where: paths.Paths) -> None:
    where.config.write_text('[engine]\ncommand = ["/bin/env", "K=s3cr3t"]\n')
    assert masks.settings(where)["settings"]["engine.command"]["value"] == ["/bin/env", "..."]
    where.config.write_text("[events]\non_event = 'curl \"s3cr3t'\n")
    with pytest.raises(ConfigError, match="is no command: no closing quotation$"):
        masks.settings(where)


def test_a_bundle_is_whole_or_not_there(where: paths.Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    file = where.home / "b.zip"
    with pytest.raises(KeyboardInterrupt), bundle.begun(file):
        raise KeyboardInterrupt
    assert not file.exists()
    where.log("server").write_bytes(b"Bearer cut-in-two" + b"x" * bundle.MOST_LOG_BYTES + b"\nlast \xff line\n")
    monkeypatch.setenv("MLX_MODELS_DIR", "/tmp/\udcff")
    with bundle.begun(file) as out:
        bundle.write(out, where, [doctor.Finding("ok", "x", "/tmp/\udcff")])
    with zipfile.ZipFile(file) as archive:
        assert archive.read("mlxd/logs/server.log").decode() == "last \ufffd line\n"
        assert json.loads(archive.read("mlxd/doctor.json")) == [{"level": "ok", "check": "x", "text": "/tmp/?"}]
        assert "mlxd is not running" in json.loads(archive.read("mlxd/status.json"))["error"]
