"""Every block marked `console` in the documents is typed here, into a real shell beside a real daemon, and shows what the document shows.

A block shows commands after "$ " (and "> " where one goes on) and below each what it prints. Of what is printed, words and their order have to
be right; sizes, ages, times, speeds and process ids may be others, but a pid that comes twice means one process, and "..." stands for anything.
A command has to succeed unless the next one is `echo $?`.

What cannot be run everywhere says so in a comment above the block, `<!-- needs: hub -->`, by the words of NEEDS; then, as for the commands that
stand in sentences, commands, options and arguments are held against the command line itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest
import yaml
from conftest import NO_SPARE, PATIENCE_S, Daemon, eventually
from prometheus_client.parser import text_string_to_metric_families

from mlxd.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Why a block is not typed here.
NEEDS = {
    "mac": "macOS and what comes with it",
    "systemd": "a user manager of systemd, which would have the daemon it starts for good",
    "root": "another user's rights",
    "hub": "the Hugging Face hub, or a model from there",
    "ollama": "a real Ollama",
    "suite": "minutes: the whole suite, a benchmark, a training",
    "install": "a package index; it changes what is installed",
    "clients": "programs of others",
    "remote": "a second machine",
    "terminal": "somebody at a terminal: it ends when they leave",
    "cuda": "an NVIDIA GPU",
}
#: Commands that only look: what they show may take a moment to come about.
LOOKS = re.compile(r"mlxd (status|ps|list|events|top|check|logs)\b|curl (?!.*-d )")


@dataclass
class Step:
    command: str
    shown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    place: str
    needs: tuple[str, ...]
    steps: list[Step]

    @property
    def starts(self) -> bool:
        """It is the block's first command that starts mlxd; else one runs."""
        return next((step.command for step in self.steps if step.command.startswith("mlxd ")), "").startswith("mlxd start")


def fences(file: Path) -> Iterator[tuple[int, str, str, list[str]]]:
    """Of each fenced block: its line, the line above it, its language, its lines."""
    lines = file.read_text().splitlines()
    begin: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begin is None:
            begin = number
        else:
            yield begin + 1, lines[begin - 1], lines[begin][3:], lines[begin + 1 : number]
            begin = None
    assert begin is None, f"{file}:{begin} is not closed"


def blocks() -> Iterator[Block]:
    for file in DOCUMENTS:
        for number, above, language, lines in fences(file):
            if language == "console":
                marked = re.fullmatch(r"<!-- needs: (.+) -->", above)
                needs = tuple(marked[1].split(", ")) if marked else ()
                yield Block(f"{file.relative_to(ROOT)}:{number}", needs, steps_of(lines))


def steps_of(lines: list[str]) -> list[Step]:
    steps: list[Step] = []
    for line in lines:
        if line.startswith("$ "):
            steps.append(Step(line[2:]))
        elif line.startswith("> ") and not steps[-1].shown:
            steps[-1].command += f"\n{line[2:]}"
        else:
            steps[-1].shown.append(line)
    return steps


BLOCKS = list(blocks())
#: Those that start one come first: they leave it to the others.
TYPED = sorted((block for block in BLOCKS if not block.needs), key=lambda block: not block.starts)


# --- what is shown ------------------------------------------------------------------------------------------------------------------

