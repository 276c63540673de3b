"""`mlxd completion`: the shells themselves are asked what they would complete."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from conftest import PATIENCE_S, Daemon
from server_client import make_model
from test_mlxd import real_settings

from mlxd import paths

#: A bash that asks the completion function itself, as it would at Tab: the last of the words is the one being typed.
ASK_BASH = """
eval "$(mlxd completion bash)"
complete -p mlxd
while IFS= read -r line; do
    IFS=' ' read -ra COMP_WORDS <<<"$line"
    [[ $line == *' ' ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _mlxd_completion mlxd
    echo "$line:" "${COMPREPLY[@]}"
done
"""


@pytest.fixture
def stopped(home: Path) -> Daemon:
    """One that does not run, with the models `real` and `org/other`, and with `mlxd` in its PATH."""
    d = Daemon(home, **real_settings(home))
    make_model(home / "models" / "real")
    make_model(home / "models" / "org" / "other")
    (home / "bin").mkdir()
    script = home / "bin" / "mlxd"
    script.write_text(f"#!{sys.executable}\nfrom mlxd.cli import main\nmain(prog_name='mlxd')\n")
    script.chmod(0o755)
    d.environ |= {"PATH": f"{home / 'bin'}:{os.environ['PATH']}", "HOME": str(home), "ZDOTDIR": str(home), "TERM": "xterm"}
    return d


def shell(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name} here")
    return path


def bash(d: Daemon, *lines: str) -> tuple[dict[str, str], str]:
    """What it completes each line with; and what all that said to the terminal of somebody who is typing."""
    words = [shell("bash"), "--norc", "-c", ASK_BASH]
    said = "".join(f"{line}\n" for line in lines)
    ran = subprocess.run(words, env=d.environ, input=said, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    first, *rest = ran.stdout.splitlines()
    assert first == "complete -o nosort -F _mlxd_completion mlxd"
    return {line: found.strip() for line, _, found in (row.partition(":") for row in rest)}, ran.stderr


def test_bash_completes_commands_options_and_models_without_a_daemon(stopped: Daemon) -> None:
    models = "mlxd-tiny org/other real"
    asked = {
        "mlxd un": "uninstall unload",
        "mlxd chat --mo": "--model",
        "mlxd completion ": "bash zsh fish",
        "mlxd load R": "real",
        "mlxd chat --model or": "org/other",
        **{
            f"mlxd {command} ": models
            for command in ("load", "unload", "show", "rm", "rm real", "cp", "alias poet", "alias --remove")
        },
        "mlxd cp real ": "",
        "mlxd load nope": "",
    }
    found, said = bash(stopped, *asked)
    assert {line: " ".join(sorted(words.split())) for line, words in found.items()} == {
        line: " ".join(sorted(words.split())) for line, words in asked.items()
    }
    assert not said


def test_what_cannot_be_looked_up_is_not_completed_and_nobody_is_disturbed(stopped: Daemon) -> None:
    stopped.environ["MLX_API_PORT"] = "nonsense"
    assert bash(stopped, "mlxd load ") == ({"mlxd load ": ""}, "")
    paths.prepare(stopped.paths)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(os.fspath(stopped.paths.control))
        silent.listen()
        assert bash(stopped, "mlxd load ") == ({"mlxd load ": ""}, "")


def test_zsh_completes(stopped: Daemon) -> None:
    terminal = pexpect.spawn(
        shell("zsh"), ["-d"], env=stopped.environ, cwd=stopped.home, encoding="utf-8", timeout=PATIENCE_S, dimensions=(30, 100)
    )
    try:
        terminal.sendline("autoload -Uz compinit; compinit -u -D; eval \"$(mlxd completion zsh)\"; echo rea''dy")
        terminal.expect("ready")
        terminal.send("mlxd load re\t")
        terminal.expect("real")
        terminal.sendintr()
        terminal.send("mlxd comple\t")
        terminal.expect("completion")
    finally:
        terminal.close(force=True)


def test_fish_completes(stopped: Daemon) -> None:
    asked = 'mlxd completion fish | source; complete -C "mlxd load re"; complete -C "mlxd chat --mod"'
    words = [shell("fish"), "-N", "-c", asked]
    ran = subprocess.run(words, env=stopped.environ, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert [line.split("\t")[0] for line in ran.stdout.splitlines()] == ["real", "--model"], ran.stderr
