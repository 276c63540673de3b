"""Events and the command they are told to; logs that flood, vanish or cannot be written."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, eventually

import mlxd
from mlxd import control, events
from mlxd.errors import MlxdError

Make = Callable[..., Daemon]


def told(d: Daemon) -> list[dict[str, Any]]:
    """Every event of events.jsonl."""
    if not d.paths.events.is_file():
        return []
    return [json.loads(line) for line in d.paths.events.read_bytes().splitlines()]


def names(d: Daemon) -> list[str]:
    return [event["event"] for event in told(d)]


def until_told(d: Daemon, name: str, **fields: Any) -> dict[str, Any]:
    """The first event of this name with these fields."""
    return eventually(
        lambda: next((e for e in told(d) if e["event"] == name and fields.items() <= e.items()), {}),
        f"event {name}",
        lambda: f"{told(d)}\n{d.history()}",
    )


def refused_reload(d: Daemon) -> None:
    """One event, on request."""
    with pytest.raises(MlxdError, match="unknown"):
        control.ask(d.paths.control, "reload")


def spoil_configuration(d: Daemon, size: int = 10) -> None:
    d.paths.config.write_text(f"[{'x' * size}]\n")
    until_told(d, "reload_refused")
    until_told(d, "degraded")


# --- the file ----------------------------------------------------------------------------------------------------------------------


def test_what_happens_is_told_in_order_and_with_its_cause(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    pid = d.ready()["engines"][0]["pid"]
    until_told(d, "ready", child=None)
    os.kill(pid, signal.SIGKILL)
    died = until_told(d, "died")
    assert (died["child"], died["model"], died["pid"], died["cause"]) == ("engine-1", "a:latest", pid, "killed")
    assert died["text"].startswith("engine-1 (a:latest) died") and "was killed from outside" in died["text"]
    until_told(d, "readied", child="engine-1")
    d.processes[0].send_signal(signal.SIGTERM)
    assert d.processes[0].wait(60) == 0
    found = names(d)
    assert found[0] == "started" and found[-1] == "stopped"
    assert found.index("ready") < found.index("died") < found.index("stopping") < found.index("ended")
    assert set(told(d)[0]) == {"ts", "seq", "event", "child", "model", "pid", "cause", "text"}
    assert all(event["text"] in d.log() for event in told(d))
    assert d.paths.events.stat().st_mode & 0o777 == 0o600


def test_a_cool_down_is_told_and_what_it_makes_of_mlxd(daemon: Make) -> None:
    d = daemon(server="--want a:latest", engine="--exit-loading 1")
    d.start()
    assert "died 5 times; one try every 3600 s" in until_told(d, "cooled_down")["text"]
    assert "next try in" in until_told(d, "degraded")["text"]
    assert names(d).count("died") == 5


def test_a_child_that_is_held_is_told_and_that_it_is_not_any_more(daemon: Make, home: Path) -> None:
    d = daemon(server="--want a:latest", engine=f"--say no-such-setting --exit-loading 78 --first 1 {home}/count")
    d.start()
    assert "no-such-setting" in until_told(d, "held")["text"]
    d.paths.config.write_text("[health]\nmax_time_s = 9\n[log]\nformat = 'json'\n")
    assert "changed: health.max_time_s, log.format" in until_told(d, "reloaded")["text"]
    until_told(d, "readied", child="engine-1")
    told_now = json.loads(d.log().splitlines()[-1])
    assert told_now["level"] == "info" and told_now["ts"] > told(d)[0]["ts"]
    d.paths.config.write_text("[health]\nmax_time_s = never\n")
    until_told(d, "reload_refused")


def test_numbers_go_on_over_a_new_supervisor_and_a_new_start(daemon: Make) -> None:
    d = daemon()
    d.start()
    d.ready()
    assert d.mlxd("restart", "--supervisor").returncode == 0
    until_told(d, "supervisor_replaced")
    assert names(d).count("ready") <= 1  # it goes on: nothing new about that
    assert d.mlxd("stop").returncode == 0
    d.start()
    eventually(lambda: names(d).count("started") == 2, "the second start", d.history)
    assert [event["seq"] for event in told(d)] == list(range(1, len(told(d)) + 1))


def test_an_event_that_cannot_be_written_is_counted_and_leaves_a_gap(daemon: Make, home: Path) -> None:
    d = daemon()
    d.start()
    d.ready()
    spoil_configuration(d)
    last = told(d)[-1]["seq"]
    kept = home / "somebody's"
    kept.write_text("as it was")
    d.paths.events.unlink()
    d.paths.events.symlink_to(kept)
    refused_reload(d)
    assert any("1 events could not be written" in note for note in d.status()["notes"])
    assert kept.read_text() == "as it was"
    d.paths.events.unlink()
    d.paths.events.mkdir()
    refused_reload(d)
    d.paths.events.rmdir()
    refused_reload(d)
    assert [event["seq"] for event in told(d)] == [last + 3]
    assert not d.status()["notes"]
    d.paths.events.unlink()
    d.paths.events.mkdir()
    d.paths.config.unlink()
    assert d.mlxd("restart", "--supervisor").returncode == 0
    d.paths.events.rmdir()
    d.paths.config.write_text("[nonsense]\n")
    until_told(d, "reload_refused")
    assert told(d)[0]["seq"] > last + 3


def test_half_a_line_at_the_end_does_not_begin_the_numbers_anew(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    for _ in range(3):
        events.Events(file).add("started", "mlxd has started", None, None, 1, None)
    with file.open("ab") as end:
        end.write(b'{"ts":"2026\n')
    assert events.Events(file).seq == 3
    file.rename(events.older(file))
    assert events.Events(file).seq == 3


@pytest.mark.parametrize(("count", "size"), [(5_000, 600), pytest.param(1_000_000, 10, marks=pytest.mark.full)])
def test_rel_22_a_storm_of_events_fills_two_files_and_no_more(tmp_path: Path, count: int, size: int) -> None:
    kept = events.Events(tmp_path / "events.jsonl")
    for number in range(count):
        kept.add("died", f"{number} " + "\x1b" * size, "engine-1", "a:latest", number, "aborted")
    files = [kept.older, kept.file]
    assert all(file.stat().st_size <= events.MOST_BYTES for file in files)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in files}
    seqs = [json.loads(line)["seq"] for file in files for line in file.read_bytes().splitlines()]
    assert seqs == list(range(count - len(seqs) + 1, count + 1))


# --- mlxd events -------------------------------------------------------------------------------------------------------------------


def test_events_are_shown_as_sentences_and_as_json_and_followed(daemon: Make) -> None:
    d = daemon()
    nothing = d.mlxd("events")
    assert (nothing.returncode, nothing.stdout) == (3, "") and nothing.stderr.startswith("Error: there are no events in ")
    d.start()
    d.ready()
    following = subprocess.Popen([sys.executable, "-m", "mlxd", "events", "-f"], env=d.environ, stdout=subprocess.PIPE)
    assert following.stdout is not None
    first = following.stdout.readline().split()
    assert first[1:4] == [b"started", b"mlxd", mlxd.__version__.encode()]
    spoil_configuration(d)
    line = next(line for line in following.stdout if b"reload_refused" in line)
    assert b"unknown section [xxxxxxxxxx]" in line
    d.paths.events.rename(events.older(d.paths.events))
    refused_reload(d)
    assert any(b"reload_refused" in line for line in following.stdout)
    following.send_signal(signal.SIGINT)
    assert following.communicate(timeout=60)[0] == b"" and following.returncode == 0
    ran = d.mlxd("events", "-n", "2", "--json")
    assert [json.loads(line)["event"] for line in ran.stdout.splitlines()] == ["degraded", "reload_refused"]
    assert d.mlxd("events", "-n", "0").stdout == ""


# --- the event command -------------------------------------------------------------------------------------------------------------


def test_the_event_command_gets_each_event_and_no_secret(daemon: Make, home: Path) -> None:
    d = daemon(MLXD_EVENTS_ON_EVENT=f"sh -c 'cat >> {home}/lines; env >> {home}/env'", HF_TOKEN="hf_secret", MLX_SECRET="secret")
    d.start()
    d.ready()
    eventually(lambda: '"event":"readied"' in (home / "lines").read_text(), "the server's readiness told", d.history)
    d.processes[0].send_signal(signal.SIGTERM)
    assert d.processes[0].wait(60) == 0
    assert [json.loads(line) for line in (home / "lines").read_text().splitlines()] == told(d)
    environment = (home / "env").read_text()
    assert "MLXD_EVENT=stopped\n" in environment and "MLXD_EVENT_TEXT=mlxd has stopped\n" in environment
    assert "MLXD_EVENT_CHILD=server\n" in environment and "MLXD_EVENT_CAUSE=stopped\n" in environment
    assert f"PATH={os.environ['PATH']}\n" in environment and f"MLXD_HOME={home}\n" in environment
    assert "secret" not in environment and "MLXD_CHILD" not in environment


def test_f60_a_command_that_hangs_and_spews_is_killed_with_all_it_started_and_holds_nobody_up(daemon: Make, home: Path) -> None:
    hook = f"sh -c 'sleep 600 & echo $! >> {home}/sleepers; exec yes'"
    d = daemon(server="--want a:latest", MLXD_EVENTS_ON_EVENT=hook, MLXD_EVENTS_LIMIT_S="0.05")
    d.start()
    d.ready()
    eventually(lambda: "events.on_event was killed: it took longer than 0.05 s" in d.log(), "its end", d.history)
    spoil_configuration(d)
    for _ in range(40):
        refused_reload(d)
    missed = eventually(
        lambda: next((line for line in d.log().splitlines() if "was too slow for" in line), ""), "events missed", d.history
    )
    assert 1 <= int(missed.split("was too slow for ")[1].split()[0]) <= 40
    assert names(d).count("reload_refused") == 41
    assert d.status()["engines"][0]["state"] == "ready"
    d.processes[0].send_signal(signal.SIGTERM)
    assert d.processes[0].wait(60) == 0
    assert len((home / "sleepers").read_text().split()) >= 2
    assert not d.ours()


def test_a_command_that_is_no_program_is_said_and_nothing_else(daemon: Make) -> None:
    d = daemon(MLXD_EVENTS_ON_EVENT="/no/such/program --loud")
    d.start()
    d.ready()
    assert "events.on_event cannot be started: [Errno 2]" in d.log()


def test_a_command_that_fails_is_said(daemon: Make) -> None:
    d = daemon(MLXD_EVENTS_ON_EVENT="sh -c 'exit 3'")
    d.start()
    eventually(lambda: "events.on_event ended with status 3" in d.log(), "its status", d.history)


def test_a_new_supervisor_waits_for_the_command_and_goes_on_with_what_waits(daemon: Make, home: Path) -> None:
    d = daemon(MLXD_EVENTS_ON_EVENT=f"sh -c 'sleep 0.2; cat >> {home}/lines'")
    d.start()
    d.ready()
    spoil_configuration(d)
    refused_reload(d)
    d.paths.config.unlink()
    assert d.mlxd("restart", "--supervisor").returncode == 0
    until_told(d, "supervisor_replaced")
    lines = home / "lines"
    eventually(lambda: '"supervisor_replaced"' in lines.read_text(), "what is new told", d.history)
    heard = lines.read_text().splitlines()
    seqs = [json.loads(line)["seq"] for line in heard]
    assert seqs == list(range(1, seqs[-1] + 1))


# --- logs that go wrong ------------------------------------------------------------------------------------------------------------


def test_f50_f51_a_flood_of_bytes_without_an_end_is_cut_and_told_once(daemon: Make) -> None:
    d = daemon(
        server="--want a:latest",
        engine="--spew 100",
        MLXD_SUPERVISOR_LOG_BYTES="65536",
        MLXD_SUPERVISOR_LOG_KEEP_BYTES="1000",
    )
    d.start()
    pid = d.ready()["engines"][0]["pid"]
    until_told(d, "log_flooded", child="engine-1", pid=pid)
    eventually(lambda: 0 < d.paths.log("engine-1").stat().st_size <= 65536, "the log cut", d.history)
    status = d.ready()
    assert status["engines"][0]["pid"] == pid and status["engines"][0]["restarts"] == 0
    assert status["supervisor"]["memory_bytes"] < 64 * 2**20
    assert names(d).count("log_flooded") == 1
    shown = d.mlxd("logs", "--engine").stdout
    assert "\\x1b[31m\\x1b]0;mine\\x07" in shown
    assert all(c.isprintable() or c in "\n\t" for c in shown)


def test_rel_22_the_supervisors_own_log_stays_under_its_limit(daemon: Make) -> None:
    d = daemon(MLXD_SUPERVISOR_LOG_BYTES="65536", MLXD_SUPERVISOR_LOG_KEEP_BYTES="1000")
    d.start()
    d.ready()
    spoil_configuration(d, 3000)
    for _ in range(100):
        refused_reload(d)
    assert all(len(event["text"]) <= events.MOST_TEXT + 3 for event in told(d))
    eventually(lambda: d.paths.log("supervisor").stat().st_size <= 65536, "the log cut", d.history)


def test_f52_a_log_that_was_removed_or_is_a_directory_is_made_anew_and_nobody_is_the_worse_for_it(daemon: Make) -> None:
    d = daemon(server="--want a:latest")
    d.start()
    first = d.ready()
    shutil.rmtree(d.paths.logs)
    for name in ("server", "engine-1"):
        eventually(d.paths.log(name).is_file, f"the log of {name}", d.history)
    d.paths.log("engine-1").unlink()
    d.paths.log("engine-1").mkdir()
    d.paths.log("supervisor").unlink(missing_ok=True)
    d.paths.log("supervisor").mkdir()
    lost = until_told(d, "log_lost")
    assert lost["child"] == "engine-1" and "Is a directory" in lost["text"]
    assert any(note.startswith("engine-1 has no log") for note in d.status()["notes"])
    os.kill(first["engines"][0]["pid"], signal.SIGKILL)
    d.until("another engine, with no log", lambda s: s["state"] == "ready" and s["engines"][0]["restarts"] == 1)
    for name in ("engine-1", "supervisor"):
        d.paths.log(name).rmdir()
    eventually(d.paths.log("engine-1").is_file, "its log", d.history)
    assert not d.until("no note", lambda s: not s["notes"])["notes"]
    spoil_configuration(d)
    first_line = d.log().splitlines()[0]
    assert first_line.endswith("lines before this one could not be written")
    assert d.status()["server"]["pid"] == first["server"]["pid"]


def test_f52_a_log_that_was_made_read_only_changes_nothing_for_those_who_are_served(daemon: Make) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes where nobody may")
    d = daemon(server="--want a:latest")
    d.start()
    first = d.ready()
    d.paths.log("engine-1").chmod(0o400)
    d.paths.log("supervisor").chmod(0o400)
    os.kill(first["engines"][0]["pid"], signal.SIGKILL)
    d.until("another engine", lambda s: s["state"] == "ready" and s["engines"][0]["restarts"] == 1)
    until_told(d, "log_lost")


def test_mlxd_starts_where_its_log_is_a_directory(daemon: Make) -> None:
    d = daemon()
    d.paths.log("supervisor").mkdir(parents=True)
    ran = d.mlxd("start")
    assert ran.returncode == 0, ran.stderr
    assert list(itertools.islice(names(d), 1)) == ["started"]
    assert d.mlxd("logs").returncode == 3
    assert d.mlxd("stop").returncode == 0