NUMBER = r"\d[\d,]*(?:\.\d+)?"
#: What may be another one of its kind: how it looks, and what matches in its place.
KINDS = {
    "anything": (r"\.\.\.", ".*"),
    "time": (r"\d{4}-\d\d-\d\dT[\d:.]+Z", r"\d{4}-\d\d-\d\dT[\d:.]+Z"),
    "pid": (r"\bpid \d+", ""),
    "size": (rf"{NUMBER} [kMGT]B\b", rf"{NUMBER} [kMGT]?B"),
    "age": (r"\b(?:\d+d\d\dh|\d+h\d\dm|\d+m\d\ds|\d+s)\b", r"(?:\d+d\d\dh|\d+h\d\dm|\d+m\d\ds|\d+s)"),
    "duration": (rf"{NUMBER} m?s\b", rf"{NUMBER} m?s"),
    "speed": (rf"{NUMBER} tokens/s", rf"{NUMBER} tokens/s"),
    "version": (r"(?<![\d.])\d+\.\d+\.\d+(?![\d.])", r"\d+\.\d+\.\d+\S*"),
    "blanks": (r" {2,}", " {2,}"),
}
PARTS = re.compile("|".join(f"(?P<{name}>{looks})" for name, (looks, _) in KINDS.items()))


def pattern(shown: list[str], pids: dict[str, str]) -> re.Pattern[str]:
    """What matches output that is as `shown`. `pids`: those of the document that are known already, and whose they are."""
    return re.compile("".join("(?:.*\n)*?" if line == "..." else pattern_of(line, pids) for line in shown))


def pattern_of(line: str, pids: dict[str, str]) -> str:
    done, at = "", 0
    for part in PARTS.finditer(line):
        done += re.escape(line[at : part.start()])
        at = part.end()
        done += pid_pattern(part[0][4:], pids) if part.lastgroup == "pid" else KINDS[part.lastgroup or ""][1]
    return f"{done}{re.escape(line[at:])} *\n"


def pid_pattern(pid: str, pids: dict[str, str]) -> str:
    if pid not in pids:
        pids[pid] = ""  # from its first group on, in this very output
        return rf"pid (?P<p{pid}>\d+)"
    return f"pid {pids[pid]}" if pids[pid] else f"pid (?P=p{pid})"


def test_words_are_compared_and_pids_kept_apart_and_what_is_measured_may_differ() -> None:
    shown = [
        "ready  mlxd 0.1.0  http://127.0.0.1  up 4s  memory 29 MB  restarts 1",
        "engine  pid 7",
        "again  pid 7",
        "...",
        "in 0.5 s, ...",
    ]
    rest = "x\ny\nin 12 ms, or so\n"
    first = "ready  mlxd 1.2.3rc1  http://127.0.0.1  up 3h12m  memory 1.5 GB  restarts 1"
    assert pattern(shown, {}).fullmatch(f"{first}\nengine  pid 12\nagain   pid 12\n{rest}")
    assert not pattern(shown, {}).fullmatch(f"{first}\nengine  pid 12\nagain  pid 13\n{rest}")
    for one, other in (("restarts 1", "restarts 2"), ("127.0.0.1", "127.0.0.2"), ("ready", "held")):
        assert not pattern(shown, {}).fullmatch(f"{first.replace(one, other)}\nengine  pid 12\nagain  pid 12\n{rest}")


# --- a shell ------------------------------------------------------------------------------------------------------------------------


class Shell:
    """bash, with `mlxd` on its PATH and a daemon of its own to be started. What documents say of places and ports is said of its own."""

    def __init__(self, home: Path):
        own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(home / "user"), "TERM": "dumb"}
        own |= {"HF_HUB_OFFLINE": "1"}
        (home / "user").mkdir()
        self.port, ollama = free_ports(2)
        own |= {"MLX_API_PORT": str(self.port), "OLLAMA_URL": f"http://localhost:{ollama}"}
        self.daemon = Daemon(home / "mlxd", **own)
        for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "BASH_ENV"):
            self.daemon.environ.pop(name, None)
        for name in [name for name in self.daemon.environ if name.startswith("MLXD_") and name not in (*own, "MLXD_HOME")]:
            del self.daemon.environ[name]  # the limits are as an operator has them
        self.names = {"11435": str(self.port), "11434": str(ollama)}
        self.names |= dict.fromkeys(("~/.config/mlxd", "~/.local/state/mlxd"), str(self.daemon.home))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Shell:
        where = self.daemon.environ["HOME"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            ["bash"], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=self.daemon.environ, cwd=where
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.communicate(timeout=PATIENCE_S)

    def ours(self, text: str, pids: dict[str, str]) -> str:
        for theirs, mine in self.names.items():
            text = text.replace(theirs, mine)
        return re.sub(r"\d+", lambda found: pids.get(found[0]) or found[0], text)

    def type(self, command: str) -> tuple[str, int]:
        """What it prints, and its exit status, which the next command finds in $?."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        mark = f"--- {os.urandom(6).hex()} "
        self.process.stdin.write(f"(exit $LAST); {{\n{command}\n}} </dev/null\nLAST=$?; echo {mark}$LAST\n".encode())
        self.process.stdin.flush()
        told, deadline = b"", time.monotonic() + PATIENCE_S
        while not (end := re.search(rf"{mark}(\d+)\n".encode(), told)):
            ready = (
                select.select([self.process.stdout], [], [], deadline - time.monotonic())[0] if time.monotonic() < deadline else []
            )
            more = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert more, f"{command}\nended the shell, or did not end in {PATIENCE_S:g} s\n{told.decode()}\n{self.daemon.history()}"
            told += more
        return told[: end.start()].decode(), int(end[1])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        socks = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in socks]


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    home = Path(tempfile.mkdtemp(prefix="mlxd-t-"))
    one = Shell(home)
    try:
        yield one
    finally:
        one.daemon.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.parametrize("block", TYPED, ids=lambda block: block.place)
def test_a_block_shows_what_its_commands_do(shell: Shell, block: Block) -> None:
    """Beside a daemon, unless the block starts it, of whose processes no other block has killed one."""
    for program in ("bash", "curl"):
        if shutil.which(program) is None and (program == "bash" or any("curl " in step.command for step in block.steps)):
            pytest.skip(f"there is no {program} here to type it into")
    pids: dict[str, str] = {}
    kills = any(step.command.startswith("kill -9") for step in block.steps)
    shell.daemon.environ["MLXD_SUPERVISOR_SPARE_BYTES"] = "0" if kills else NO_SPARE
    with shell:
        if bool(shell.daemon.status()) is block.starts:
            shell.type("mlxd stop" if block.starts else "mlxd start")
        steps = zip(block.steps, [*block.steps[1:], Step("")], strict=True)
        for step, after in steps:
            carry_out(shell, step, pids, may_fail=after.command == "echo $?")
        if kills:
            shell.type("mlxd stop")


def carry_out(shell: Shell, step: Step, pids: dict[str, str], may_fail: bool) -> None:
    command, deadline = shell.ours(step.command, pids), time.monotonic() + PATIENCE_S
    wanted = pattern([shell.ours(line, {}) for line in step.shown], pids)
    pause_s = 0.2
    while True:
        told, status = shell.type(command)
        if found := wanted.fullmatch(told if told.endswith("\n") or not told else f"{told}\n"):
            break
        if not LOOKS.match(command) or time.monotonic() > deadline:
            pytest.fail(f"$ {command}\nshows\n{told}\nand not\n" + "\n".join(step.shown) + f"\n{shell.daemon.history()}")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 2.0)  # a look takes from what it waits for
    pids |= {name[1:]: value for name, value in found.groupdict().items()}
    assert may_fail or status == 0, f"$ {command}\nends with {status}\n{told}"
    if killed := re.match(r"kill -9 (\d+)", command):  # whoever types takes longer than mlxd to notice
        eventually(lambda: [end for end in shell.daemon.exits() if end["pid"] == int(killed[1])], "its end", shell.daemon.history)


# --- what is not typed --------------------------------------------------------------------------------------------------------------


def test_whatever_a_block_needs_is_one_of_a_few_things() -> None:
    assert not [block for block in BLOCKS if not set(block.needs) <= set(NEEDS)]


def test_no_block_of_commands_goes_unread() -> None:
    programs = (
        "$",
        "mlxd",
        "make",
        "pip",
        "pipx",
        "curl",
        "export",
        "eval",
        "python",
        "docker",
        "ollama",
        "systemctl",
        "launchctl",
        "ssh",
    )
    unread = [
        f"{file.name}:{number}"
        for file in DOCUMENTS
        for number, _, language, lines in fences(file)
        if language != "console" and any(line.split(" ")[0] in programs or line.startswith(".venv/") for line in lines)
    ]
    assert not unread


def simple_commands(text: str) -> Iterator[list[str]]:
    """Words of each command in a line of a shell, those in $(...) included."""
    for inner in re.findall(r"\$\(([^()]*)\)", text):
        yield from simple_commands(inner)
    reader = shlex.shlex(text, posix=True, punctuation_chars=True)
    reader.commenters, words = "#", []
    for word in reader:
        if set(word) <= set(";|&()"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def complaint(words: list[str], whole: bool = True) -> str:
    """What the command line has against these words, which begin with `mlxd`; "" for nothing. Runs nothing.

    Not `whole`: a command may stand for itself, without the arguments it needs."""
    words = words[1:]
    for at, word in enumerate(words):
        if re.fullmatch(r"\d*[<>]+&?|[<>]+\S+", word):  # a redirection
            words = words[:at]
            break
    command: click.Command = main
    context: click.Context | None = None
    try:
        while True:
            context = command.make_context(command.name, list(words), parent=context)
            if not isinstance(command, click.Group):
                return ""
            _, found, words = command.resolve_command(context, [*context._protected_args, *context.args])
            assert found is not None
            command = found
    except click.MissingParameter as error:
        return error.format_message() if words or whole else ""
    except click.exceptions.Exit:  # --help, --version
        return ""
    except click.ClickException as error:
        return error.format_message()


def test_the_command_line_is_asked_without_running_anything() -> None:
    assert complaint(shlex.split("mlxd autostart install --system")) == complaint(["mlxd", "--version"]) == ""
    assert "No such option" in complaint(shlex.split("mlxd restart --supervisr"))
    assert "No such command" in complaint(shlex.split("mlxd autostart instal"))
    assert "Missing argument" in complaint(["mlxd", "pull"])
    assert list(simple_commands('a; eval "$(mlxd env --x)" | b')) == [
        ["mlxd", "env", "--x"],
        ["a"],
        ["eval", "$(mlxd env --x)"],
        ["b"],
    ]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs], ids=lambda block: block.place)
def test_a_block_that_is_not_typed_names_commands_and_options_that_there_are(
    block: Block, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [wrong for step in block.steps for words in simple_commands(step.command) if (wrong := trouble(words))]
    assert not wrong


def trouble(words: list[str]) -> str:
    """What is wrong with a command of ours: of `mlxd`, of make, of a script in this tree; "" for nothing, and for those of others."""
    words = words[next((n for n, word in enumerate(words) if not re.match(r"[A-Z_]+=", word) and word not in ("sudo", "env")), 0) :]
    name = Path(words[0]).name if words else ""
    if name == "mlxd":
        return complaint(words)
    if name == "make":
        makefile = (ROOT / "Makefile").read_text()
        unknown = [
            w for w in words[1:] if not re.search(rf"^{re.escape(w)}:|\b{re.escape(w.partition('=')[0])}\b.*=", makefile, re.M)
        ]
        return f"make knows no {unknown}" if unknown else ""
    if name.startswith("python") and len(words) > 1 and words[1].endswith(".py"):
        script = (ROOT / words[1]).read_text()
        unknown = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in script]
        return f"{words[1]} has no {unknown}" if unknown else ""
    return ""


def sentences() -> Iterator[tuple[str, str]]:
    """Commands of mlxd in the text of the documents: where, and what."""
    for file in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S)
        for code in re.findall(r"`([^`\n]*)`", text):
            if re.search(r"\bmlxd ", code):
                yield str(file.relative_to(ROOT)), code.replace("\\|", "|")


def test_commands_in_sentences_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        (place, code, why)
        for place, code in sentences()
        if "[" not in code  # a form, not a command: `mlxd logs [-f] [--server|--engine]`
        for words in simple_commands(code)
        if words and Path(words[0]).name == "mlxd" and (why := complaint(words, whole=False))
    ]
    assert not wrong, "\n".join(map(str, wrong))


# --- the figures --------------------------------------------------------------------------------------------------------------------

METRICS = ROOT / "docs" / "metrics.md"
#: What Prometheus adds to every series of a target.
TARGET = {"job", "instance"}


def listed() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric of docs/metrics.md's table."""
    rows = re.findall(r"^\| `(mlxd_\w+)` \| (\w+) \|([^|]*)\|", METRICS.read_text(), re.M)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_metrics_that_are_listed_are_those_that_there_are(shell: Shell) -> None:
    with shell:
        if not shell.daemon.status():
            shell.type("mlxd start")
        shell.type("mlxd chat Hello")
    there: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(shell.daemon.get("/metrics")[2].decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        there[name] = family.type, labels if family.samples else listed().get(name, ("", labels))[1]
    assert {name: told for name, told in there.items() if name.startswith("mlxd_") and not name.endswith("_created")} == listed()


def asked_of_prometheus() -> dict[str, list[str]]:
    """The expressions of each file, with Grafana's variables as Prometheus would see them."""
    alerts = yaml.safe_load((ROOT / "docs" / "alerts.yml").read_text())
    board = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = [re.sub(r"\$__\w+", "5m", expression).replace("$job", ".*").replace("$instance", ".*") for expression in asked]
    return {"alerts": [rule["expr"] for rule in alerts["groups"][0]["rules"]], "dashboard": asked}


@pytest.mark.parametrize("file", ["alerts", "dashboard"])
def test_alerts_and_dashboard_ask_for_what_is_listed(file: str) -> None:
    for expression in asked_of_prometheus()[file]:
        names = re.findall(r"\b((?:mlxd|process)_\w+|up)\b(?:{([^}]*)})?", expression)
        assert names and re.search(r"[^\w]job=", expression), expression
        for name, matchers in names:
            kind, labels = listed().get(re.sub(r"_(bucket|count|sum)$", "", name), ("gauge", set()))
            assert name == "up" or name in listed() or (kind == "histogram" and name.endswith("_bucket")), expression
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= labels | TARGET, expression
            for by in re.findall(r"\bby \(([^)]*)\)", expression):
                assert set(by.split(", ")) <= labels | TARGET | {"le"}, expression


def test_the_panels_of_the_dashboard_stand_side_by_side_and_name_their_lines() -> None:
    board = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            by = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            known = [labels for name, (_, labels) in listed().items() if name in target["expr"]]
            assert any(by <= labels | TARGET for labels in known), target
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def promtool(*words: str, **files: str) -> str:
    """What it has against these files; "" for nothing."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("there is no promtool here, so nobody but us has read docs/alerts.yml and the dashboard")
    with tempfile.TemporaryDirectory() as place:
        for name, text in files.items():
            (Path(place) / f"{name}.yml").write_text(text)
        done = subprocess.run([program, *words], cwd=place, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_promtool_takes_the_rules_the_expressions_and_the_configuration() -> None:
    alerts = (ROOT / "docs" / "alerts.yml").read_text()
    dashboard = [{"record": "a:b", "expr": expression} for expression in asked_of_prometheus()["dashboard"]]
    rules = [{"record": f"a:b{n}", "expr": rule["expr"]} for n, rule in enumerate(dashboard)]
    assert not promtool("check", "rules", "alerts.yml", alerts=alerts)
    assert not promtool("check", "rules", "rules.yml", rules=yaml.safe_dump({"groups": [{"name": "x", "rules": rules}]}))
    config = next("\n".join(lines) for _, _, language, lines in fences(METRICS) if language == "yaml")
    assert not promtool("check", "config", "--syntax-only", "prometheus.yml", prometheus=config, alerts=alerts)


#: What a target tells each minute, and which alert it is that fires within the hour; {} are its labels.
TROUBLES = {
    "MlxdDown": ["up{} 0x60"],
    "MlxdNoSupervisor": ["mlxd_supervisor_up{} 0x60"],
    "MlxdNotOk": ['mlxd_health{status="ok"} 0x60', 'mlxd_health{status="degraded"} 1x60'],
    "MlxdGivenUpForNow": ['mlxd_engines{state="cooldown"} 1x60', 'mlxd_engines{state="held"} 0x60'],
    "MlxdEnginesDie": [
        'mlxd_exits_total{child="engine",cause="killed"} 0x50 1x10',
        'mlxd_exits_total{child="engine",cause="memory"} 0x40 2x20',
    ],
    "MlxdBusy": ['mlxd_requests_total{outcome="busy"} 0+1x60', 'mlxd_requests_total{outcome="done"} 0+9x60'],
    "MlxdFails": ['mlxd_requests_total{outcome="failed"} 0+1x60', 'mlxd_requests_total{outcome="done"} 0+50x60'],
    "MlxdMemoryLow": ["mlxd_memory_available_bytes{} 5e8x60"],
    "MlxdSlow": [
        'mlxd_time_to_first_token_seconds_bucket{model="m",le="10"} 0+1x60',
        'mlxd_time_to_first_token_seconds_bucket{model="m",le="30"} 0+5x60',
        'mlxd_time_to_first_token_seconds_bucket{model="m",le="+Inf"} 0+5x60',
    ],
}
#: ... and of none of these.
FINE = [
    "up{} 1x60",
    "mlxd_supervisor_up{} 1x60",
    'mlxd_health{status="ok"} 1x20 0x2 1x40',
    'mlxd_engines{state="blank"} 1x60',
    'mlxd_exits_total{child="engine",cause="killed"} 0x30 1x30',
    'mlxd_exits_total{child="engine",cause="stopped"} 0+1x60',
    'mlxd_requests_total{outcome="done"} 0+9x60',
    "mlxd_memory_available_bytes{} 5e9x60",
    'mlxd_time_to_first_token_seconds_bucket{model="m",le="1"} 0+9x60',
    'mlxd_time_to_first_token_seconds_bucket{model="m",le="+Inf"} 0+9x60',
]


def test_each_alert_fires_when_it_should_and_is_quiet_otherwise() -> None:
    alerts = (ROOT / "docs" / "alerts.yml").read_text()
    names = [rule["alert"] for rule in yaml.safe_load(alerts)["groups"][0]["rules"]]
    assert names == list(TROUBLES)
    tests = [simulated(told, {name: name == trouble for name in names}) for trouble, told in TROUBLES.items()]
    tests.append(simulated(FINE, dict.fromkeys(names, False)))
    told = {"rule_files": ["alerts.yml"], "tests": tests, "evaluation_interval": "1m"}
    assert not promtool("test", "rules", "test.yml", alerts=alerts, test=yaml.safe_dump(told))


def simulated(told: list[str], fires: dict[str, bool]) -> dict[str, object]:
    """A test of promtool's: an hour of these samples, and whether each alert fires at its end."""
    series = []
    for line in told:
        name, values = line.split("} ")
        labels = name.replace("{", '{job="mlxd",instance="a",').rstrip(",")
        series.append({"series": f"{labels}}}", "values": values})
    asked = [
        {
            "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)',
            "eval_time": "59m",
            "exp_samples": [{"labels": "{}", "value": int(does)}],
        }
        for name, does in fires.items()
    ]
    return {"interval": "1m", "input_series": series, "promql_expr_test": asked}
